# SPDX-License-Identifier: Apache-2.0
"""Files with structures become Arrow once, part by part in several processes, and lie in the cache of `datasets`.

A part that is written is not read again, also after a kill; no process holds more than a part of a file.
"""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import datasets
import pyarrow as pa
from tqdm import tqdm

from atoms.readers import PART, Options, Part, of_columns, parts_of, read
from atoms.structures import SCHEMA, row, table_of
from common.loader import script_unseen
from common.open_data import open_rows, plain
from common.sizes import save, writable


VERSION = 1  # of what is written; another makes old parts count for nothing
ROWS_AT_ONCE = 500


def open_structures(section: str, load_dataset_kwargs: dict, label_keys: dict | None = None, units: dict | None = None,
                    num_processes: int = 1, quiet: bool = False) -> datasets.Dataset:  # fmt: skip
    """Rows of SCHEMA, memory-mapped; `dataset._fingerprint` tells these files, as they are read here, from others.

    `path: structures` reads `data_files` (a pattern or a list) of any kind, any other `path` is `load_dataset`'s.
    Raises ValueError of one sentence for a user's mistake.
    """
    kwargs = plain(load_dataset_kwargs)
    names, units = ({k: v for k, v in plain(some or {}).items() if v is not None} for some in (label_keys, units))
    options = Options(section, names, units)
    if kwargs.get("path") == "structures":
        sources = found_files(section, kwargs)
        stats = [(file, Path(file).stat()) for file in sources]
        key = key_of([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats], options)
    else:
        rows = open_rows(section, kwargs)
        if isinstance(rows, datasets.IterableDataset):
            raise ValueError(
                f"{section}.load_dataset_kwargs.streaming=true: structures are not streamed; leave it out."
            )
        if set(SCHEMA.names) <= set(rows.column_names) and not options.units and not options.label_keys:
            return rows.select_columns(SCHEMA.names)
        key, sources = key_of([rows._fingerprint], options), rows
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "structures" / key
    if not (folder / "done.json").exists():
        convert(section, folder, pieces(sources), options, num_processes, quiet)
    number = json.loads((folder / "done.json").read_text())["num_parts"]
    found = datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(folder / f"{i:06d}.arrow")) for i in range(number)]
    )
    found._fingerprint = key
    return part_of(section, found, kwargs) if kwargs.get("path") == "structures" else found


def pieces(sources: list[str] | datasets.Dataset) -> list:
    """What processes convert one at a time."""
    if isinstance(sources, datasets.Dataset):
        return [(sources, first) for first in range(0, len(sources), PART)]
    return [part for file in sources for part in parts_of(file)]


def key_of(sources: list, options: Options) -> str:
    """What tells a conversion from all others."""
    rule = (VERSION, sources, sorted(options.label_keys.items()), sorted(options.units.items()), str(SCHEMA))
    return sha256(repr(rule).encode()).hexdigest()[:32]


def found_files(section: str, kwargs: dict) -> list[str]:
    """The files that `data_files` names, sorted within each pattern."""
    name = f"{section}.load_dataset_kwargs"
    if (
        other := set(kwargs)
        - {"path", "data_files", "split"}
        - {k for k, v in kwargs.items() if v is None or (k == "streaming" and not v)}
    ):
        raise ValueError(f"{name}.{min(other)}: path=structures takes data_files and split only.")
    patterns = kwargs.get("data_files")
    if not patterns:
        raise ValueError(f"{name}.data_files is not set; path=structures needs a file, a pattern or a list of them.")
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pattern = str(Path(pattern).expanduser())
        inside = f"{pattern}/*" if Path(pattern).is_dir() else pattern  # of a folder all files
        here = [file for file in sorted(glob(inside, recursive=True)) if Path(file).is_file()]
        if not here:
            raise ValueError(f"{name}.data_files={pattern}: no such file; give a full path or one from {Path.cwd()}.")
        if empty := [file for file in here if Path(file).stat().st_size == 0]:
            raise ValueError(f"{name}.data_files={empty[0]}: the file is empty; give one with structures in it.")
        found += [str(Path(file).resolve()) for file in here]
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
        raise ValueError(f"{name}: split={split} of {len(rows):,} structures has none; give a larger part.")
    if ranges == [(0, len(rows))]:
        return rows
    chosen = [rows.select(range(first, stop)) for first, stop in ranges]
    found = chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)
    found._fingerprint = sha256(f"{rows._fingerprint} {ranges}".encode()).hexdigest()[:32]
    return found


def convert(section: str, folder: Path, parts: list, options: Options, num_processes: int, quiet: bool) -> None:
    """Write what is not there yet, part by part. Raises ValueError at a frame that cannot be read."""
    if not parts:
        raise ValueError(f"{section}.load_dataset_kwargs: the files have no structures.")
    with writable(section, folder):
        folder.mkdir(parents=True, exist_ok=True)
        left = [(folder / f"{i:06d}.arrow", part) for i, part in enumerate(parts)]
        left = [(path, part) for path, part in left if not path.exists()]
        tasks = [(path, part, options) for path, part in left]
        note = f"{section}: structures to Arrow"
        for _ in in_processes(write_part, tasks, num_processes, note, quiet, len(parts)):
            pass
        save(folder / "done.json", lambda file: file.write(json.dumps({"num_parts": len(parts)}).encode()))


def write_part(path: Path, part: Part | tuple[datasets.Dataset, int], options: Options) -> int:
    """Write a part as an Arrow stream, whole or not at all; how many structures it has."""
    rows = read(part, options) if isinstance(part, Part) else read_hub(*part, options)
    partial, number = path.with_name(f".{path.name}.{uuid.uuid4().hex}"), 0
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            while some := list(islice(rows, ROWS_AT_ONCE)):
                writer.write_table(table_of(some))
                number += len(some)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return number


def read_hub(rows: datasets.Dataset, first: int, options: Options) -> Iterator[dict]:
    """Rows of a data set with other columns."""
    for number in range(first, min(first + PART, len(rows))):
        try:
            yield row(
                **of_columns(rows[number], options), source=str(rows.info.dataset_name or "data"), key=str(number)
            )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{options.section}.load_dataset_kwargs: row {number} cannot be read: {error}."
            ) from error


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
                raise ValueError(f"{note}: a process was killed, for want of memory perhaps; use fewer.") from error
            finally:
                pool.shutdown(cancel_futures=True)
