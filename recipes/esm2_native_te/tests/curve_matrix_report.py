# SPDX-License-Identifier: Apache-2.0
"""What `curve_matrix.py` says of its runs: judgement, table, picture and JSON."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.contract.running import TRAINERS
from plot_metrics import COLOURS, FAINT, INK, MARKERS, STYLE


TOLERANCE = {
    "loss": 1e-5,
    "validation_loss": 1e-5,
    "grad_norm": 1e-5,
    "weights": 1e-5,
    # A softmax does not see what is added to all its scores. So a key bias acts only through the rotation of the keys,
    # and in channels that turn slowly its gradient is a small remainder of large terms, of which rounding is a hundred
    # times larger a share than elsewhere. AdamW divides a gradient by its size, so steps of full length carry that.
    "key_bias": 1e-3,
}
TITLES = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm",
    "weights": "weights",
    "key_bias": "key biases",
}


class Case(NamedTuple):
    """One run's place in the matrix."""

    trainer: str
    ranks: int
    layout: str
    workers: int

    def __str__(self) -> str:
        return f"{self.trainer}, {count(self.ranks, 'rank')}, {self.layout}, {count(self.workers, 'worker')}"


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def share(difference: float, of: float) -> float:
    """|difference| / |of|, and 0 where both are 0."""
    return abs(difference) / max(abs(of), sys.float_info.min)


def row_name(row: dict) -> str:
    """The case of a row, in words."""
    return str(Case(*(row[field] for field in Case._fields)))


def by_layout(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows that differ in workers only, together."""
    groups = {}
    for row in rows:
        groups.setdefault((row["trainer"], row["ranks"], row["layout"]), []).append(row)
    return groups


def judge(result: dict) -> list[str]:
    """What speaks against the claim, a sentence each."""
    complaints = []
    for row in result["runs"]:
        if row["failed"]:
            complaints.append(f"{row_name(row)}: it failed.")
            continue
        for key, limit in TOLERANCE.items():
            found = row["differences"][key]
            if found is not None and not found <= limit:
                at = f" ({row['differences'][f'{key}_at']})" if f"{key}_at" in row["differences"] else ""
                complaints.append(f"{row_name(row)}: {TITLES[key]} differ by {found:.1e}, over {limit:.0e}{at}.")
    for rows in by_layout(result["runs"]).values():
        if len({row["sha256"] for row in rows if not row["failed"]}) > 1:
            names = "; ".join(row_name(row) for row in rows)
            complaints.append(f"not equal to the bit, although they differ in workers only: {names}.")
    return complaints


def shown(value: float | None) -> str:
    """A difference as text."""
    return "–" if value is None else f"{value:.1e}" if value else "0"


def table(result: dict) -> str:
    """Markdown: a row for each trainer, number of ranks and layout, with the largest over its workers; the facts."""
    head = ["trainer", "ranks", "passes", "batches", *TITLES.values(), "any weight, absolute", "workers"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (trainer, ranks, layout), rows in by_layout(result["runs"]).items():
        done = [row for row in rows if not row["failed"]]
        values = []
        for key in (*TOLERANCE, "element"):
            found = [row["differences"][key] for row in done if row["differences"][key] is not None]
            text = shown(max(found, default=None))
            values.append(f"**{text}**" if found and max(found) > TOLERANCE.get(key, float("inf")) else text)
        workers = " and ".join(str(row["workers"]) for row in rows)
        if len(rows) > 1:
            workers += ": equal" if len({row["sha256"] for row in done}) == 1 else ": **not equal**"
        workers += "".join(f"; {row['workers']} **failed**" for row in rows if row["failed"])
        passes = str(done[0]["passes"]) if done else "–"
        lines.append(f"| `{trainer}` | {ranks} | {passes} | {layout} | {' | '.join(values)} | {workers} |")
    limits = [f"{limit:.0e}" for limit in TOLERANCE.values()]
    lines.append(f"| *tolerance* | | | | {' | '.join(limits)} | | |")
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    lines += [
        "",
        f"{count(len(result['runs']), 'run')} of {count(result['steps'], 'step')}, each compared with that of the "
        f"first row (0 workers): `{result['command']}`. {machine['name']}, {count(machine['cores'], 'core')}, "
        f"{count(machine['threads_per_rank'], 'thread')} a rank; {packages}.",
    ]
    by_pair = [row["differences"]["key_bias_by_pair"] for row in result["runs"] if not row["failed"]]
    lines += [
        "",
        "Largest difference of a single key bias over all runs, by how fast its channel turns, fastest first: "
        f"{', '.join(shown(max(pair)) for pair in zip(*by_pair, strict=True))}.",
    ]
    return "\n".join(lines)


def draw(result: dict, out: Path) -> None:
    """Draw loss and gradient norm of all runs over each other and, below, how far they are from the reference."""
    rows = [row for row in result["runs"] if not row["failed"]]
    reference, others = rows[0]["curves"], {row["sha256"]: row for row in reversed(rows[1:])}.values()
    trainers = [name for name in TRAINERS if any(row["trainer"] == name for row in rows)]
    ranks = sorted({row["ranks"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.6), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        title = f"{count(len(rows), 'run')}  ·  FP32  ·  reference: {row_name(rows[0])}"
        figure.suptitle(title, x=0.015, ha="left", fontsize=12.5)
        for i, (key, name) in enumerate((("loss", "Masked-LM loss, nats"), ("grad_norm", "Gradient norm"))):
            above, below = figure.add_subplot(2, 2, 1 + i), figure.add_subplot(2, 2, 3 + i)
            for j, trainer in enumerate(trainers):
                for row in rows:
                    if row["trainer"] == trainer:
                        style = {"color": COLOURS[j], "linewidth": 7 - 2.7 * j}  # the last lies on top
                        above.plot(row["curves"]["step"], row["curves"][key], **style)
            for row in others:
                colour = COLOURS[trainers.index(row["trainer"])]
                away = [share(a - b, a) for a, b in zip(reference[key], row["curves"][key], strict=True)]
                style = {"color": colour, "markerfacecolor": colour if row["layout"] == "padded" else "none"}
                marker = MARKERS[ranks.index(row["ranks"])]
                below.plot(reference["step"], away, marker, markersize=4, alpha=0.7, clip_on=False, **style)
            below.axhline(TOLERANCE[key], color=INK, linewidth=1.2, linestyle="--")
            below.text(reference["step"][-1], 1.2 * TOLERANCE[key], "tolerance", ha="right")
            # Linear from 1e-9 down, so that equal values have a place.
            below.set_yscale("symlog", linthresh=1e-9, linscale=0.4)
            below.set_ylim(0, max(below.get_ylim()[1], 10 * TOLERANCE[key]))
            above.set(title=name, xlabel="Step")
            for ax in (above, below):
                ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
            below.set(title=f"Relative difference in {TITLES[key]}", xlabel="Step")
        above, below = figure.axes[:2]
        above.plot(
            reference["validation_step"], reference["validation_loss"], "o", color=INK, markerfacecolor="none",
            markersize=8, label="validation",
        )  # fmt: skip
        handles = [Line2D([], [], color=COLOURS[j], linewidth=3, label=name) for j, name in enumerate(trainers)]
        above.legend(handles=[*handles, *above.get_legend_handles_labels()[0]])
        style = {"color": FAINT, "linestyle": "none"}
        handles = [Line2D([], [], marker=MARKERS[j], label=count(n, "rank"), **style) for j, n in enumerate(ranks)]
        handles += [
            Line2D([], [], marker="o", label="padded", **style),
            Line2D([], [], marker="o", markerfacecolor="none", label="packed", **style),
        ]
        tight = {"fontsize": 8.5, "handletextpad": 0, "columnspacing": 0.7}
        below.legend(handles=handles, ncols=len(handles), loc="upper left", **tight)
        figure.savefig(out)


def write_json(result: dict, out: Path) -> None:
    """Write the result, one line a run."""
    runs = ",\n".join("  " + json.dumps(row) for row in result["runs"])
    rest = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    out.write_text(f'{rest[:-2]},\n "runs": [\n{runs}\n ]\n}}\n')
