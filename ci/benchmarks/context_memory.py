# SPDX-License-Identifier: Apache-2.0
"""Memory of one long sequence shared by 1, 2 and 4 ranks (cp_size), with FSDP2.

python ci/benchmarks/context_memory.py --limit-gib 3     # ten minutes; writes docs: JSON, table of scaling.md
python ci/benchmarks/context_memory.py --length 65536 --output longer.json model_tag=esm2_t4_1M
python ci/benchmarks/context_memory.py --quick --output quick.json       # a tiny model and 2,048 residues: a minute
python ci/benchmarks/context_memory.py --from docs/results/context_memory.json --check docs/scaling.md

Every run is train_fsdp2.py under torchrun, as a user starts it, on one made-up protein, with one thread a rank. All
must come to the same loss. key=value goes to all runs.

With --limit-gib each runs under a hard limit of what a process may allocate (RLIMIT_DATA; not libraries' code, which
processes share), to show which cp_size trains where fewer ranks cannot. One that fails there is run again without the
limit, for its memory and its loss, and to show that it was the limit.
"""

import argparse
import math
import random
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path


from subject import RECIPE, ROOT, SUBJECT, suffix  # isort: skip (it finds the recipe)
from scaling_ranks import TOLERANCE, Failed, TookTooLong, cpu_name, train, versions  # isort: skip
from command_line import add_files, check_files, parse_with_overrides, positive, refuse, run_or_read
from tqdm import tqdm


from build_model import model_config  # isort: skip
from tokens.backends import cpp_available  # isort: skip


NAME = f"context_memory{suffix(RECIPE.name)}"
OUTPUT = ROOT / "docs" / "results" / f"{NAME}.json"
TAKEN = ("num_train_steps", "micro_batches_per_step", "cp_size", "logger.", "checkpoint.", "validation.", "dataset.")
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def measure(asked: argparse.Namespace) -> dict:
    """All runs. Raises Failed."""
    overrides = [
        f"model_tag={asked.model_tag}", f"num_train_steps={asked.steps}", "micro_batches_per_step=1",
        "use_sequence_packing=true",
        "dataset.micro_batch_size=null", f"dataset.token_micro_batch_size={asked.length}",
        f"dataset.max_seq_length={asked.length}", "dataset.num_workers=0", "dataset.load_dataset_kwargs.path=fasta",
        "validation.load_dataset_kwargs=null", "logger.frequency=1", "precision=bf16", *asked.overrides,
    ]  # fmt: skip
    precision = next(o.partition("=")[2] for o in reversed(overrides) if o.startswith("precision="))
    runs = []
    cpp_available(model_config(asked.model_tag, "auto").head_dim)  # compiles, and may take more than a rank gets
    with tempfile.TemporaryDirectory() as scratch:
        protein = Path(scratch) / "protein.fasta"
        protein.write_text(">made_up\n" + "".join(random.Random(0).choices(RESIDUES, k=asked.length - 2)) + "\n")
        for cp_size in tqdm(asked.cp_sizes, unit="run", disable=None, dynamic_ncols=True, file=sys.stderr):
            given = [*overrides, f"cp_size={cp_size}", f"dataset.load_dataset_kwargs.data_files={protein}"]
            folder, in_limit, limited = Path(scratch) / f"cp_{cp_size}", None, {}
            if asked.limit_gib is not None:
                # A process that gets no memory can die in many ways. Whether it was the limit, the run without tells.
                limited = {"trains_in_limit": True}
                try:
                    in_limit = train("train_fsdp2", cp_size, folder, given, asked.timeout, asked.limit_gib)
                except TookTooLong:
                    raise
                except Failed as error:
                    limited = {"trains_in_limit": False, "reason": str(error)[:300].replace(scratch, "")}
                    tqdm.write(f"does not train in {asked.limit_gib:g} GiB a rank: {error}", sys.stderr)
            lines = in_limit or train("train_fsdp2", cp_size, folder.with_suffix(".free"), given, asked.timeout)
            losses = [line["loss"] for line in lines]
            for loss, first in zip(losses, runs[0]["losses"] if runs else losses, strict=True):
                if not abs(loss - first) <= TOLERANCE[precision] * abs(first):
                    raise Failed(f"cp_size={cp_size} has the loss {loss}, and cp_size={asked.cp_sizes[0]} {first}.")
            # The first step also compiles and takes memory for the first time.
            seconds = [line["step_time_s"] for line in lines[1:]]
            memory = lines[-1]["peak_memory_gib"]
            runs.append({"cp_size": cp_size, "peak_memory_gib_per_rank": round(memory, 3), "losses": losses,
                         "step_time_s": round(sum(seconds) / len(seconds), 2),
                         **limited})  # fmt: skip
            tqdm.write(f"cp_size={cp_size}: {memory:.2f} GiB a rank, loss {losses[-1]:.4f}", sys.stderr)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "versions": versions(),
        "settings": {name: getattr(asked, name) for name in ("model_tag", "length", "steps", "overrides")}
        | {"precision": precision, "limit_gib": asked.limit_gib},
        "runs": runs,
    }


def table(numbers: dict) -> str:
    """Rows by `cp_size`, and what was measured."""
    asked, first = numbers["settings"], numbers["runs"][0]
    limit = asked.get("limit_gib")
    head = ["`cp_size`", "GiB a rank, at most", "of that of one", "last loss"]
    if limit is not None:
        head.append(f"in a hard limit of {limit:g} GiB a rank")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run in numbers["runs"]:
        memory = run["peak_memory_gib_per_rank"]
        share = memory / first["peak_memory_gib_per_rank"]
        cells = [str(run["cp_size"]), f"{memory:.2f}", f"{share:.0%}", f"{run['losses'][-1]:.5f}"]
        if limit is not None:
            cells.append("trains" if run["trains_in_limit"] else "does not train")
        lines.append("| " + " | ".join(cells) + " |")
    overrides = "".join(f" {override}" for override in asked["overrides"])
    limited = "; the limit is on what a process allocates (RLIMIT_DATA)" * (limit is not None)
    lines += [
        "",
        f"{asked['model_tag']}, one sequence of {asked['length']:,} tokens, FSDP2, {asked['precision']}{overrides}; "
        f"resident memory with Python and libraries{limited}. {numbers['machine']}, {numbers['date']}, torch "
        f"{numbers['versions']['torch']}.",
    ]
    return "\n".join(lines)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line; `key=value` may stand anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-tag", default=SUBJECT.tag(SUBJECT.usual))
    parser.add_argument("--length", type=positive, default=32768, help="tokens of the sequence; default: 32768")
    parser.add_argument("--cp-sizes", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=positive, default=2, help="the first does not count for time; default: 2")
    parser.add_argument("--timeout", type=positive, default=1800, help="seconds a run may take; default: 1800")
    parser.add_argument("--limit-gib", type=float, help="of memory that a rank may allocate; default: no limit")
    parser.add_argument("--quick", action="store_true", help="the tiny model, 2,048 tokens, 1 and 2 ranks")
    add_files(parser, OUTPUT)
    found = parse_with_overrides(parser, arguments)
    check_files(parser, found, runs=found.limit_gib is not None)
    if found.limit_gib is not None and not 0 < found.limit_gib < math.inf:
        parser.error(f"--limit-gib {found.limit_gib:g} must be a number of GiB above 0, 1 for instance.")
    refuse(parser, found.overrides, TAKEN)
    for override in found.overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "precision" and value not in TOLERANCE:
            parser.error(f"{override}: fp32 or bf16, so that runs do not choose differently.")
    if found.steps < 2:
        parser.error(f"--steps {found.steps} must be at least 2: the first does not count for time.")
    if found.quick:
        found.model_tag, found.length, found.cp_sizes = SUBJECT.tag(SUBJECT.quick), 2048, [1, 2]
    elif not found.source and not found.output:
        found.output, found.table = OUTPUT, found.table or ROOT / "docs" / "scaling.md"
    return found


def main(arguments: list[str]) -> int:
    """Run or read, then print, write or check."""
    asked = read_arguments(arguments)
    return run_or_read(asked, measure, NAME, table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
