# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/concepts.md; the first three from the recipe's own code and sample.

python docs/pictures.py                     # writes docs/images/concepts/*.svg
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle


ROOT = Path(__file__).resolve().parents[1]
RECIPE, OUT = ROOT / "recipes" / "esm2_native_te", ROOT / "docs" / "images" / "concepts"
sys.path.insert(0, str(RECIPE))
from common.epoch_plan import EpochPlan, Grouping, permuted  # noqa: E402
from plot_metrics import COLOURS, FAINT, INK, STYLE  # noqa: E402


LIGHT = "#E7E9EC"
matplotlib.rcParams.update({**STYLE, "axes.grid": False, "svg.fonttype": "none", "svg.hashsalt": "docs"})


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure without axes' lines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **kwargs) -> None:
    """A filled box with a word in it."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1))
    if text:
        style = {"color": "white", "fontsize": 9, **kwargs}
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", **style)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A thin one."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=FAINT, linewidth=1))


def save(figure: Figure, name: str) -> None:
    """As SVG, the same bytes each time."""
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / f"{name}.svg", metadata={"Date": None})


def sample_lengths(num: int) -> list[int]:
    """Tokens of the first proteins of the bundled sample."""
    sequences = pq.read_table(RECIPE / "data" / "train.parquet", columns=["sequence"]).column(0)[:num].to_pylist()
    return [min(512, len(s) + 2) for s in sequences]


def packing() -> None:
    """Eight proteins of the sample, padded to the longest, and end to end."""
    lengths = sample_lengths(8)
    figure, (left, right) = canvas(8.5, 2.6, 2)
    longest = max(lengths)
    for i, n in enumerate(lengths):
        box(left, 0, -i, n, 0.82, COLOURS[i % len(COLOURS)])
        box(left, n, -i, longest - n, 0.82, LIGHT)
    left.set(xlim=(0, longest), ylim=(-len(lengths) + 0.8, 1.1))
    left.set_title(f"padded (BSHD): {sum(lengths) / (longest * len(lengths)):.0%} of the slots are residues")
    start, room = 0, sum(lengths) / 16  # of a number, in tokens: this half of the picture is as wide as 16 of them
    for i, n in enumerate(lengths):
        box(right, start, 0, n, 0.82, COLOURS[i % len(COLOURS)], str(n) if n > room else "", fontsize=7.5)
        start += n
    right.text(
        0, -0.35, "cu_seqlens = [0, " + ", ".join(map(str, np.cumsum(lengths))) + "]", color=FAINT, fontsize=7.5
    )
    right.set(xlim=(0, start), ylim=(-len(lengths) + 0.8, 1.1))
    right.set_title("end to end (THD): all of them")
    save(figure, "packing")


class Rows:
    """The sample's first proteins, as the plan asks for them."""

    def __init__(self, num: int):
        self.all = np.array(sample_lengths(num))

    def __len__(self) -> int:
        return len(self.all)

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Of these rows, in tokens."""
        return self.all[rows]


def epoch_plan() -> None:
    """Rows, in the order of (seed, epoch), in windows, packed, and dealt to ranks."""
    plan = EpochPlan(Rows(12), Grouping(budget=800), seed=42, window_rows=6)
    micro_batches = [plan.window(0, window) for window in range(plan.num_windows)]
    figure, (ax,) = canvas(8.5, 3.9)
    labels = (
        (3.5, "rows"),
        (2.5, "in this epoch's order"),
        (1.4, "packed into\nmicro-batches"),
        (0.15, "dealt to two ranks"),
    )
    for y, text in labels:
        ax.text(-0.2, y, text, ha="right", va="center", color=FAINT)
    for row in range(12):
        box(ax, row, 3.3, 0.92, 0.45, COLOURS[row % 6], str(row))
    number = 0
    for w, window in enumerate(micro_batches):
        ax.text(w * 6 + 2.9, 2.88, f"window {w}", ha="center", color=FAINT, fontsize=8)
        order = permuted(np.arange(6 * w, 6 * w + 6), 12, 42, 0)
        for i, row in enumerate(order):
            box(ax, w * 6 + i, 2.3, 0.92, 0.45, COLOURS[row % 6], str(row))
        x = w * 6.0
        for micro_batch in window:
            width, rank = 0.36 * len(micro_batch.rows) + 0.5, number % 2
            box(ax, x, 1.15, width, 0.45, LIGHT)
            for k, row in enumerate(micro_batch.rows):
                box(ax, x + 0.25 + 0.36 * k, 1.22, 0.34, 0.31, COLOURS[row % 6], str(row), fontsize=7)
            name = f"({micro_batch.epoch}, {w}, {micro_batch.index})"
            ax.text(x + width / 2, 1.08, name, ha="center", va="top", color=FAINT, fontsize=7)
            arrow(ax, (x + width / 2, 0.82), (x + width / 2, 0.5 - 0.4 * rank))
            box(ax, x, 0.2 - 0.4 * rank, width, 0.28, INK if rank == 0 else FAINT, f"rank {rank}", fontsize=7)
            x += width + 0.12
            number += 1
    ax.set(xlim=(-2.6, 12), ylim=(-0.35, 4))
    save(figure, "epoch_plan")


def strategies() -> None:
    """What each of four ranks holds."""
    figure, axes = canvas(8.5, 2.7, 3)
    parts = ("weights", "gradients", "AdamW's moments")
    held = {
        "DDP": ((1, 1, 1), "every rank holds all,\ngradients are averaged"),
        "FSDP2": ((4, 4, 4), "every rank holds a fourth; a layer is\ngathered just before it computes"),
        "Megatron-FSDP": ((4, 4, 4), "the same split, in flat buffers;\nfilled whole before it is split"),
    }
    for ax, (name, (shares, text)) in zip(axes, held.items(), strict=True):
        for rank in range(4):
            for p, share in enumerate(shares):
                height = 0.9 / share
                box(ax, rank, 2.2 - p, 0.9, 0.9, LIGHT)
                box(ax, rank, 2.2 - p + (0.9 - height * (rank + 1) if share > 1 else 0), 0.9, height, COLOURS[p])
            ax.text(rank + 0.45, 3.2, f"rank {rank}", ha="center", color=FAINT, fontsize=7.5)
        for p, part in enumerate(parts):
            if ax is axes[0]:
                ax.text(-0.1, 2.65 - p, part, ha="right", va="center", fontsize=8.5)
        ax.text(1.95, -0.1, text, ha="center", va="top", color=FAINT, fontsize=8)
        ax.set(xlim=(-1.6 if ax is axes[0] else 0, 4), ylim=(-0.8, 3.4))
        ax.set_title(name, loc="center")
    save(figure, "strategies")


def elastic() -> None:
    """One sequence of micro-batches, whoever computes them."""
    figure, (ax,) = canvas(8.5, 2.2)
    stretches = [("2 ranks", 8, 2), ("1 rank", 4, 1), ("4 ranks", 12, 4)]
    x = 0
    for s, (name, count, ranks) in enumerate(stretches):
        for i in range(count):
            box(ax, x + i, 0.6 + 0.0, 0.92, 0.5, COLOURS[i % ranks], str(x + i))
        ax.text(x + count / 2, 1.25, name, ha="center", color=INK)
        for step in range(count // 4):
            ax.plot([x + 4 * step + 0.04, x + 4 * step + 3.88], [0.5, 0.5], color=FAINT, linewidth=1.5)
            ax.text(
                x + 4 * step + 1.95,
                0.42,
                f"step {(x // 4) + step + 1}",
                ha="center",
                va="top",
                color=FAINT,
                fontsize=8,
            )
        x += count
        if s < len(stretches) - 1:
            ax.plot([x - 0.04, x - 0.04], [0.2, 1.5], color=COLOURS[1], linewidth=1.6)
            ax.text(x - 0.04, 1.55, "resumed", ha="center", color=COLOURS[1], fontsize=8)
    ax.text(0, 0.0, "micro_batches_per_step=4: the next four are a step; colours are ranks", color=FAINT, fontsize=8)
    ax.set(xlim=(0, x), ylim=(-0.1, 1.8))
    save(figure, "elastic_resume")


def number_formats() -> None:
    """Bits of the formats."""
    formats = {
        "FP32: weights, moments": (1, 8, 23, ""),
        "BF16: layers": (1, 8, 7, ""),
        "FP8 E4M3: inputs, weights": (1, 4, 3, "x one scale a tensor"),
        "FP8 E5M2: gradients": (1, 5, 2, "x one scale a tensor"),
        "MXFP8": (1, 4, 3, "x a power of two for each 32 numbers"),
        "NVFP4": (1, 2, 1, "x an FP8 scale for each 16 numbers"),
    }
    figure, (ax,) = canvas(8.5, 2.7)
    for i, (name, (sign, exponent, mantissa, scale)) in enumerate(formats.items()):
        y = -i
        ax.text(-0.4, y + 0.35, name, ha="right", va="center", fontsize=9)
        x = 0
        for count, colour, letter in ((sign, FAINT, "s"), (exponent, COLOURS[1], "e"), (mantissa, COLOURS[0], "m")):
            for _ in range(count):
                box(ax, x, y, 0.92, 0.72, colour, letter, fontsize=7)
                x += 1
        ax.text(x + 0.3, y + 0.35, scale, va="center", color=FAINT, fontsize=8.5)
    ax.set(xlim=(-9, 33), ylim=(-5.2, 0.9))
    save(figure, "number_formats")


def context_parallel() -> None:
    """Tokens for heads, and back."""
    figure, (ax,) = canvas(8.5, 2.7)

    def square(x: float, by_rows: bool, title: str, below: str) -> None:
        for row in range(4):
            for column in range(4):
                box(ax, x + column, 3 - row, 0.94, 0.94, COLOURS[(row if by_rows else column) // 2])
        ax.text(x + 1.95, 4.25, title, ha="center", fontsize=9)
        ax.text(x + 1.95, -0.2, below, ha="center", va="top", color=FAINT, fontsize=8)

    square(0, True, "a stretch of tokens, all heads", "norms, linear maps:\ntoken by token")
    square(8, False, "all tokens, some heads", "attention: within sequences,\nwherever they begin and end")
    square(16, True, "a stretch of tokens, all heads", "projection, MLP")
    for x in (4.3, 12.3):
        arrow(ax, (x, 2), (x + 3.3, 2))
        ax.text(x + 1.65, 2.2, "all-to-all", ha="center", color=FAINT, fontsize=8.5)
    ax.text(-0.3, 2, "tokens", rotation=90, va="center", ha="right", color=FAINT, fontsize=8)
    ax.text(21, 3.2, "rank 0", color=COLOURS[0])
    ax.text(21, 2.5, "rank 1", color=COLOURS[1])
    ax.set(xlim=(-1, 24), ylim=(-1.4, 4.6))
    save(figure, "context_parallel")


DRAWN = (packing, epoch_plan, strategies, elastic, number_formats, context_parallel)
if __name__ == "__main__":
    for draw in DRAWN:
        draw()
