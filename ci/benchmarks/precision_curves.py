# SPDX-License-Identifier: Apache-2.0
"""How near training in few bits stays to FP32: curves of the laptop configuration in each format that runs here.

python ci/benchmarks/precision_curves.py     # ten minutes on two cores; writes docs: JSON, table, picture
python ci/benchmarks/precision_curves.py --steps 300 --output longer.json --plot longer.png seed=7
python ci/benchmarks/precision_curves.py --quick --output quick.json         # four steps
python ci/benchmarks/precision_curves.py --from docs/results/precision_curves.json --check docs/exactness.md

Every run is train_ddp.py with L0_sanity, on the same micro-batches, emulated where this machine lacks a format; one
more has another seed, to show what chance alone does. key=value goes to all runs.
"""

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean


from subject import RECIPE, ROOT, suffix  # isort: skip (it finds the recipe)
from scaling_ranks import Failed, cpu_name, train, versions  # isort: skip
from command_line import add_files, check_files, parse_with_overrides, positive, refuse, run_or_read
from tqdm import tqdm

from tokens.formats import RECIPES


NAME = f"precision_curves{suffix(RECIPE.name)}"
OUTPUT = ROOT / "docs" / "results" / f"{NAME}.json"
PAGE, PICTURE = ROOT / "docs" / "exactness.md", ROOT / "docs" / "images" / f"{NAME}.png"
TAKEN = ("num_train_steps", "precision", "fp8_", "fp4_", "logger.", "checkpoint.", "validation.", "layer_backend")
FIRST, CHANCE, SMOOTH, RATE = "FP32", "FP32, another seed", 10, 5e-4
FORMATS = {FIRST: ["precision=fp32"], CHANCE: ["precision=fp32"], "BF16": ["precision=bf16"]} | {
    name: ["precision=bf16", "fp8_config.enabled=true", f"fp8_config.fp8_recipe={name}", "layer_backend=torch"]
    for name, needs in RECIPES.items()
    if needs.torchao
}


def measure(asked: argparse.Namespace) -> dict:
    """All runs. Raises Failed."""
    common = [
        f"num_train_steps={asked.steps}", "micro_batches_per_step=2", "logger.frequency=1", f"adamw_kwargs.lr={RATE}",
        "validation.load_dataset_kwargs=null", *asked.overrides,
    ]  # fmt: skip
    seed = next((int(o.partition("=")[2]) for o in reversed(asked.overrides) if o.startswith("seed=")), 42)
    losses, tokens = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        bar = tqdm(FORMATS.items(), unit="run", disable=None, dynamic_ncols=True, file=sys.stderr)
        for number, (name, options) in enumerate(bar):
            given = [*common, *options, *([f"seed={seed + 1}"] if name == CHANCE else [])]
            lines = train("train_ddp", 1, Path(scratch) / str(number), given, asked.timeout)
            losses[name] = [line["loss"] for line in lines]
            if any(loss is None for loss in losses[name]):
                raise Failed(f"{name}: the loss became no number.")
            if name != CHANCE:
                tokens.append([line["num_tokens"] for line in lines])
            bar.write(f"{name}: {losses[name][-1]:.4f}", sys.stderr)
    if any(counted != tokens[0] for counted in tokens):
        raise Failed("the runs did not read the same tokens.")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "versions": versions(),
        "settings": {"steps": asked.steps, "seed": seed, "overrides": asked.overrides},
        "num_tokens": tokens[0][-1],
        "losses": losses,
    }


def smoothed(losses: list[float]) -> list[float]:
    """Means over `SMOOTH` steps."""
    width = min(SMOOTH, len(losses))
    return [fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


def table(numbers: dict) -> str:
    """A row for each format."""
    first = smoothed(numbers["losses"][FIRST])
    lines = [
        "| format | loss at the end | from FP32's | largest difference of the curves | of single steps |",
        "|---|---|---|---|---|",
    ]
    for name, losses in numbers["losses"].items():
        means = smoothed(losses)
        apart = max(abs(a - b) / b for a, b in zip(means, first, strict=True))
        single = max(abs(a - b) / b for a, b in zip(losses, numbers["losses"][FIRST], strict=True))
        ours = (
            "| | |"
            if name == FIRST
            else f"| {(means[-1] - first[-1]) / first[-1]:+.2%} | {apart:.2%} | {single:.2%} |"
        )
        lines.append(f"| {name} | {means[-1]:.4f} {ours}" + " |" * (name == FIRST))
    asked = numbers["settings"]
    overrides = "".join(f" {override}" for override in asked["overrides"])
    lines += [
        "",
        f"`L0_sanity`, {asked['steps']} steps of two micro-batches, {numbers['num_tokens']:,} tokens, learning rate "
        f"{RATE}, seed {asked['seed']}{overrides}; losses are means of {SMOOTH} steps but in the last column. "
        f"{numbers['machine']}, {numbers['date']}, torch {numbers['versions']['torch']}, "
        f"torchao {numbers['versions']['torchao']}.",
    ]
    return "\n".join(lines)


def draw(numbers: dict, out: Path) -> None:
    """The curves, and below them how far each is from FP32's."""
    import matplotlib
    from matplotlib.figure import Figure

    from plot_metrics import COLOURS, INK, STYLE

    first = smoothed(numbers["losses"][FIRST])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 6), dpi=150, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for i, (name, losses) in enumerate(numbers["losses"].items()):
            means, colour = smoothed(losses), COLOURS[i % len(COLOURS)]
            steps = range(SMOOTH, SMOOTH + len(means))
            style = {"color": colour, "linewidth": 3.4 - 0.5 * i, "linestyle": ":" if name == CHANCE else "-"}
            above.plot(steps, means, label=name, **style)
            if name != FIRST:
                below.plot(steps, [100 * (a - b) / b for a, b in zip(means, first, strict=True)], **style)
        below.axhline(0, color=INK, linewidth=0.8)
        above.set(title=f"Masked-LM loss, nats, mean of {SMOOTH} steps")
        below.set(title="Difference from FP32, %", xlabel="Step")
        above.legend()
        figure.savefig(out)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line; `key=value` may stand anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=120)
    parser.add_argument("--timeout", type=positive, default=3600, help="seconds a run may take; default: 3600")
    parser.add_argument("--quick", action="store_true", help="four steps")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    add_files(parser, OUTPUT)
    found = parse_with_overrides(parser, arguments)
    check_files(parser, found, runs=False)
    refuse(parser, found.overrides, TAKEN)
    if found.quick:
        found.steps = 4
    elif not found.source and not found.output:
        found.output, found.table, found.plot = OUTPUT, found.table or PAGE, found.plot or PICTURE
    return found


def main(arguments: list[str]) -> int:
    """Run or read, then print, write, draw or check."""
    asked = read_arguments(arguments)

    def drawn(numbers: dict) -> str:
        if asked.plot:
            draw(numbers, asked.plot)
        return table(numbers)

    return run_or_read(asked, measure, NAME, drawn)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
