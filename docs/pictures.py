# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/concepts.md; some from the recipe's own code and sample.

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
matplotlib.rcParams.update(
    {**STYLE, "axes.grid": False, "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "docs"}
)


def canvas(height: float, rows: int = 1, **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure without axes' lines, so narrow that its words can be read on a phone."""
    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, 1, **kwargs)))
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
    figure, (above, below) = canvas(3.9, 2, height_ratios=(3, 1))
    longest = max(lengths)
    for i, n in enumerate(lengths):
        box(above, 0, -i, n, 0.82, COLOURS[i % len(COLOURS)], str(n))
        box(above, n, -i, longest - n, 0.82, LIGHT)
    above.set(xlim=(0, longest), ylim=(-len(lengths) + 0.8, 1.1))
    above.set_title(f"padded (BSHD): {sum(lengths) / (longest * len(lengths)):.0%} of the slots are residues")
    start, room = 0, sum(lengths) / 16  # of a number, in tokens
    for i, n in enumerate(lengths):
        box(below, start, 0, n, 0.82, COLOURS[i % len(COLOURS)], str(n) if n > room else "")
        start += n
    ends = ", ".join(map(str, np.cumsum(lengths)))
    below.text(0, -0.3, f"cu_seqlens = [0, {ends}]", color=FAINT, fontsize=9, va="top")
    below.set(xlim=(0, start), ylim=(-1, 0.9))
    below.set_title("end to end (THD): all of them")
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
    figure, (ax,) = canvas(4.6)
    labels = ((5.05, "rows"), (3.9, "in this epoch's order, in windows of six"), (2.75, "packed into micro-batches"))
    for y, text in labels:
        ax.text(0, y, text, va="bottom", color=FAINT)
    for row in range(12):
        box(ax, row, 4.5, 0.92, 0.5, COLOURS[row % 6], str(row), fontsize=10)
    number = 0
    for w, window in enumerate(micro_batches):
        order = permuted(np.arange(6 * w, 6 * w + 6), 12, 42, 0)
        for i, row in enumerate(order):
            box(ax, w * 6 + i, 3.35, 0.92, 0.5, COLOURS[row % 6], str(row), fontsize=10)
        x = w * 6.0
        for micro_batch in window:
            width, rank = 0.5 * len(micro_batch.rows) + 0.3, number % 2
            box(ax, x, 2.1, width, 0.6, LIGHT)
            for k, row in enumerate(micro_batch.rows):
                box(ax, x + 0.15 + 0.5 * k, 2.2, 0.48, 0.4, COLOURS[row % 6], str(row), fontsize=9)
            name = f"{micro_batch.epoch},{w},{micro_batch.index}"
            ax.text(x + width / 2, 2.05, name, ha="center", va="top", color=FAINT, fontsize=9)
            arrow(ax, (x + width / 2, 1.7), (x + width / 2, 1.25 - 0.55 * rank))
            box(
                ax,
                x,
                0.8 - 0.55 * rank,
                max(width, 1.4),
                0.42,
                INK if rank == 0 else FAINT,
                f"rank {rank}",
                fontsize=9,
            )
            x += max(width, 1.4) + 0.15
            number += 1
    ax.text(0, 0.1, "dealt to two ranks in turn; a name is epoch, window, number", va="top", color=FAINT)
    ax.set(xlim=(0, max(12, x)), ylim=(-0.3, 5.5))
    save(figure, "epoch_plan")


def strategies() -> None:
    """What each of four ranks holds."""
    figure, axes = canvas(6.2, 3)
    parts = ("weights", "gradients", "AdamW's moments")
    held = {
        "DDP": (1, "every rank holds all,\ngradients are\naveraged"),
        "FSDP2": (4, "every rank holds a\nfourth; a layer is\ngathered just before\nit computes"),
        "Megatron-FSDP": (4, "the same split, in\nflat buffers; filled\nwhole before it is\nsplit"),
    }
    for ax, (name, (share, text)) in zip(axes, held.items(), strict=True):
        for rank in range(4):
            for p in range(len(parts)):
                height = 0.9 / share
                box(ax, rank, 2.2 - p, 0.9, 0.9, LIGHT)
                box(ax, rank, 2.2 - p + (0.9 - height * (rank + 1) if share > 1 else 0), 0.9, height, COLOURS[p])
            ax.text(rank + 0.45, 3.2, f"rank {rank}", ha="center", color=FAINT, fontsize=9)
        for p, part in enumerate(parts):
            ax.text(-0.1, 2.65 - p, part, ha="right", va="center")
        ax.text(4.1, 1.65, text, va="center", color=FAINT)
        ax.set(xlim=(-2.1, 6.7), ylim=(0.1, 3.6))
        ax.set_title(name)
    save(figure, "strategies")


def elastic() -> None:
    """One sequence of micro-batches, whoever computes them."""
    figure, (ax,) = canvas(2.2)
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
                fontsize=9,
            )
        x += count
        if s < len(stretches) - 1:
            ax.plot([x - 0.04, x - 0.04], [0.2, 1.5], color=COLOURS[1], linewidth=1.6)
            ax.text(x - 0.04, 1.55, "resumed", ha="center", color=COLOURS[1], fontsize=9)
    ax.text(0, -0.05, "micro_batches_per_step=4: the next four are a step; colours are ranks", color=FAINT, fontsize=9)
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
    figure, (ax,) = canvas(3.2)
    for i, (name, (sign, exponent, mantissa, scale)) in enumerate(formats.items()):
        y = -i
        ax.text(-0.4, y + 0.35, name, ha="right", va="center")
        x = 0
        for count, colour in ((sign, FAINT), (exponent, COLOURS[1]), (mantissa, COLOURS[0])):
            box(ax, x, y, count, 0.72, colour, str(count) if count > 1 else "")
            x += count
        ax.text(x + 0.3, y + 0.35, scale, va="center", color=FAINT)
    for x, colour, word in (
        (0, FAINT, "sign"),
        (6, COLOURS[1], "exponent"),
        (17, COLOURS[0], "fraction: bits of each"),
    ):
        ax.text(x, -5.4, word, va="top", color=colour)
    ax.set(xlim=(-17, 33), ylim=(-6.2, 0.9))
    save(figure, "number_formats")


def context_parallel() -> None:
    """Tokens for heads, and back."""
    figure, (ax,) = canvas(2.6)

    def square(x: float, by_rows: bool, title: str, below: str) -> None:
        for row in range(4):
            for column in range(4):
                box(ax, x + column, 3 - row, 0.94, 0.94, COLOURS[(row if by_rows else column) // 2])
        ax.text(x + 1.95, 4.25, title, ha="center")
        ax.text(x + 1.95, -0.2, below, ha="center", va="top", color=FAINT, fontsize=9)

    square(0, True, "a stretch of tokens,\nall heads", "norms, linear\nmaps: token\nby token")
    square(8, False, "all tokens,\nsome heads", "attention: within\nsequences, wherever\nthey begin and end")
    square(16, True, "a stretch of tokens,\nall heads", "projection,\nMLP")
    for x in (4.3, 12.3):
        arrow(ax, (x, 2), (x + 3.3, 2))
        ax.text(x + 1.65, 2.2, "all-to-all", ha="center", color=FAINT, fontsize=9)
    ax.text(-0.3, 2, "tokens", rotation=90, va="center", ha="right", color=FAINT, fontsize=9)
    ax.text(20.4, 3.2, "rank 0", color=COLOURS[0])
    ax.text(20.4, 2.3, "rank 1", color=COLOURS[1])
    ax.set(xlim=(-1, 23.5), ylim=(-2.4, 5.7))
    save(figure, "context_parallel")


DRAWN = (packing, epoch_plan, strategies, elastic, number_formats, context_parallel)
if __name__ == "__main__":
    for draw in DRAWN:
        draw()
