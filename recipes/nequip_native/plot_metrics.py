# SPDX-License-Identifier: Apache-2.0
"""Draw loss, errors, throughput, learning rate and gradient norm of one or more runs as a PNG.

Of a single run with quant_stats_config also what rounding to FP8 or FP4 does to each layer: quantization.png.

python plot_metrics.py outputs/my_run
python plot_metrics.py outputs/ddp outputs/fsdp2 --out compare.png --reference-loss 2.87
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from common.command import command
from common.files import short


# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
WIDTH = 6  # columns of the figure: rows of one, two and three panels
INK, FAINT = "#1F2937", "#6B7280"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#C4C8CE",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.xmargin": 0.02,
    "grid.color": "#E7E9EC",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
}
Metrics = dict[str, list[dict]]


def metrics_path(run: Path) -> Path:
    """Return the metrics file of a run given as a folder or as that file."""
    return run / "metrics.jsonl" if run.is_dir() else run


def read_metrics(path: Path) -> Metrics:
    """Read the training and validation lines of a run, ordered by step.

    Raises:
        ValueError: there is no such file, or no training step in it.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run or its metrics.jsonl.")
    by_step = {"train": {}, "validation": {}, "quantization": {}}
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # A run killed while writing leaves half a line.
            continue
        if isinstance(entry, dict) and entry.get("kind") in by_step:
            # A resumed run repeats the steps after its checkpoint: the later line wins.
            by_step[entry["kind"]][entry["step"]] = entry
    if not by_step["train"]:
        raise ValueError(f"{path} holds no training step.")
    return {kind: [entries[step] for step in sorted(entries)] for kind, entries in by_step.items()}


def read_run(path: Path) -> dict:
    """Return the `run.json` beside a metrics file; empty without one."""
    run_json = path.with_name("run.json")
    return json.loads(run_json.read_text()) if run_json.is_file() else {}


def read_facts(path: Path) -> list[str]:
    """Say what ran."""
    run = read_run(path)
    facts = [run.get("model_tag")]
    if run.get("num_parameters"):
        places = 0 if run["num_parameters"] < 1000 else 1
        facts.append(f"{EngFormatter(places=places, sep='')(run['num_parameters']).replace('G', 'B')} parameters")
    facts.append(run.get("strategy"))
    if run.get("num_ranks"):
        facts.append(f"{run['num_ranks']} rank{'s' if run['num_ranks'] > 1 else ''}")
    facts.append(run.get("device"))
    return [fact for fact in facts if fact]


def throughput_key(metrics: Metrics) -> str:
    """Return the one key of a training line that ends so, e.g. `tokens_per_second` or `atoms_per_second`."""
    keys = [key for key in metrics["train"][-1] if key.endswith("_per_second")]
    if len(keys) != 1:
        raise ValueError(f"A training line has one key that ends in _per_second; this one has {keys or 'none'}.")
    return keys[0]


def throughput_unit(key: str) -> str:
    """Return the unit of that key, e.g. `tokens/s`."""
    return f"{key.removesuffix('_per_second')}/s"


def column(entries: list[dict], key: str) -> list[float]:
    """Return one value of each entry, NaN where it was not recorded."""
    return [math.nan if entry.get(key) is None else entry[key] for entry in entries]


def smoothed(values: list[float], window: int) -> list[float]:
    """Return for each value the mean of the `window` values around it, of fewer at both ends."""
    means = []
    for i in range(len(values)):
        around = [value for value in values[max(0, i - window // 2) : i + window // 2 + 1] if math.isfinite(value)]
        means.append(fmean(around) if around else math.nan)
    return means


def last_value(values: list[float]) -> str:
    """Format the last recorded value."""
    return next((short(value, 3) for value in reversed(values) if not math.isnan(value)), "none")


def by_decades(ax: Axes, columns: list[list[float]], at_least: float) -> None:
    """Draw on a logarithmic axis what is above 0 and reaches over a factor of `at_least`."""
    values = [value for values in columns for value in values if math.isfinite(value)]
    if values and 0 < min(values) <= max(values) / at_least:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def style_of(entries: list[dict]) -> dict:
    """A line, or a marker where there is a single entry and so no line to see."""
    return {"marker": "o"} if len(entries) == 1 else {}


def share(i: int, number: int) -> slice:
    """Return the columns of panel `i` of so many in a row of the figure."""
    return slice(i * WIDTH // number, (i + 1) * WIDTH // number)


def line_width(i: int, num_runs: int) -> float:
    """Return the width of run `i`: earlier ones are wider, to show on both sides of a later one that coincides."""
    return 1.7 + 4.0 * (num_runs - 1 - i) / num_runs


def draw_loss(ax: Axes, runs: dict[str, Metrics], loss_name: str, smooth: int | None) -> None:
    """Draw each run's training loss, raw and smoothed, and its validation loss."""
    any_validation = any("loss" in entry for metrics in runs.values() for entry in metrics["validation"])
    drawn: list[list[float]] = []
    for i, (name, metrics) in enumerate(runs.items()):
        steps, losses = column(metrics["train"], "step"), column(metrics["train"], "loss")
        means = smoothed(losses, smooth or max(1, len(losses) // 20))
        validation_losses = column(metrics["validation"], "loss")
        has_validation = any(map(math.isfinite, validation_losses))
        train_label = f"train {last_value(means)}"
        validation_label = f"validation {last_value(validation_losses)}" if has_validation else None
        train_colour = validation_colour = COLOURS[i % len(COLOURS)]
        if len(runs) > 1:
            train_label, validation_label = ", ".join(filter(None, (f"{name}: {train_label}", validation_label))), None
        else:
            validation_colour = COLOURS[1]
        width = line_width(i, len(runs))
        ax.plot(steps, losses, color=train_colour, linewidth=0.8, alpha=0.35)
        ax.plot(steps, means, color=train_colour, linewidth=width, label=train_label, **style_of(steps))
        if has_validation:
            ax.plot(
                column(metrics["validation"], "step"),
                validation_losses,
                color=validation_colour,
                linewidth=1.2,
                linestyle=":",
                marker=MARKERS[i % len(MARKERS)],
                markersize=5 + width,
                markerfacecolor="white" if i == 0 else "none",
                markeredgewidth=1.6,
                zorder=3,
                label=validation_label,
            )
        drawn += [means, validation_losses]
    by_decades(ax, drawn, at_least=20)
    title = loss_name + (" (lines: train, markers: validation)" if len(runs) > 1 and any_validation else "")
    ax.set(title=title, xlabel="Step")


def draw_errors(ax: Axes, runs: dict[str, Metrics], title: str, keys: dict[str, str]) -> None:
    """Draw columns of the validations, of several runs only the first; `keys` are those by the columns' names."""
    single, drawn = len(runs) == 1, []
    for i, metrics in enumerate(runs.values()):
        for k, (name, key) in enumerate(keys.items() if single else [*keys.items()][:1]):
            steps, values = column(metrics["validation"], "step"), column(metrics["validation"], key)
            colour = COLOURS[(k if single else i) % len(COLOURS)]
            width, label = 0.7 * line_width(i, len(runs)), f"{name} {last_value(values)}" if single else None
            ax.plot(steps, values, color=colour, linewidth=width, marker=MARKERS[i % len(MARKERS)], ms=4, label=label)
            drawn.append(values)
    by_decades(ax, drawn, at_least=3)
    if single:
        ax.legend(fontsize=8.5)
    ax.set(title=title if single else f"{title} ({next(iter(keys))})", xlabel="Step of the validation")


def draw_column(ax: Axes, runs: dict[str, Metrics], keys: list[str], title: str) -> None:
    """Draw one column of the training lines of each run, each run's own key, on an axis that starts at zero."""
    for i, (metrics, key) in enumerate(zip(runs.values(), keys, strict=True)):
        steps, values = column(metrics["train"], "step"), column(metrics["train"], key)
        width = 0.7 * line_width(i, len(runs))
        ax.plot(steps, values, color=COLOURS[i % len(COLOURS)], linewidth=width, **style_of(steps))
    ax.axhline(0, color="none")
    ax.set_ylim(bottom=0)
    ax.set(title=title, xlabel="Step")


def plot_metrics(
    runs: list[Path],
    out: Path,
    reference_loss: float | None = None,
    reference_label: str = "reference",
    smooth: int | None = None,
) -> None:
    """Draw `runs` (folders or metrics files) into the image file `out`.

    Raises:
        ValueError: a run has no metrics file or no training step in it, or `smooth` is below 1.
    """
    if smooth is not None and smooth < 1:
        raise ValueError(f"smooth={smooth}: give the number of logged steps to average, 1 or more.")
    paths = [metrics_path(run) for run in runs]
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    metrics = dict(zip(names, map(read_metrics, paths), strict=True))
    facts = [read_facts(path) for path in paths]
    loss_names = {read_run(path).get("loss_name", "Loss") for path in paths}
    throughput = [throughput_key(found) for found in metrics.values()]
    units = dict.fromkeys(map(throughput_unit, throughput))
    panels = (
        (throughput, f"Throughput, real {' or '.join(units)}"),
        (["learning_rate"] * len(paths), "Learning rate"),
        (["grad_norm"] * len(paths), "Gradient norm"),
    )
    curves = {title: keys for path in paths for title, keys in read_run(path).get("curves", {}).items()}
    found = {key for run in metrics.values() for entry in run["validation"] for key in entry}
    curves = {title: keys for title, keys in curves.items() if found & {*keys.values()}}
    shared_facts = [fact for fact in facts[0] if all(fact in others for others in facts)]

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 9.4 if curves else 6.8), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        figure.suptitle("  ·  ".join(shared_facts) or ", ".join(names), x=0.015, ha="left", fontsize=12.5)
        grid = figure.add_gridspec(3 if curves else 2, WIDTH, height_ratios=(2, 1.2, 1) if curves else (2, 1))
        loss_ax = figure.add_subplot(grid[0, :])
        draw_loss(loss_ax, metrics, loss_names.pop() if len(loss_names) == 1 else "Loss", smooth)
        if reference_loss is not None:
            label = f"{reference_label} {reference_loss:.3f}"
            loss_ax.axhline(reference_loss, color=INK, linewidth=1.2, linestyle="--", label=label)
        loss_ax.legend()
        for i, (title, keys) in enumerate(curves.items()):
            draw_errors(figure.add_subplot(grid[1, share(i, len(curves))]), metrics, title, keys)
        for i, (keys, title) in enumerate(panels):
            draw_column(figure.add_subplot(grid[-1, share(i, len(panels))]), metrics, keys, title)
        for ax in figure.axes:  # a step is a whole number
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        figure.axes[1 + len(curves)].yaxis.set_major_formatter(EngFormatter(sep=""))
        figure.savefig(out)


TENSORS = ("input", "weight", "gradient")
HEAT = (
    ("underflow", "underflow, %", lambda x: 100 * x),
    ("saturation", "saturated, %", lambda x: 100 * x),
    ("mse", "squared error /\nsquare, log10", lambda x: math.log10(x) if x else math.nan),
    ("scale", "scale, log2", lambda x: math.log2(x) if x else math.nan),
)


def plot_quantization(entries: list[dict], title: str, out: Path) -> None:
    """Draw heat maps, products of all layers (four each) by steps; a column for each kind of tensor.

    Of many layers only each one's first row has its name, e.g. `3 qkv`.
    """
    steps = column(entries, "step")
    products = list(dict.fromkeys(name.rpartition(".")[0] for name in entries[-1]["tensors"]))
    products.sort(key=lambda name: int(name.partition(".")[0]))  # as they are computed, layer by layer
    layers = [name.partition(".")[0] for name in products]
    named = [i for i in range(len(products)) if len(products) <= 24 or layers[i] not in layers[:i]]
    short = [
        f"{layer} {name.rpartition('.')[2].removeprefix('layernorm_')}"
        for layer, name in zip(layers, products, strict=True)
    ]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(11, 2 + len(HEAT) * max(1.6, 0.14 * len(products))), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.015, ha="left", fontsize=12.5)
        axes = figure.subplots(len(HEAT), len(TENSORS), sharex=True, sharey=True, squeeze=False)
        for row, (key, label, scaled) in zip(axes, HEAT, strict=True):
            for ax, tensor in zip(row, TENSORS, strict=True):
                found = [
                    [entry["tensors"].get(f"{name}.{tensor}", {}).get(key) for entry in entries] for name in products
                ]
                values = [[math.nan if x is None else scaled(x) for x in line] for line in found]
                image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
                ax.set_yticks(named, [short[i] for i in named], fontsize=8)
                shown = range(0, len(steps), max(1, len(steps) // 5))
                ax.set(xticks=list(shown), xticklabels=[f"{steps[i]:g}" for i in shown])
                figure.colorbar(image, ax=ax)
            row[0].set_ylabel(label)
        for ax, tensor in zip(axes[0], TENSORS, strict=True):
            ax.set_title(f"{tensor}s")
        for ax in axes[-1]:
            ax.set_xlabel("Step")
        figure.savefig(out)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument(
        "--out", type=Path, help="image to write (default: metrics.png beside the first run's metrics)"
    )
    parser.add_argument("--reference-loss", type=float, help="draw a dashed line at this loss")
    parser.add_argument("--reference-label", default="reference", help="what that line is")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="average N logged steps (default: a twentieth of them)"
    )
    args = parser.parse_args()
    out = args.out or metrics_path(args.runs[0]).with_name("metrics.png")
    with command():
        plot_metrics(args.runs, out, args.reference_loss, args.reference_label, args.smooth)
        path = metrics_path(args.runs[0])
        if len(args.runs) == 1 and (entries := read_metrics(path)["quantization"]):
            plot_quantization(entries, "  ·  ".join(read_facts(path)), path.with_name("quantization.png"))
            print(path.with_name("quantization.png"))
        print(out)


if __name__ == "__main__":
    main()
