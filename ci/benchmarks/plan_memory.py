# SPDX-License-Identifier: Apache-2.0
"""Memory and time of the epoch plan, side by side with ordering and packing all rows at once.

python ci/benchmarks/plan_memory.py [largest]       # writes docs/results/plan_memory.json; about ten minutes

Each measurement has a process of its own (Linux: the peak is VmHWM). Lengths are computed from the row's number, like
those of proteins (log-normal, median 280), so that no data set counts. Both ways pack by best fit, 16,384 tokens.
Time is CPU time, so that what else runs on the machine matters little.
"""

import json
import multiprocessing
import platform
import sys
import time
from pathlib import Path

import numpy as np


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "esm2_native_te"))

from common.epoch_plan import EpochPlan, Grouping, best_fit_decreasing, uniform_below  # noqa: E402


TOKENS, WINDOW_ROWS = 16_384, 10_000
MANY = 65_536
QUANTILES = np.clip(np.exp(np.random.default_rng(0).normal(np.log(280), 0.6, MANY)).astype(int) + 2, 3, 1024)


class Lengths:
    """So many rows, of which only the lengths are known."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of each row."""
        return QUANTILES[uniform_below(np.full(len(rows), MANY), rows, 7)]


def planned(num_rows: int) -> tuple[int, int]:
    """Read one epoch of the plan; its rows and its micro-batches."""
    plan = EpochPlan(Lengths(num_rows), Grouping(budget=TOKENS), 1, WINDOW_ROWS)
    rows = micro_batches = 0
    for micro_batch in plan.epoch(0):
        rows, micro_batches = rows + len(micro_batch.rows), micro_batches + 1
    return rows, micro_batches


def all_at_once(num_rows: int) -> tuple[int, int]:
    """The obvious way: draw the order of all rows, then pack all of them."""
    order = np.random.default_rng(1).permutation(num_rows)
    lengths = Lengths(num_rows).sizes(order, 0)
    micro_batches = [order[items] for items in best_fit_decreasing(lengths, TOKENS)]
    return sum(map(len, micro_batches)), len(micro_batches)


WAYS = {"plan": planned, "all_at_once": all_at_once}


def peak_mib() -> float:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(way: str, num_rows: int) -> dict:
    """In a process that has run the same on few rows before, so that what is loaded once does not count."""
    WAYS[way](1000)
    before, started = peak_mib(), time.process_time()
    rows, micro_batches = WAYS[way](num_rows)
    seconds = time.process_time() - started
    assert rows == num_rows
    return {
        "peak_additional_mib": round(peak_mib() - before, 2),
        "cpu_microseconds_a_row": round(seconds / num_rows * 1e6, 3),
        "num_micro_batches": micro_batches,
    }


def main(largest: int = 10_000_000) -> None:
    """Measure, print, write."""
    from common.run_facts import cpu_name

    results = []
    for num_rows in (n for n in (10**4, 10**5, 10**6, 10**7) if n <= largest):
        line = {"num_rows": num_rows}
        for way in WAYS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                line[way] = pool.apply(measure, (way, num_rows))
        plan, obvious = (line[way] for way in WAYS)
        line["memory_ratio"] = round(obvious["peak_additional_mib"] / max(plan["peak_additional_mib"], 0.01), 1)
        line["time_ratio"] = round(obvious["cpu_microseconds_a_row"] / plan["cpu_microseconds_a_row"], 2)
        results.append(line)
        for way in WAYS:
            memory, cpu = line[way]["peak_additional_mib"], line[way]["cpu_microseconds_a_row"]
            print(f"{num_rows:>12,} rows  {way:>12}  {memory:8.1f} MiB  {cpu:6.2f} us a row", flush=True)
        print(f"{'all_at_once / plan':>32}  {line['memory_ratio']:8.1f}      {line['time_ratio']:6.2f}", flush=True)
    facts = {
        "machine": cpu_name(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "window_rows": WINDOW_ROWS,
        "token_micro_batch_size": TOKENS,
        "results": results,
    }
    (ROOT / "docs" / "results" / "plan_memory.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
