# SPDX-License-Identifier: Apache-2.0
"""Show that the trajectory does not depend on trainer, number of ranks, accumulation, batch layout or data workers.

python tests/curve_matrix.py                                          # 36 runs of a tiny model in FP32
python tests/curve_matrix.py --small                                  # 5 of them
python tests/curve_matrix.py --trainers train_fsdp2 --ranks 1 2 seed=7 dataset.mlm_probability=0.3
python tests/curve_matrix.py --json matrix.json --plot matrix.png --table matrix.md
python tests/curve_matrix.py --from matrix.json --plot matrix.png     # from numbers that are there, without a run

Every run is a command under torchrun, with as many accumulation passes as fill up `micro_batches_per_step`. Each is
compared with one process of train_ddp, padded batches, no workers, by its relative differences:

- loss, validation loss, gradient norm: the largest |a - b| / |a| over all logged steps;
- weights: the largest ||a - b|| / ||a|| over the tensors of the last checkpoint, named and cut as in the final model;
- key biases: the same over the biases of attention's keys, which have a tolerance of their own (`TOLERANCE`).

Exit code 1: a run failed, a difference is over its tolerance, or runs that differ in `--workers` only are not equal
to the bit in metrics and weights.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).parents[1]))
from common import quiet  # noqa: F401  # isort: skip
import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.contract.running import RECIPE, TINY, TRAINERS, environment, marks, torchrun, with_table, write_table
from common.step_folder import read_weights
from convert import native_to_hf
from modeling_esm2 import Esm2Config
from plot_metrics import COLOURS, FAINT, INK, MARKERS, STYLE, read_metrics


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
LAYOUTS = {"padded": "use_sequence_packing=false", "packed": "use_sequence_packing=true"}
# Longer and more than in TINY, so that padded batches have padding at every step.
SETTINGS = [*TINY, "dataset.max_seq_length=192", "dataset.micro_batch_size=3", "validation.every_n_steps=10"]
# What a run is told by its place in the matrix, and the option that says so.
TAKEN = {
    "use_sequence_packing": "--layouts",
    "dataset.num_workers": "--workers",
    "num_train_steps": "--steps",
    "checkpoint.ckpt_dir": "--keep",
    "logger.log_dir": "--keep",
}


class Case(NamedTuple):
    """One run's place in the matrix."""

    trainer: str
    ranks: int
    layout: str
    workers: int

    def __str__(self) -> str:
        return f"{self.trainer}, {count(self.ranks, 'rank')}, {self.layout}, {count(self.workers, 'worker')}"


REFERENCE = Case("train_ddp", 1, "padded", 0)
SMALL = [
    REFERENCE,
    *(Case(trainer, 2, "packed", 0) for trainer in TRAINERS),
    Case("train_fsdp2", 2, "packed", 2),
]


class Trajectory(NamedTuple):
    """What a run left: metrics, weights at its end, and what stands beside either in a `run.json`."""

    metrics: dict[str, list[dict]]
    weights: Mapping[str, torch.Tensor]
    facts: dict
    saved: dict


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def execute(case: Case, arguments: list[str], timeout_s: int) -> None:
    """Run one case as a user would. Raises RuntimeError with the command and the end of its stderr if it fails."""
    command = torchrun(case.ranks)
    command += [f"{case.trainer}.py", *arguments]
    process = subprocess.Popen(
        command, cwd=RECIPE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, told = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, at the latest half a minute later
        told = process.communicate()[1] + f"\nstopped because it took more than {timeout_s} s"
    if process.returncode:
        # What follows is torchrun's account of which rank failed, at length, and says nothing about why.
        told = re.split(r"\n.*failed \(exitcode", told)[0]
        raise RuntimeError(f"{shlex.join(command)}\n" + "\n".join(told.rstrip().splitlines()[-40:]))


def read_run(folder: Path) -> Trajectory:
    """Read a finished run. Raises ValueError if a metric is not a number."""
    metrics = read_metrics(folder / "metrics.jsonl")
    for line in metrics["train"] + metrics["validation"]:
        if line["loss"] is None or line.get("grad_norm", 0.0) is None:
            raise ValueError(f"step {line['step']}: loss or gradient norm is not a finite number.")
    step_folder = folder / f"step_{metrics['train'][-1]['step']}"
    saved, weights = json.loads((step_folder / "run.json").read_text()), read_weights(step_folder)
    if saved["model"]["layer_backend"] != "transformers":
        # Query, key and value apart, and no rows that only fill up the vocabulary.
        weights = native_to_hf(weights, Esm2Config(**saved["model"]))
    return Trajectory(metrics, dict(weights), json.loads((folder / "run.json").read_text()), saved)


def digest(run: Trajectory) -> str:
    """A hash of all that the trajectory decides, metrics and weights, to the bit."""
    found = hashlib.sha256()
    for line in run.metrics["train"]:
        found.update(
            repr([line[key] for key in ("step", "loss", "grad_norm", "learning_rate", "num_tokens")]).encode()
        )
    found.update(repr(run.metrics["validation"]).encode())
    for name in sorted(run.weights):
        found.update(name.encode() + run.weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def differences(reference: Trajectory, run: Trajectory) -> dict:
    """The largest relative difference in each of `TOLERANCE`, and the largest of any weight.

    Raises ValueError where the two logged different steps or hold different tensors.
    """
    found = {}
    for name, kind, key in (
        ("loss", "train", "loss"),
        ("validation_loss", "validation", "loss"),
        ("grad_norm", "train", "grad_norm"),
    ):
        a, b = reference.metrics[kind], run.metrics[kind]
        if [line["step"] for line in a] != [line["step"] for line in b]:
            raise ValueError(f"it logged {kind} at other steps than the reference.")
        found[name] = max((share(x[key] - y[key], x[key]) for x, y in zip(a, b, strict=True)), default=None)
    if {k: v.shape for k, v in reference.weights.items()} != {k: v.shape for k, v in run.weights.items()}:
        raise ValueError("its weights have other names or shapes than the reference's.")
    of_tensor, of_element = {}, {}
    for name, a in reference.weights.items():
        a, b = a.double(), run.weights[name].double()
        of_tensor[name] = share(float((a - b).norm()), float(a.norm()))
        of_element[name] = float((a - b).abs().max())
    key_biases = [name for name in of_tensor if name.endswith("attention.self.key.bias")]
    for group, names in (("weights", of_tensor.keys() - key_biases), ("key_bias", key_biases)):
        found[f"{group}_at"] = max(sorted(names), key=of_tensor.get)
        found[group] = of_tensor[found[f"{group}_at"]]
    # Channel c of a head turns together with channel c + D/2, the first pair fastest.
    shape = (reference.saved["model"]["num_attention_heads"], 2, -1)
    by_pair = [(run.weights[name] - reference.weights[name]).abs().view(shape).amax((0, 1)) for name in key_biases]
    found["key_bias_by_pair"] = torch.stack(by_pair).amax(0).tolist()
    found["element"] = max(of_element.values())
    found["element_at"] = max(of_element, key=of_element.get)
    return found


def share(difference: float, of: float) -> float:
    """|difference| / |of|, and 0 where both are 0."""
    return abs(difference) / max(abs(of), sys.float_info.min)


def run_matrix(
    cases: list[Case], folder: Path, steps: int, overrides: list[str], timeout_s: int
) -> tuple[list[dict], Trajectory]:
    """Run all cases, one after the other; each one's differences and curves, and the reference.

    Only a reference that fails ends it: there is nothing to compare the others with.
    """
    rows, reference = [], None
    for number, case in enumerate(cases, 1):
        place, started = folder / f"{number:02}_{case.trainer}_{case.ranks}_{case.layout}_{case.workers}", time.time()
        own = [f"num_train_steps={steps}", LAYOUTS[case.layout], f"dataset.num_workers={case.workers}"]
        own += [f"checkpoint.ckpt_dir={place}", f"logger.log_dir={place}"]
        row = {**case._asdict(), "failed": False}
        try:
            execute(case, [*SETTINGS, *own, *overrides], timeout_s)
            run = read_run(place)
            reference = reference or run
            row |= {"passes": run.saved["config"]["micro_batches_per_step"] // case.ranks, "sha256": digest(run)}
            row |= {"differences": differences(reference, run), "curves": curves(run)}
            told = "  ".join(f"{TITLES[key]} {shown(row['differences'][key])}" for key in TOLERANCE)
        except (RuntimeError, ValueError, OSError) as error:
            row["failed"], told = True, f"failed: {error}"
        print(f"{number}/{len(cases)}  {case}: {time.time() - started:.0f} s  {told}", file=sys.stderr, flush=True)
        if reference is None:
            sys.exit(f"{case} is what the others are compared with, and it failed.")
        rows.append(row)
    return rows, reference


def curves(run: Trajectory) -> dict[str, list]:
    """The columns that are drawn."""
    train, validation = run.metrics["train"], run.metrics["validation"]
    return {
        **{key: [line[key] for line in train] for key in ("step", "loss", "grad_norm")},
        **{f"validation_{key}": [line[key] for line in validation] for key in ("step", "loss")},
    }


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
            told = "; ".join(row_name(row) for row in rows)
            complaints.append(f"not equal to the bit, although they differ in workers only: {told}.")
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


def no_paths(override: str) -> str:
    """An override with absolute paths cut to the last name: where files lay is nobody's business."""
    return re.sub(r"(^|[=\[,'\"\s])/[^,'\"\]\s]*/", r"\1", override)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; `key=value` may stand anywhere."""
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, help="default: all three")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1 2 4")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument("--workers", nargs="+", type=int, help="data workers a rank; default: 0 2")
    parser.add_argument("--small", action="store_true", help="five runs instead of the product of these")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="for one run; default: 1800")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what the runs write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw all curves")
    parser.add_argument(
        "--table", type=Path, metavar="FILE.md",
        help="write the table, in a file that exists between the lines " + " and ".join(marks("curve_matrix")),
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="run nothing, take these numbers"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE.md", help="fail if the table in it is not the one of --from"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, after the matrix's own")

    # argparse would take those that follow `--ranks 1 2` for ranks.
    is_override = re.compile(r"\+{0,2}[\w.]+=")
    overrides = [argument for argument in arguments if is_override.match(argument)]
    found = parser.parse_args([argument for argument in arguments if not is_override.match(argument)])
    if found.overrides:
        parser.error(f"{found.overrides[0]} is neither an option nor key=value.")
    for override in overrides:
        if option := TAKEN.get(override.partition("=")[0].lstrip("+")):
            parser.error(f"{override}: the matrix sets that itself; see {option}.")
    chosen = [name for name in ("trainers", "ranks", "layouts", "workers") if getattr(found, name)]
    if found.small and chosen:
        parser.error(f"--small says which runs there are; leave it or --{chosen[0]} out.")
    if found.source and (found.small or found.keep or chosen or overrides):
        parser.error("--from runs nothing; leave it or what belongs to runs out.")
    if found.check and not found.source:
        parser.error("--check needs the numbers: --from FILE.json.")
    if found.keep and found.keep.exists() and any(found.keep.iterdir()):
        parser.error(f"--keep {found.keep} is not empty; the runs would go on from what is there.")
    found.overrides = overrides
    found.command = ["python", "tests/curve_matrix.py", *(["--small"] if found.small else [])]
    for name in chosen:
        found.command += [f"--{name}", *map(str, getattr(found, name))]
    found.command += [f"--steps={found.steps}"] if found.steps != 50 else []
    found.command += map(no_paths, overrides)
    return found


def measure(arguments: argparse.Namespace) -> dict:
    """Run the matrix that the command line asks for."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one rank would take all cores, and sums depend on the threads
    cases = SMALL
    if not arguments.small:
        places = product(
            arguments.trainers or TRAINERS, arguments.ranks or (1, 2, 4), arguments.layouts or LAYOUTS,
            arguments.workers or (0, 2),
        )  # fmt: skip
        cases = list(dict.fromkeys((REFERENCE, *(Case(*place) for place in places))))
    with tempfile.TemporaryDirectory(prefix="curve_matrix_") as scratch:
        folder = (arguments.keep or Path(scratch)).resolve()
        rows, reference = run_matrix(cases, folder, arguments.steps, arguments.overrides, arguments.timeout)
    facts = reference.facts
    settings = [*SETTINGS, f"num_train_steps={arguments.steps}", *map(no_paths, arguments.overrides)]
    machine = {"name": facts["device"], "cores": os.cpu_count(), "threads_per_rank": facts["threads_per_rank"]}
    return {
        "command": shlex.join(arguments.command),
        "steps": arguments.steps,
        "settings": list({setting.partition("=")[0]: setting for setting in settings}.values()),  # the last wins
        "tolerance": TOLERANCE,
        "machine": machine,
        **{key: facts[key] for key in ("versions", "code_sha256", "git")},
        "runs": rows,
    }


def main(arguments: list[str]) -> int:
    """Run or read, report, and judge."""
    arguments = read_arguments(arguments)
    result = json.loads(arguments.source.read_text()) if arguments.source else measure(arguments)
    new = table(result)
    if not arguments.check:
        print(new)
    if arguments.json:
        write_json(result, arguments.json)
    if arguments.plot:
        draw(result, arguments.plot)
    complaints = judge(result)
    try:
        if arguments.table:
            write_table(arguments.table, "curve_matrix", new)
        if arguments.check and (text := arguments.check.read_text()) != with_table(text, "curve_matrix", new):
            complaints.append(f"{arguments.check}: its table is not the one of {arguments.source}; write it: --table.")
    except ValueError as error:
        complaints.append(f"{arguments.table or arguments.check}: {error}")
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
