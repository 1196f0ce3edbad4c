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
import torch
from curve_matrix_report import TITLES, TOLERANCE, Case, draw, judge, share, shown, table, write_json

from common.contract.running import RECIPE, TINY, TRAINERS, environment, marks, torchrun, with_table, write_table
from common.step_folder import read_weights
from convert import native_to_hf
from modeling_esm2 import Esm2Config
from plot_metrics import read_metrics


LAYOUTS = {"padded": "use_sequence_packing=false", "packed": "use_sequence_packing=true"}
# Longer and more than in TINY, so that padded batches have padding at every step.
SETTINGS = [*TINY, "dataset.max_seq_length=192", "dataset.micro_batch_size=3", "validation.every_n_steps=10"]
# What a run gets by its place in the matrix, and the option that says so.
TAKEN = {
    "use_sequence_packing": "--layouts",
    "dataset.num_workers": "--workers",
    "num_train_steps": "--steps",
    "checkpoint.ckpt_dir": "--keep",
    "logger.log_dir": "--keep",
}


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


def execute(case: Case, arguments: list[str], timeout_s: int) -> None:
    """Run one case as a user would. Raises RuntimeError with the command and the end of its stderr if it fails."""
    command = torchrun(case.ranks)
    command += [f"{case.trainer}.py", *arguments]
    process = subprocess.Popen(
        command, cwd=RECIPE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, message = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, at the latest half a minute later
        message = process.communicate()[1] + f"\nstopped because it took more than {timeout_s} s"
    if process.returncode:
        # What follows is torchrun's account of which rank failed, at length, and says nothing about why.
        message = re.split(r"\n.*failed \(exitcode", message)[0]
        raise RuntimeError(f"{shlex.join(command)}\n" + "\n".join(message.rstrip().splitlines()[-40:]))


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
            outcome = "  ".join(f"{TITLES[key]} {shown(row['differences'][key])}" for key in TOLERANCE)
        except (RuntimeError, ValueError, OSError) as error:
            row["failed"], outcome = True, f"failed: {error}"
        print(f"{number}/{len(cases)}  {case}: {time.time() - started:.0f} s  {outcome}", file=sys.stderr, flush=True)
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
