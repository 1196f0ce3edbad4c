# SPDX-License-Identifier: Apache-2.0
"""The largest ESM-2 that trains with FSDP2 on this machine's CPUs in so many GiB.

python ci/benchmarks/largest_model.py                    # about ten minutes; writes docs: JSON, table of scaling.md
python ci/benchmarks/largest_model.py --limit-gib 12 --output mine.json dataset.max_seq_length=256
python ci/benchmarks/largest_model.py --quick --output quick.json        # small models: a minute or two
python ci/benchmarks/largest_model.py --from docs/results/largest_model.json --check docs/scaling.md

Models have the width of the 650M one and more or fewer layers. Two depths give a line of memory over layers, the line
says which depth to try next, until one fits and one layer more does not. A run that the system kills for its memory
does not fit. Every run is train_fsdp2.py under torchrun, two ranks with a share of the cores each, with activation
checkpointing, BF16 products over FP32 weights and moments, and two optimizer steps, of which the second gives the
speed. Memory is the sum of what each Python process of a run, torchrun too, held at most, libraries included; the
kernels are compiled before. key=value goes to all runs.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path


def stop(number: int, frame: object) -> None:
    """Leave as after an error, so that runs are ended, but without a traceback; once."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":  # here, because the imports below take seconds
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

from subject import suffix  # noqa: E402  # isort: skip
from scaling_ranks import (  # noqa: E402  # isort: skip (it says where the recipe's modules are)
    RECIPE, ROOT, Failed, cpu_name, environment, tokens_per_second, torchrun, versions,
)  # fmt: skip
from command_line import (  # noqa: E402
    add_files,
    check_files,
    first_error,
    parse_with_overrides,
    positive,
    run_or_read,
)
from tqdm import tqdm  # noqa: E402

from build_model import model_config  # noqa: E402
from tokens.backends import cpp_available  # noqa: E402


OUTPUT, NAME = ROOT / "docs" / "results" / "largest_model.json", "largest_model"
PROC = Path("/proc")
NUM_RANKS, STEPS, PACK_TOKENS = 2, 2, 1024
GRACE_S = 10  # from the request to end to the kill
FULL = {"model_tag": "esm2_t33_650M_UR50D", "depths": (12, 33)}
QUICK = {"model_tag": "esm2_t6_8M_UR50D", "depths": (4, 24)}
# The benchmark sets these itself; a run that differs in them would measure something else.
TAKEN = (
    "model_tag", "model_kwargs", "init_from", "num_train_steps", "micro_batches_per_step", "use_sequence_packing",
    "precision", "use_activation_checkpointing", "dataset.micro_batch_size", "dataset.token_micro_batch_size",
    "dataset.num_workers", "validation", "checkpoint", "logger",
)  # fmt: skip
GONE = (OSError, ValueError, IndexError)  # what reading about a process may raise when it ends


class Memory(threading.Thread):
    """Watches a process and all below it: `seen` are all of them, `peaks` what the Python ones held at most, GiB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        # By number and start, as numbers are used again. 0: not Python, but a compiler, say.
        self.pid, self.seen, self.over = pid, {}, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.2):
            self.look()

    def look(self) -> None:
        """Once at each process."""
        for pid in family(self.pid):
            with contextlib.suppress(*GONE):
                process = (pid, stat(pid)[19])
                self.seen.setdefault(process, 0.0)
                found = re.search(r"^VmHWM:\s+(\d+) kB", (PROC / str(pid) / "status").read_text(), re.MULTILINE)
                is_python = (PROC / str(pid) / "exe").samefile(sys.executable)
                if found:  # a process that has ended and is not yet gone has none
                    self.seen[process] = int(found[1]) / 2**20 if is_python else 0.0

    @property
    def peaks(self) -> list[float]:
        return [peak for peak in self.seen.values() if peak]

    def end(self, process: subprocess.Popen) -> None:
        """Stop watching; ask the process to end, wait, and kill what is left of all that were seen."""
        self.over.set()
        self.join()
        self.look()
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        for pid, started in self.seen:
            with contextlib.suppress(*GONE):
                if stat(pid)[19] == started:
                    os.kill(pid, signal.SIGKILL)
        process.wait()


def stat(pid: int | str) -> list[str]:
    """A process's state, its parent, and so on: the fields of `/proc/<pid>/stat` from the third."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """A process and all below it: as the kernel lists them, or, where it does not, as their parents tell."""
    found, parents = [pid], None
    for member in found:
        with contextlib.suppress(*GONE):
            lists = list((PROC / str(member) / "task").glob("*/children"))
            if lists:
                found += [int(child) for path in lists for child in path.read_text().split()]
                continue
        if parents is None:
            parents = {}
            for path in PROC.glob("[0-9]*"):
                with contextlib.suppress(*GONE):
                    parents[int(path.name)] = int(stat(path.name)[1])
        found += [child for child, parent in parents.items() if parent == member and child not in found]
    return found


def free_gib() -> float:
    """What processes can take before the system runs out of memory."""
    return int(re.search(r"^MemAvailable:\s+(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE)[1]) / 2**20


# What a rank says that gets no memory: Python, torch, C++, the C library. One that the system kills says nothing.
NO_MEMORY = re.compile(
    "(can't|cannot|failed to|unable to) allocate(?! memory in static TLS)|not enough memory|no memory is left"
    "|out of memory|MemoryError|bad_alloc|can't start new thread",
    re.IGNORECASE,
)


def out_of_memory(code: int, stderr: str) -> bool:
    """Whether torchrun or, of its ranks, the first that failed was killed, or got no memory."""
    first = re.search(r"Root Cause.*?exitcode\s*: (-?\d+)", stderr, re.DOTALL)
    return -signal.SIGKILL in (code, int(first[1]) if first else code) or bool(NO_MEMORY.search(stderr))


def train(asked: argparse.Namespace, num_layers: int) -> dict:
    """One run: what it trained, its memory, its speed; None for these where memory ran out. Raises Failed."""
    cpp_available(model_config(asked.model_tag, "auto").head_dim)  # compiles, in more memory than a small model
    overrides = [
        f"model_tag={asked.model_tag}", f"model_kwargs.num_hidden_layers={num_layers}", f"num_train_steps={STEPS}",
        f"micro_batches_per_step={NUM_RANKS}", "dataset.micro_batch_size=null", "dataset.num_workers=0",
        f"dataset.token_micro_batch_size={PACK_TOKENS}", "use_sequence_packing=true",
        "use_activation_checkpointing=true", "precision=bf16", "validation.load_dataset_kwargs=null",
        "logger.frequency=1", *asked.overrides,
    ]  # fmt: skip
    threads = str(max(1, len(os.sched_getaffinity(0)) // NUM_RANKS))
    found = {"num_layers": num_layers} | dict.fromkeys(("num_parameters", "peak_gib", "tokens_per_second", "losses"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        with (scratch / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [*torchrun(NUM_RANKS), "train_fsdp2.py", f"logger.log_dir={scratch}", *overrides], cwd=RECIPE,
                env=environment() | {"OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip
        memory = Memory(process.pid)
        try:
            code = process.wait(asked.timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"{num_layers} layers took longer than {asked.timeout} s; give a longer --timeout.") from None
        finally:
            memory.end(process)
        stderr = (scratch / "stderr").read_text(errors="replace")
        if code and out_of_memory(code, stderr):
            return found
        if code:
            raise Failed(f"{num_layers} layers: exit code {code}: {first_error(stderr)}")
        if len(memory.peaks) < 1 + NUM_RANKS:
            raise Failed(
                f"{num_layers} layers: {1 + NUM_RANKS} processes ran, but only {len(memory.peaks)} were seen."
            )
        lines = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
        found["num_parameters"] = json.loads((scratch / "run.json").read_text())["num_parameters"]
    steps = [line for line in lines if line["kind"] == "train"]
    return found | {
        "peak_gib": sum(memory.peaks),
        "tokens_per_second": round(tokens_per_second(steps, 1), 1),
        "losses": [line["loss"] for line in steps],
    }


def fits(run: dict, limit_gib: float) -> bool:
    """Whether it ran, and in so much memory."""
    return run["peak_gib"] is not None and run["peak_gib"] <= limit_gib


def gib_a_layer(runs: list[dict]) -> float | None:
    """The slope from the fewest to the most layers measured; None for less than two. Raises Failed if not positive."""
    measured = sorted((r["num_layers"], r["peak_gib"]) for r in runs if r["peak_gib"] is not None)
    if len(measured) < 2:
        return None
    (few, little), (many, much) = measured[0], measured[-1]
    if much <= little:
        raise Failed(f"{many} layers took {much:.2f} GiB, no more than {few} layers; was the machine busy?")
    return (much - little) / (many - few)


def next_depth(runs: list[dict], limit_gib: float, depths: tuple[int, int]) -> int | None:
    """What to try next; None once a depth fits and one layer more does not."""
    low = max((run["num_layers"] for run in runs if fits(run, limit_gib)), default=0)
    high = min((run["num_layers"] for run in runs if run["num_layers"] > low), default=math.inf)
    if high == low + 1:
        return None
    if high == math.inf and len(runs) < len(depths):
        return depths[len(runs)]
    guess = high
    if a_layer := gib_a_layer(runs):
        measured = (run for run in runs if run["peak_gib"] is not None)
        nearest = min(measured, key=lambda run: abs(run["peak_gib"] - limit_gib))
        guess = nearest["num_layers"] + math.floor((limit_gib - nearest["peak_gib"]) / a_layer)
    # Where memory ran out sooner than the line says, or there is no line, halve.
    return max(guess, low + 1) if guess < high else (low + high) // 2


def measure(asked: argparse.Namespace) -> dict:
    """All runs, until the largest is found. Raises Failed."""
    runs = []
    with tqdm(unit="run", disable=None, dynamic_ncols=True, file=sys.stderr) as bar:
        while depth := next_depth(runs, asked.limit_gib, asked.depths):
            bar.set_postfix_str(f"{depth} layers")
            runs.append(train(asked, depth))
            bar.update()
            peak = runs[-1]["peak_gib"]
            bar.write(f"{depth} layers: {'out of memory' if peak is None else f'{peak:.2f} GiB'}", sys.stderr)
    if not any(fits(run, asked.limit_gib) for run in runs):
        peaks = [run["peak_gib"] for run in runs if run["peak_gib"] is not None]
        would_do = f"{math.ceil(min(peaks) * 10) / 10:g} would do" if peaks else "one layer runs out of memory"
        raise Failed(f"--limit-gib {asked.limit_gib:g}: no depth fits; {would_do}.")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "limit_gib": asked.limit_gib,
        "settings": {"model_tag": asked.model_tag, "num_ranks": NUM_RANKS, "steps": STEPS,
                     "pack_tokens": PACK_TOKENS, "overrides": asked.overrides},
        "gib_a_layer": gib_a_layer(runs),
        "runs": runs,
    }  # fmt: skip


def table(numbers: dict) -> str:
    """The runs; the largest that fits is bold."""
    limit, settings, a_layer = numbers["limit_gib"], numbers["settings"], numbers["gib_a_layer"]
    largest = max((run for run in numbers["runs"] if fits(run, limit)), key=lambda run: run["num_layers"])
    lines = [
        "| layers | parameters, M | memory, GiB: sum of the processes' peaks | real tokens/s |", "|---|---|---|---|",
    ]  # fmt: skip
    for run in sorted(numbers["runs"], key=lambda run: run["num_layers"]):
        cells = [str(run["num_layers"]), "–", "ran out", "–"]
        if run["peak_gib"] is not None:
            cells[1:] = (
                f"{run['num_parameters'] / 1e6:,.0f}", f"{run['peak_gib']:.2f}", f"{run['tokens_per_second']:,.0f}",
            )  # fmt: skip
        lines.append("| " + " | ".join(f"**{cell}**" if run is largest else cell for cell in cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    facts = [
        f"Bold: the largest in {limit:g} GiB, {largest['num_parameters'] / 1e6:,.0f}M parameters; "
        "one layer more does not fit",
        f"layers of {settings['model_tag']}" + (f", {a_layer:.3f} GiB each" if a_layer else ""),
        f"{settings['num_ranks']} ranks, packs of {settings['pack_tokens']:,} tokens",
        f"{numbers['machine']}, {numbers['cores']} cores, {numbers['date']}", versions, *settings["overrides"],
    ]  # fmt: skip
    return "\n".join([*lines, "", "; ".join(facts) + "."])


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line; `key=value` may stand anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, help="default: 20")
    parser.add_argument("--timeout", type=positive, default=1200, help="seconds a run may take; default: 1200")
    parser.add_argument("--quick", action="store_true", help="small models, in 2 GiB")
    add_files(parser, OUTPUT)
    found = parse_with_overrides(parser, arguments)
    check_files(parser, found, runs=bool(found.limit_gib))
    for override in found.overrides:
        key = override.lstrip("+").partition("=")[0] + "."
        if any(key.startswith(f"{taken}.") or f"{taken}.".startswith(key) for taken in TAKEN):
            parser.error(f"{override}: the benchmark sets that itself; see --help.")
    if found.recipe and suffix(RECIPE.name):
        parser.error(f"--recipe {found.recipe}: the depths to begin with are known of ESM-2 only.")
    if found.limit_gib is not None and not 0 < found.limit_gib < math.inf:
        parser.error(f"--limit-gib {found.limit_gib:g} must be a number of GiB above 0, 20 for instance.")
    if not found.source and not (PROC / "meminfo").exists():
        parser.error("memory is read from /proc, which only Linux has.")
    found.model_tag, found.depths = (QUICK if found.quick else FULL).values()
    found.limit_gib = found.limit_gib or (2.0 if found.quick else 20.0)
    if not found.source and found.limit_gib > (free := free_gib()):
        parser.error(
            f"--limit-gib {found.limit_gib:g} is more than the {free:.1f} GiB of memory that are available here; "
            f"give at most --limit-gib {math.floor(free * 10) / 10:g}, or end other programs."
        )
    if not (found.source or found.output):
        found.output, found.table = OUTPUT, found.table or ROOT / "docs" / "scaling.md"
    return found


def main(arguments: list[str]) -> int:
    """Run or read, then print, write or check."""
    asked = read_arguments(arguments)
    return run_or_read(asked, measure, NAME, table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
