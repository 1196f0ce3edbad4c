# SPDX-License-Identifier: Apache-2.0
"""What readers of a field's own kinds of files share: which are named, work in processes, the part asked for."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import datasets
from tqdm import tqdm

from common.loader import script_unseen


def files_of(path: Path) -> list[Path]:
    """A file, or those that lie in a folder."""
    return [path] if path.is_file() else [file for file in sorted(path.glob("*")) if file.is_file()]


def found_files(section: str, kwargs: dict, what: str, inside: Callable[[Path], list[Path]] = files_of) -> list[str]:
    """The files that `data_files` names, sorted within each pattern; `inside` gives those that a path stands for.

    Raises ValueError for a name without any and for an empty file, with `what` should be in it.
    """
    name, path = f"{section}.load_dataset_kwargs", kwargs["path"]
    unset = {key for key, value in kwargs.items() if value is None or (key == "streaming" and not value)}
    if other := set(kwargs) - {"path", "data_files", "split"} - unset:
        raise ValueError(f"{name}.{min(other)}: path={path} takes data_files and split only.")
    patterns = kwargs.get("data_files")
    if not patterns:
        raise ValueError(f"{name}.data_files is not set; path={path} needs a file, a pattern or a list of them.")
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pattern = str(Path(pattern).expanduser())
        places = [Path(pattern)] if Path(pattern).exists() else map(Path, sorted(glob(pattern, recursive=True)))
        here = [file for place in places for file in inside(place)]
        if not here:
            raise ValueError(f"{name}.data_files={pattern}: no such file; give a full path or one from {Path.cwd()}.")
        if empty := [file for file in here if file.stat().st_size == 0]:
            raise ValueError(f"{name}.data_files={empty[0]}: the file is empty; give one with {what} in it.")
        found += [str(file.resolve()) for file in here]
    return found


def part_of(section: str, rows: datasets.Dataset, kwargs: dict) -> datasets.Dataset:
    """The rows that `split` names, as train[:90%]."""
    split, name = kwargs.get("split") or "train", f"{section}.load_dataset_kwargs"
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"{name}.split={split}: give train, or a part of it as train[:90%] or train[90%:]."
        ) from error
    ranges = [(piece.from_ or 0, len(rows) if piece.to is None else piece.to) for piece in pieces]
    if not any(stop > first for first, stop in ranges):
        raise ValueError(f"{name}: split={split} of {len(rows):,} rows has none; give a larger part.")
    if ranges == [(0, len(rows))]:
        return rows
    chosen = [rows.select(range(first, stop)) for first, stop in ranges]
    found = chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    found._fingerprint = sha256(f"{rows._fingerprint} {ranges}".encode()).hexdigest()[:32]
    return found


def in_processes(work: Callable, tasks: list[tuple], num_processes: int, note: str, quiet: bool,
                 total: int | None = None) -> Iterator:  # fmt: skip
    """The results of `work(*task)`, as they come, with a progress bar; in this process where one is enough."""
    bar = tqdm(total=total or len(tasks), initial=(total or len(tasks)) - len(tasks), desc=note, unit=" parts",
               disable=quiet or not sys.stderr.isatty(), leave=False)  # fmt: skip
    with bar:
        if num_processes <= 1 or len(tasks) <= 1:
            for task in tasks:
                yield work(*task)
                bar.update()
            return
        waiting = iter(tasks)
        with script_unseen(), ProcessPoolExecutor(min(num_processes, len(tasks)), get_context("forkserver")) as pool:
            running = {pool.submit(work, *task) for task in islice(waiting, 2 * num_processes)}
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for one in done:
                        yield one.result()
                        bar.update()
                        running |= {pool.submit(work, *task) for task in islice(waiting, 1)}
            except BrokenProcessPool as error:
                raise ValueError(f"{note}: a process was killed, perhaps for lack of memory; use fewer.") from error
            finally:
                pool.shutdown(cancel_futures=True)
