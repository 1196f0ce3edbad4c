# SPDX-License-Identifier: Apache-2.0
"""Speed of 1 and of 2 ranks on this machine, one thread each, with each of the three trainers.

python ci/benchmarks/scaling_ranks.py                    # five minutes; writes docs: JSON, table of scaling.md
python ci/benchmarks/scaling_ranks.py --data my.fasta --output mine.json precision=fp32
python ci/benchmarks/scaling_ranks.py --quick --output quick.json        # a tiny model and one round: a minute
python ci/benchmarks/scaling_ranks.py --from docs/results/scaling_ranks.json --check docs/scaling.md

Every run is a trainer under torchrun, as a user starts it. 1 and 2 ranks take turns, and train on the same
micro-batches: their losses and their numbers of tokens are compared. key=value goes to all runs.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path


from subject import RECIPE, ROOT, SUBJECT, suffix  # isort: skip (it finds the recipe)
from common import quiet  # noqa: F401  # isort: skip
from command_line import (
    Failed,
    add_files,
    check_files,
    first_error,
    parse_with_overrides,
    positive,
    refuse,
    run_or_read,
)
from tqdm import tqdm

from common.contract.running import TRAINERS, environment, torchrun
from common.run_facts import cpu_name, versions


NAME = f"scaling_ranks{suffix(RECIPE.name)}"
OUTPUT = ROOT / "docs" / "results" / f"{NAME}.json"
RANKS = {"one_rank": 1, "two_ranks": 2}
GRACE_S = 45  # torchrun's is 30
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative, of the loss: the same sums in another order
# The benchmark sets these itself; a run that differs in them would compare something else.
TAKEN = (
    "num_train_steps",
    "micro_batches_per_step",
    "logger.",
    "checkpoint.",
    "validation.",
    "dataset.load_dataset_kwargs",
)


def arguments_of(asked: argparse.Namespace) -> list[str]:
    """What all runs are given."""
    overrides = [
        f"model_tag={asked.model_tag}", f"num_train_steps={asked.warmup_steps + asked.steps}",
        f"micro_batches_per_step={asked.micro_batches_per_step}", "dataset.micro_batch_size=null",
        f"dataset.token_micro_batch_size={asked.pack_tokens}", "dataset.num_workers=0", "adamw_kwargs.lr=4e-4",
        "validation.load_dataset_kwargs=null", "logger.frequency=1", "precision=bf16",
    ]  # fmt: skip
    if asked.data:
        kind = "parquet" if asked.data.suffix == ".parquet" else "fasta"
        overrides += [f"dataset.load_dataset_kwargs.{k}={v}" for k, v in
                      (("path", kind), ("data_files", asked.data.resolve()))]  # fmt: skip
    return overrides + asked.overrides


class TookTooLong(Failed):
    """A run that was ended."""


def train(
    trainer: str, num_ranks: int, folder: Path, overrides: list[str], timeout_s: float, limit_gib: float | None = None
) -> list[dict]:
    """One run; the lines of its metrics. Each process may have `limit_gib` of data. Raises Failed, TookTooLong."""
    command = [*torchrun(num_ranks), f"{trainer}.py", f"logger.log_dir={folder}", *overrides]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    what = f"{trainer} on {num_ranks} rank{'s' * (num_ranks > 1)}"
    limit = None
    if limit_gib is not None:
        size = int(limit_gib * 2**30)

        def limit() -> None:  # inherited by every process of the run, for itself
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    with subprocess.Popen(
        command, cwd=RECIPE, env=environment() | threads, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=limit,
    ) as process:  # fmt: skip
        try:
            _, stderr = process.communicate(timeout=timeout_s)
        except BaseException as stopped:
            process.terminate()  # torchrun ends its ranks, and after a while kills those that do not heed it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=GRACE_S)
            process.kill()
            if isinstance(stopped, subprocess.TimeoutExpired):
                advice = "give fewer --steps, or a longer --timeout."
                raise TookTooLong(f"{what} took longer than {timeout_s:.0f} s; {advice}") from None
            raise
    code = process.returncode
    if code:
        raise Failed(f"{what} failed with exit code {code}: {first_error(stderr)}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def tokens_per_second(lines: list[dict], warmup_steps: int) -> float:
    """Real tokens/s over the lines after the warm-up."""
    before, counted = lines[warmup_steps - 1], lines[warmup_steps:]
    return (counted[-1]["num_tokens"] - before["num_tokens"]) / sum(line["step_time_s"] for line in counted)


def loss_difference(one: list[dict], two: list[dict], tolerance: float, trainer: str) -> float:
    """The largest relative one. Raises Failed where the runs did not train on the same, and so cannot be compared."""
    if [line["num_tokens"] for line in one] != [line["num_tokens"] for line in two]:
        raise Failed(f"{trainer}: 1 and 2 ranks did not read the same tokens.")
    found = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, two, strict=True))
    if not found <= tolerance:
        raise Failed(f"{trainer}: losses of 1 and 2 ranks differ by a relative {found:.1e}, more than {tolerance}.")
    return found


def measure(asked: argparse.Namespace) -> dict:
    """All rounds. Raises Failed."""
    overrides, trainers, differences = arguments_of(asked), {name: [] for name in asked.trainers}, [0.0]
    precision = next(o.partition("=")[2] for o in reversed(overrides) if o.startswith("precision="))
    turns = asked.rounds * len(trainers) * len(RANKS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=turns, unit="run", disable=None, dynamic_ncols=True, file=sys.stderr) as bar,
    ):
        for turn in range(asked.rounds):
            for trainer, rounds in trainers.items():
                lines = {}
                # There and back, so that a drift of the machine favours neither.
                for key in RANKS if turn % 2 == 0 else reversed(RANKS):
                    bar.set_postfix_str(f"{trainer}, {RANKS[key]} of 2 ranks")
                    folder = Path(scratch) / f"{trainer}_{key}_{turn}"
                    lines[key] = train(trainer, RANKS[key], folder, overrides, asked.timeout)
                    bar.update()
                differences.append(loss_difference(*(lines[k] for k in RANKS), TOLERANCE[precision], trainer))
                rounds.append({key: round(tokens_per_second(lines[key], asked.warmup_steps), 1) for key in RANKS})
                one, two = (rounds[-1][key] for key in RANKS)
                bar.write(
                    f"round {turn + 1}: {trainer}: {one:,.0f} and {two:,.0f} tokens/s, {two / one:.2f}", sys.stderr
                )
    names = ("model_tag", "rounds", "steps", "warmup_steps", "micro_batches_per_step", "pack_tokens")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        "settings": {name: getattr(asked, name) for name in names}
        | {"precision": precision, "data": asked.data.name if asked.data else "bundled", "overrides": asked.overrides},
        "loss_difference": max(differences),
        "trainers": trainers,
    }


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line; `key=value` may stand anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--model-tag", default=SUBJECT.tag(SUBJECT.usual))
    parser.add_argument("--data", type=Path, metavar="FILE", help="FASTA or parquet; default: the bundled sample")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=5, help="that count, in each run; default: 5")
    parser.add_argument("--warmup-steps", type=positive, default=2, help="that do not count; default: 2")
    parser.add_argument("--micro-batches-per-step", type=positive, default=2, help="over all ranks; default: 2")
    parser.add_argument("--pack-tokens", type=positive, default=2048, help="of a micro-batch; default: 2048")
    parser.add_argument("--timeout", type=positive, default=600, help="seconds a run may take; default: 600")
    parser.add_argument("--quick", action="store_true", help="the tiny model, one round, few steps")
    add_files(parser, OUTPUT)
    found = parse_with_overrides(parser, arguments)
    check_files(parser, found, runs=False)
    refuse(parser, found.overrides, TAKEN)
    for override in found.overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "precision" and value not in TOLERANCE:
            parser.error(f"{override}: fp32 or bf16, so that 1 and 2 ranks do not choose differently.")
    if found.micro_batches_per_step % 2:
        parser.error(f"--micro-batches-per-step {found.micro_batches_per_step} must be even, for two ranks.")
    if found.data and not found.data.is_file():
        parser.error(f"--data {found.data}: no such file.")
    if found.quick:
        found.model_tag = SUBJECT.tag(SUBJECT.quick)
        found.rounds, found.steps, found.warmup_steps, found.pack_tokens = 1, 2, 1, 1024
    elif not found.source and not found.output:
        found.output, found.table = OUTPUT, found.table or ROOT / "docs" / "scaling.md"
    return found


def main(arguments: list[str]) -> int:
    """Run or read, then print, write or check."""
    from scaling_report import ranks_table

    asked = read_arguments(arguments)
    return run_or_read(asked, measure, NAME, ranks_table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
