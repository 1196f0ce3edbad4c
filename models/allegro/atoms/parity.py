# SPDX-License-Identifier: Apache-2.0
"""Parity plots: what a model predicts against what is true."""

from pathlib import Path

import numpy as np


def parity_plot(path: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], units: dict[str, str],
                groups: dict[str, np.ndarray] | None = None, title: str = "") -> None:  # fmt: skip
    """A panel for each label of `pairs` (true, predicted), with its errors, and their histogram below.

    `groups` colours a label's points, e.g. forces by element. Values that are not finite are left out; raises
    ValueError if none are left.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = [label for label, (true, found) in pairs.items() if (np.isfinite(true) & np.isfinite(found)).any()]
    if not labels:
        raise ValueError("there is nothing to compare: the structures have no labels, or no prediction is a number.")
    figure, axes = plt.subplots(2, len(labels), figsize=(4.2 * len(labels), 6), squeeze=False, layout="constrained",
                                gridspec_kw={"height_ratios": (3, 1)})  # fmt: skip
    for (top, bottom), label in zip(axes.T, labels, strict=True):
        true, found = (np.asarray(values, dtype=np.float64).ravel() for values in pairs[label])
        fine = np.isfinite(true) & np.isfinite(found)
        group = np.asarray((groups or {}).get(label, np.full(len(true), "")))[fine]
        true, found = true[fine], found[fine]
        unit, errors, noun = units[label], found - true, label.replace("_", " ")
        points = 2 if len(true) > 500 else 5
        names, numbers = np.unique(group, return_counts=True)
        for name in names[np.argsort(-numbers, kind="stable")]:  # the fewest on top
            here = group == name
            some = np.flatnonzero(here)[:: max(1, here.sum() // 20_000)]
            top.plot(true[some], found[some], ".", ms=points, alpha=0.5, label=str(name), rasterized=True)
        least, most = min(true.min(), found.min()), max(true.max(), found.max())
        margin = 0.04 * (most - least) or 1e-3 * max(abs(most), 1)  # all may be the same
        ends = [least - margin, most + margin]
        top.plot(ends, ends, color="0.3", lw=0.8)
        top.set(xlabel=f"true {noun}, {unit}", ylabel=f"predicted {noun}, {unit}")
        top.set(xlim=ends, ylim=ends, aspect="equal")
        top.locator_params(nbins=5)
        top.set_title(f"MAE {np.abs(errors).mean():.3g}  RMSE {np.sqrt((errors**2).mean()):.3g} {unit}", fontsize=9)
        if len(names) > 1:
            top.legend(markerscale=5, fontsize=8)
        widest = max(float(np.abs(errors).max()), 1e-12)  # all errors may be the same
        bottom.hist(errors, bins=int(np.clip(2 * len(errors) ** 0.5, 10, 80)), range=(-widest, widest), color="0.5")
        bottom.set(xlabel=f"predicted - true, {unit}", ylabel="number", yscale="log" if len(true) > 500 else "linear")
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
