# SPDX-License-Identifier: Apache-2.0
"""Files with structures become Arrow once, part by part in several processes, and lie in the cache of `datasets`.

A part that is written is not read again, also after a kill; no process holds more than a part of a file.
"""

import json
import uuid
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa

from atoms.readers import PART, Options, Part, of_columns, parts_of, read
from atoms.structures import SCHEMA, row, table_of
from common.conversion import found_files, in_processes, part_of
from common.open_data import open_rows, plain
from common.sizes import save, writable


VERSION = 2  # of what is written; another makes old parts count for nothing
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
        sources = found_files(section, kwargs, "structures")
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
    found = datasets.concatenate_datasets([opened(folder / f"{i:06d}.arrow") for i in range(number)])
    found._fingerprint = key
    return part_of(section, found, kwargs) if kwargs.get("path") == "structures" else found


def opened(path: Path) -> datasets.Dataset:
    """A part. Removes one that is damaged, and raises ValueError."""
    try:
        return datasets.Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError) as error:
        for gone in (path.with_name("done.json"), path):
            gone.unlink(missing_ok=True)
        raise ValueError(f"{path} was damaged and is removed; start again, and it will be converted again.") from error


def pieces(sources: list[str] | datasets.Dataset) -> list:
    """What processes convert one at a time."""
    if isinstance(sources, datasets.Dataset):
        return [(sources, first) for first in range(0, len(sources), PART)]
    return [part for file in sources for part in parts_of(file)]


def key_of(sources: list, options: Options) -> str:
    """What tells a conversion from all others."""
    rule = (VERSION, sources, sorted(options.label_keys.items()), sorted(options.units.items()), str(SCHEMA))
    return sha256(repr(rule).encode()).hexdigest()[:32]


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
