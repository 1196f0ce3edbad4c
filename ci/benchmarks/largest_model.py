# SPDX-License-Identifier: Apache-2.0
"""The largest ESM-2 that trains with FSDP2 on this machine's CPUs in so many GiB.

python ci/benchmarks/largest_model.py                    # ten minutes; writes docs: JSON, table of scaling.md
python ci/benchmarks/largest_model.py --limit-gib 12 --output mine.json
python ci/benchmarks/largest_model.py --quick --output quick.json        # small models: a minute
python ci/benchmarks/largest_model.py --from docs/results/largest_model.json --check docs/scaling.md

Models have the width of the 650M one and more or fewer layers. Two depths give a line of memory over layers, the
line a third depth, and that is trained; if it needs more than the limit, fewer layers are. Every run is
train_fsdp2.py under torchrun, two ranks with a share of the cores each, with activation checkpointing, BF16
products over FP32 weights and moments, and two optimizer steps. Memory is the sum of what each process of a run,
torchrun too, held at most, libraries included. key=value goes to all runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

from scaling_ranks import RECIPE, ROOT, Failed, cpu_name, environment, torchrun, versions, with_table, write_table
from tqdm import tqdm


OUTPUT, NAME = ROOT / "docs" / "results" / "largest_model.json", "largest_model"
NUM_RANKS, STEPS, PACK_TOKENS = 2, 2, 1024
FULL = {"model_tag": "esm2_t33_650M_UR50D", "depths": (12, 33)}
QUICK = {"model_tag": "esm2_t6_8M_UR50D", "depths": (4, 24)}


class Memory(threading.Thread):
    """Watches a process and its children; `peak_gib` is the sum of what each of them held at most."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peaks, self.over = pid, {}, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.2):
            for pid in family(self.pid):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:  # it has ended
                    continue
                if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
                    self.peaks[pid] = max(self.peaks.get(pid, 0), int(found[1]) / 2**20)

    @property
    def peak_gib(self) -> float:
        return sum(self.peaks.values())


def family(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def train(asked: argparse.Namespace, num_layers: int) -> dict:
    """One run: what it trained, its memory, its speed. Raises Failed."""
    overrides = [
        f"model_tag={asked.model_tag}", f"model_kwargs.num_hidden_layers={num_layers}", f"num_train_steps={STEPS}",
        f"micro_batches_per_step={NUM_RANKS}", "dataset.micro_batch_size=null", "dataset.num_workers=0",
        f"dataset.token_micro_batch_size={PACK_TOKENS}", "use_activation_checkpointing=true", "precision=bf16",
        "validation.load_dataset_kwargs=null", "logger.frequency=1", *asked.overrides,
    ]  # fmt: skip
    threads = str(max(1, len(os.sched_getaffinity(0)) // NUM_RANKS))
    with tempfile.TemporaryDirectory() as scratch:
        command = [*torchrun(NUM_RANKS), "train_fsdp2.py", f"logger.log_dir={scratch}", *overrides]
        process = subprocess.Popen(
            command, cwd=RECIPE, env=environment() | {"OMP_NUM_THREADS": threads}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        memory = Memory(process.pid)
        told = process.communicate()[1].strip().splitlines()
        memory.over.set()
        memory.join()
        if process.returncode:
            said = next((line for line in told if line.lower().startswith("error")), "\n".join(told[-15:]))
            raise Failed(f"{num_layers} layers: exit code {process.returncode}: {said}")
        lines = [json.loads(line) for line in (Path(scratch) / "metrics.jsonl").read_text().splitlines()]
        num_parameters = json.loads((Path(scratch) / "run.json").read_text())["num_parameters"]
    steps = [line for line in lines if line["kind"] == "train"]
    return {
        "num_layers": num_layers,
        "num_parameters": num_parameters,
        "peak_gib": round(memory.peak_gib, 2),
        "tokens_per_second": round((steps[-1]["num_tokens"] - steps[0]["num_tokens"]) / steps[-1]["step_time_s"], 1),
        "losses": [line["loss"] for line in steps],
    }


def measure(asked: argparse.Namespace) -> dict:
    """Two depths, then the deepest that fits. Raises Failed."""
    runs = []
    with tqdm(unit="run", disable=None, dynamic_ncols=True, file=sys.stderr) as bar:

        def one(num_layers: int) -> dict:
            bar.set_postfix_str(f"{num_layers} layers")
            runs.append(train(asked, num_layers))
            bar.update()
            bar.write(f"{num_layers} layers: {runs[-1]['peak_gib']:.2f} GiB", sys.stderr)
            return runs[-1]

        few, many = (one(depth) for depth in asked.depths)
        a_layer = (many["peak_gib"] - few["peak_gib"]) / (many["num_layers"] - few["num_layers"])
        depth = int(many["num_layers"] + (asked.limit_gib - many["peak_gib"]) / a_layer)
        tried = set(asked.depths)
        while depth not in tried and depth >= 1 and (found := one(depth))["peak_gib"] > asked.limit_gib:
            tried.add(depth)
            depth -= max(1, round((found["peak_gib"] - asked.limit_gib) / a_layer))
    if not any(run["peak_gib"] <= asked.limit_gib for run in runs):
        raise Failed(f"--limit-gib {asked.limit_gib:g}: no depth fits; {runs[0]['peak_gib']:.2f} GiB would do.")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "limit_gib": asked.limit_gib,
        "settings": {"model_tag": asked.model_tag, "num_ranks": NUM_RANKS, "steps": STEPS,
                     "pack_tokens": PACK_TOKENS, "overrides": asked.overrides},
        "gib_a_layer": a_layer,
        "runs": runs,
    }  # fmt: skip


def table(numbers: dict) -> str:
    """The runs; the largest that fits is bold."""
    limit, settings = numbers["limit_gib"], numbers["settings"]
    largest = max((run for run in numbers["runs"] if run["peak_gib"] <= limit), key=lambda run: run["num_layers"])
    lines = ["| layers | parameters, M | peak memory, GiB | real tokens/s |", "|---|---|---|---|"]
    for run in sorted(numbers["runs"], key=lambda run: run["num_layers"]):
        cells = [
            str(run["num_layers"]), f"{run['num_parameters'] / 1e6:,.0f}", f"{run['peak_gib']:.1f}",
            f"{run['tokens_per_second']:,.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(f"**{cell}**" if run is largest else cell for cell in cells) + " |")
    told = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    facts = [
        f"Bold: the largest in {limit:g} GiB, {largest['num_parameters'] / 1e6:,.0f}M parameters",
        f"layers of {settings['model_tag']}, {numbers['gib_a_layer']:.3f} GiB each",
        f"{settings['num_ranks']} ranks, packs of {settings['pack_tokens']:,} tokens",
        f"{numbers['machine']}, {numbers['cores']} cores, {numbers['date']}", told, *settings["overrides"],
    ]  # fmt: skip
    return "\n".join([*lines, "", "; ".join(facts) + "."])


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line; `key=value` may stand anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, help="default: 20")
    parser.add_argument("--quick", action="store_true", help="small models, in 2 GiB")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=f"default: docs/results/{OUTPUT.name}")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="run nothing")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table into this page")
    parser.add_argument("--check", type=Path, metavar="FILE.md", help="exit with 1 if its table is not that of --from")
    is_override = re.compile(r"\+{0,2}[\w.]+=")
    overrides = [argument for argument in arguments if is_override.match(argument)]
    found = parser.parse_args([argument for argument in arguments if not is_override.match(argument)])
    found.overrides = overrides
    if found.limit_gib is not None and not found.limit_gib > 0:
        parser.error(f"--limit-gib {found.limit_gib:g} must be more than 0.")
    if found.check and not found.source:
        parser.error("--check needs the numbers: --from FILE.json.")
    if found.source and not found.source.is_file():
        parser.error(f"--from {found.source}: no such file.")
    if found.source and (found.quick or found.output or found.limit_gib or overrides):
        parser.error("--from runs nothing; leave it or what belongs to runs out.")
    if found.quick and not found.output:
        parser.error("--quick measures too little for docs; say where with --output FILE.json.")
    if not found.source and not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc, which only Linux has.")
    found.model_tag, found.depths = (QUICK if found.quick else FULL).values()
    found.limit_gib = found.limit_gib or (2.0 if found.quick else 20.0)
    if not (found.source or found.output or found.quick):
        found.output, found.table = OUTPUT, found.table or ROOT / "docs" / "scaling.md"
    return found


def main(arguments: list[str]) -> int:
    """Run or read, then print, write or check."""
    asked = read_arguments(arguments)
    try:
        numbers = json.loads(asked.source.read_text()) if asked.source else measure(asked)
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    text = table(numbers)
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(numbers, indent=1) + "\n")
    if asked.table:
        write_table(asked.table, NAME, text)
    if asked.check:
        if (page := asked.check.read_text()) != with_table(page, NAME, text):
            print(
                f"error: {asked.check}: its table is not that of {asked.source}; write it: --table.", file=sys.stderr
            )
            return 1
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
