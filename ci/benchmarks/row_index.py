# SPDX-License-Identifier: Apache-2.0
"""What an index of lengths saves: sequences read and time to the first batch, with several ranks and workers.

python ci/benchmarks/row_index.py                        # three minutes; writes docs: JSON, table of data.md
python ci/benchmarks/row_index.py --quick --output quick.json            # few rows, 2 ranks, one round
python ci/benchmarks/row_index.py --from docs/results/row_index.json --check docs/data.md

To pack a window, the plan asks for the length of each of its rows. Three ways to answer take turns, on the same
made-up proteins, which are in the cache of `datasets` already. "rows": every worker of every rank reads and tokenises
the window, and makes its micro-batches of what it has read (here a stand-in for how the recipe did it before it had an
index). "built": the recipe's first start with a data set, which measures all rows once. "mapped": later starts. Ranks
are processes that meet over gloo and take their batches step by step, as in training, but train nothing. The ways must
give the same batches. Counted is what `sequences()` returns, and where: in workers, or in the ranks before they begin.
Time begins with the loader, when the server that workers are forked from has loaded its libraries: these are the same
in all ways, and take longer than the rest.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median


from subject import RECIPE, ROOT, suffix  # isort: skip (it finds the recipe)
from data_speed import SEED, write_proteins  # isort: skip
import datasets
import torch
from command_line import Failed, add_files, check_files, parse_with_overrides, run_or_read
from counted_rows import CHECK, INDEX, WORKERS, Counted, ReadForLengths, bytes_read
from largest_model import family, stat
from tqdm import tqdm

import dataset
from common.contract.ranks import call_on_ranks
from common.distributed import Distributed
from common.loader import end_workers, script_unseen, start_worker_server
from common.run_facts import cpu_name, versions


NAME = f"row_index{suffix(RECIPE.name)}"
OUTPUT = ROOT / "docs" / "results" / f"{NAME}.json"
FULL = {
    "num_rows": 1_000_000, "num_ranks": 4, "num_workers": 2, "token_micro_batch_size": 16_384, "window_rows": 10_000,
    "steps": 50, "rounds": 3,
}  # fmt: skip
QUICK = FULL | {
    "num_rows": 10_000, "num_ranks": 2, "token_micro_batch_size": 2048, "window_rows": 200, "steps": 20, "rounds": 1,
}  # fmt: skip
WAYS = {"rows": "the rows", "built": "the index, first start", "mapped": "the index, later starts"}


def cpu_seconds() -> float:
    """Of this process and all below it that are alive."""
    ticks = (int(field) for pid in family(os.getpid()) for field in stat(pid)[11:13])
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def rank(distributed: Distributed, way: str, source: dict, cache: str, log: str, settings: dict) -> dict:
    """One rank of a run: when it began, had the loader and had the batches of each step, and what was in them."""
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    dataset.SequenceRows = partial(ReadForLengths if way == "rows" else Counted, Path(log))
    start_worker_server()
    first = multiprocessing.get_context("forkserver").Process(target=int)
    with script_unseen():
        first.start()
    first.join()  # then the server has loaded what it is to
    try:
        return steps(distributed, source, settings)
    except BaseException:
        end_workers()  # they would be waited for
        raise


def steps(distributed: Distributed, source: dict, settings: dict) -> dict:
    """Open the loader and take its batches, all ranks in step."""
    torch.distributed.barrier()
    started, cpu = time.monotonic(), cpu_seconds()
    loader = dataset.TrainLoader(
        distributed, SEED, True, 1, load_dataset_kwargs={**source, "split": "train"},
        token_micro_batch_size=settings["token_micro_batch_size"], window_rows=settings["window_rows"],
        num_workers=settings["num_workers"],
    )  # fmt: skip
    opened, batches, ended, digest = time.monotonic(), iter(loader), [], hashlib.sha256()
    for step in range(settings["steps"]):
        batch = next(batches)
        distributed.sum_counts([batch], False)  # here training waits for the others
        ended.append(time.monotonic())
        if step == 0:
            cpu = cpu_seconds() - cpu
        digest.update(batch.inputs["input_ids"].numpy().tobytes())
    return {"started": started, "opened": opened, "ended": ended, "cpu_s": cpu, "digest": digest.hexdigest()}


def run(way: str, source: dict, folder: Path, settings: dict) -> tuple[dict, list[str]]:
    """One way, once: its numbers, and what tells the ranks' batches from others."""
    cache, log = folder / "cache", folder / "log"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    if way == "built":
        shutil.rmtree(cache / "row_sizes")
    ranks = call_on_ranks(folder / "ranks", rank, settings["num_ranks"], way, source, str(cache), str(log), settings)
    started = min(one["started"] for one in ranks)
    first, last = (max(one["ended"][step] for one in ranks) for step in (0, -1))
    numbers = {
        "open_s": max(one["opened"] for one in ranks) - started,
        "first_batch_s": first - started,
        "cpu_s": sum(one["cpu_s"] for one in ranks),
        "bytes_to_first_step": bytes_read(log, first),
        "bytes_to_last_step": bytes_read(log, last),
    }
    return numbers, [one["digest"] for one in ranks]


def measure(asked: argparse.Namespace) -> dict:
    """All rounds. Raises Failed where the ways do not give the same batches."""
    settings, rounds, seen = QUICK if asked.quick else FULL, {way: [] for way in WAYS}, set()
    # Ranks are forked from a server that has imported these once, as the workers of each rank are from one of its own.
    multiprocessing.set_forkserver_preload(["datasets", "torch.distributed.tensor", "torchdata.stateful_dataloader"])
    with (
        tempfile.TemporaryDirectory(prefix=NAME) as scratch,
        tqdm(total=1 + settings["rounds"] * len(WAYS), unit="run", disable=None, file=sys.stderr) as bar,
    ):
        folder = Path(scratch)
        bar.set_postfix_str("writing and converting proteins")
        source = write_proteins(folder, settings["num_rows"], ("parquet",))["parquet"]
        (folder / "cache" / "row_sizes").mkdir(parents=True)
        run("built", source, folder, settings)
        bar.update()
        for turn in range(settings["rounds"]):
            # There and back, so that a drift of the machine favours none.
            for way in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
                bar.set_postfix_str(WAYS[way])
                numbers, digests = run(way, source, folder, settings)
                rounds[way].append(numbers)
                seen.add(tuple(digests))
                bar.update()
        if len(seen) > 1:
            raise Failed("the ways gave different batches.")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"name": cpu_name(), "cores": os.cpu_count()},
        "versions": versions(),
        "settings": settings,
        "rounds": rounds,
    }


def mega(values: list[int]) -> str:
    """The median number of bytes, in MB."""
    return f"{median(values) / 1e6:,.1f}"


def over(values: list[float], others: list[float]) -> str:
    """The median, and that of the ratios to another way's in the same round, with their range."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    return f"{median(values):.1f}: {median(ratios):.2f} x ({min(ratios):.2f} – {max(ratios):.2f})"


def table(numbers: dict) -> str:
    """A row for each way; times also as ratios to reading the rows."""
    settings, rounds = numbers["settings"], numbers["rounds"]
    head = ["lengths from", "workers read before step 1, MB", f"before step {settings['steps']}, MB",
            "ranks read before they begin, MB", "data and index are open after, s",
            "first batch on every rank after, s", "CPU seconds until then"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for way, name in WAYS.items():
        found, others = rounds[way], rounds["rows"]
        read = [[turn[key][WORKERS] for turn in found] for key in ("bytes_to_first_step", "bytes_to_last_step")]
        read.append([sum(turn["bytes_to_first_step"][place] for place in (INDEX, CHECK)) for turn in found])
        cells = [name, *map(mega, read), f"{median(turn['open_s'] for turn in found):.1f}"]
        for key in ("first_batch_s", "cpu_s"):
            mine = [turn[key] for turn in found]
            cells.append(f"{median(mine):.1f}" if way == "rows" else over(mine, [turn[key] for turn in others]))
        lines.append(f"| {' | '.join(cells)} |")
    less = [a["bytes_to_last_step"][WORKERS] / b["bytes_to_last_step"][WORKERS]
            for a, b in zip(rounds["rows"], rounds["mapped"], strict=True)]  # fmt: skip
    check = mega([turn["bytes_to_first_step"][CHECK] for turn in rounds["mapped"]])
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    facts = [
        f"{settings['num_ranks']} ranks of {settings['num_workers']} workers; {settings['num_rows']:,} made-up rows",
        f"in windows of {settings['window_rows']:,}, micro-batches of {settings['token_micro_batch_size']:,} tokens.",
        f"With the index workers read {median(less):.1f} times less before step {settings['steps']}.",
        f"Of what ranks read before they begin, {check} MB are the first {settings['window_rows']:,} rows, in which",
        "odd signs are looked for.",
        f"{numbers['machine']['name']}, {numbers['machine']['cores']} cores, {settings['rounds']} "
        f"round{'s' * (settings['rounds'] > 1)}, {numbers['date']}; {versions}.",
    ]
    return "\n".join([*lines, "", " ".join(facts)])


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, 2 ranks, one round")
    add_files(parser, OUTPUT)
    found = parse_with_overrides(parser, arguments)
    check_files(parser, found, runs=False)
    if found.overrides:
        parser.error(f"{found.overrides[0]}: nothing is trained here; see --help.")
    if not (found.source or found.output):
        found.output, found.table = OUTPUT, found.table or ROOT / "docs" / "data.md"
    return found


def main(arguments: list[str]) -> int:
    """Run or read, then print, write or check."""
    return run_or_read(read_arguments(arguments), measure, NAME, table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
