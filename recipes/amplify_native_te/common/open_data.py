# SPDX-License-Identifier: Apache-2.0
"""Rows by `datasets.load_dataset`, where a user's mistake is one sentence."""

import errno
import gzip
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape, glob, has_magic
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, DataFilesList, get_data_patterns, sanitize_patterns
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules import (
    _ALL_ALLOWED_EXTENSIONS,
    _MODULE_TO_EXTENSIONS,
    _PACKAGED_DATASETS_MODULES,
)
from datasets.table import InMemoryTable
from omegaconf import OmegaConf
from pyarrow.dataset import ParquetFragmentScanOptions

from common import readers
from common.distributed import Distributed
from common.readers.narrow import NoColumn
from common.redaction import redacted


FILE_FORMATS = set(_PACKAGED_DATASETS_MODULES) - {"sql", "cache", "iceberg"}


def open_rows(
    section: str,
    load_dataset_kwargs: dict,
    columns: dict[str, str] | None = None,
    labels: tuple[str, ...] = (),
    looks_like: str = "",
) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset`; a user's mistake is a ValueError of one sentence that names `section`.

    Of tables in files only these columns are read: `columns`, the one that is needed by the key that names it (None:
    all); and `labels`, as text, which say what a row is, where there are any. `looks_like` follows where a file has no
    rows: what they look like in this kind of file.
    """
    load_dataset_kwargs = plain(load_dataset_kwargs)
    # Else the hub is asked to count each local file: seconds, where none answers.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    readers.register()
    name, path = f"{section}.load_dataset_kwargs", load_dataset_kwargs.get("path")
    check_form(name, load_dataset_kwargs)
    kwargs = load_dataset_kwargs.copy()
    for column in (columns or {}).values():
        others = load_dataset_kwargs.get("columns") or labels
        kwargs["columns"] = [column, *(other for other in others if other != column)]
    with one_sentence(section, load_dataset_kwargs, columns, looks_like):
        if path in FILE_FORMATS:
            kwargs = resolved(name, kwargs)
            if path == "parquet":  # by default a row group at once, and an error where a file among others has no rows
                kwargs = {"batch_size": 10_000, **kwargs}
                if not kwargs.get("streaming"):  # by default all of a file that was read stays in memory to its end
                    kwargs = {"fragment_scan_options": ParquetFragmentScanOptions(pre_buffer=False), **kwargs}
        elif path is not None and (folder := Path(path).expanduser()).is_dir():
            kwargs["path"] = str(folder)
            if not saved_to_disk(folder) and not kwargs.get("data_files") and has_magic(str(folder.absolute())):
                inside = folder.absolute() / (kwargs.pop("data_dir", None) or "")
                kwargs["data_files"] = files_in(inside)
        if path is not None and saved_to_disk(Path(kwargs["path"])):
            rows = from_disk(kwargs)
        else:
            try:
                rows = datasets.load_dataset(**kwargs)
            except (TypeError, ValueError) as error:
                if isinstance(error, NoColumn) or "column" not in str(error) or "columns" in load_dataset_kwargs:
                    raise
                wanted = kwargs.pop("columns")  # this format reads all
                rows = datasets.load_dataset(**kwargs)
                if not isinstance(rows, dict):
                    rows = rows.select_columns(
                        [name for name in wanted if name in rows.column_names] or rows.column_names
                    )
        if isinstance(rows, dict):
            raise ValueError(f"{name}.split is not set; this data set has the splits {', '.join(rows)}.")
        # A stream opens its files only when it is asked for a row; as Arrow, because text need not decode.
        if next(iter(rows.with_format("arrow")), None) is None:
            raise NoRows
    for key, column in (columns or {}).items():
        if rows.column_names is not None:
            check_column(section, key, column, rows.column_names)
    return rows


def check_form(name: str, kwargs: dict) -> None:
    """Raise ValueError for a file in the place of a format, and for a part of a stream."""
    path, split = kwargs.get("path"), kwargs.get("split")
    if isinstance(path, str) and Path(path).expanduser().is_file():
        raise ValueError(f"{name}.path={path} is a file; give its format, as path=parquet, and data_files={path}.")
    on_disk = isinstance(path, str) and saved_to_disk(Path(path).expanduser())  # its rows have numbers
    if kwargs.get("streaming") and isinstance(split, str) and "[" in split and not on_disk:
        raise ValueError(
            f"{name}.split={split} cannot be combined with streaming=true, which reads a whole split; give "
            f"split={split.partition('[')[0]} and files of their own for validation, or streaming=false."
        )


# ---- files


def resolved(name: str, kwargs: dict) -> dict:
    """The same with all files by their full names: `datasets` takes signs of folders above them for patterns.

    Raises ValueError for a name or pattern without a file, and for files that are empty.
    """
    path, files = kwargs["path"], kwargs.get("data_files")
    root = Path(kwargs.get("data_dir") or "").expanduser().absolute()
    if not files and kwargs.get("data_dir"):  # datasets sees by their names which split they are
        return {k: v for k, v in kwargs.items() if k != "data_dir"} | {"data_files": files_in(root)}
    if not files:  # datasets would read whatever lies in the working folder
        raise ValueError(f"{name}.data_files is not set; path={path} needs a file, a pattern or a list of them.")
    splits = sanitize_patterns(files)
    if any("://" in pattern for patterns in splits.values() for pattern in patterns):
        return kwargs
    found, empty = {}, []
    for split, patterns in splits.items():
        matches = [file for pattern in patterns for file in matching(name, path, root, pattern)]
        if wrong := [str(file) for file in matches if "::" in str(file) or "\\" in str(file)]:
            raise ValueError(
                f"{name}.data_files={wrong[0]}: datasets cannot read a name with :: or \\ in it; rename it."
            )
        empty += [str(file) for file in matches if is_empty(file)]
        found[split] = DataFilesList(list(map(str, matches)), [(str(file.stat().st_mtime_ns),) for file in matches])
    if len(empty) == 1:
        raise ValueError(f"{name}.data_files={empty[0]}: the file is empty; give one with rows in it.")
    if empty:
        shown = ", ".join(empty[:20]) + (f" and {len(empty) - 20} more" if len(empty) > 20 else "")
        raise ValueError(f"{name}.data_files: {len(empty)} files are empty: {shown}; leave them out, or delete them.")
    return {k: v for k, v in kwargs.items() if k != "data_dir"} | {"data_files": found}


def whence(load_dataset_kwargs: Mapping) -> str:
    """The data set or the files, for a person."""
    kwargs = redacted(plain(load_dataset_kwargs))
    files, path = kwargs.get("data_files"), kwargs.get("path")
    place = str(path)
    if files:
        if path in FILE_FORMATS:
            files = resolved("", plain(load_dataset_kwargs))["data_files"]
        patterns = [file for some in sanitize_patterns(files).values() for file in some]
        shown = ", ".join(redacted(patterns)[:3]) + (f" and {len(patterns) - 3} more" if len(patterns) > 3 else "")
        place += f" of {len(patterns)} files: {shown}" if len(patterns) > 1 else f" {shown}"
    elif kwargs.get("data_dir"):
        place += f" {kwargs['data_dir']}"
    if kwargs.get("name"):
        place += f" ({kwargs['name']})"
    return place + (f", split {kwargs['split']}" if kwargs.get("split") else "")


def matching(name: str, path: str, root: Path, pattern: str) -> list[Path]:
    """The files that a name, a folder or a pattern stands for, sorted. Raises ValueError where there is none."""
    # Links as they are: the hub's cache has the ending in their names.
    place = Path(os.path.abspath(root / Path(pattern).expanduser()))  # noqa: PTH100
    if place.is_file():
        return [place]
    base = Path(place.anchor)  # as far as there is a folder of that very name; what is left is a pattern
    parts = list(place.parts[1:])
    while parts and (base / parts[0]).is_dir():
        base = base / parts.pop(0)
    if parts:
        found = sorted(base / match for match in glob("/".join(parts), root_dir=base, recursive=True))
        found = [file for file in found if file.is_file() and file.name not in FILES_TO_IGNORE]
        if not found:
            raise ValueError(f"{name}.data_files={pattern}: no such file; give a full path or one from {root}.")
        return found
    inside = sorted(file for file in base.rglob("*") if file.is_file())
    visible = [file for file in inside if not any(part[0] in "._" for part in file.relative_to(base).parts)]
    endings = [ending for ending in _MODULE_TO_EXTENSIONS.get(path, ()) if ending != ".zip"]
    found = [file for file in visible if {suffix.lower() for suffix in file.suffixes} & set(endings)]
    found = [file for file in found if file.name not in FILES_TO_IGNORE]
    if not found:
        there = f"it has {', '.join(file.name for file in visible[:5])}" if visible else "it is empty"
        raise ValueError(
            f"{name}.data_files={pattern}: a folder without a file that ends in {', '.join(endings)}; {there}. Give "
            f"the files or a pattern, and {name}.path as they are."
        )
    return found


def files_in(folder: Path) -> dict[str, DataFilesList]:
    """The files of a folder, by the splits that `datasets` sees in their names."""
    base = escape(str(folder))
    return DataFilesDict.from_patterns(get_data_patterns(base), base, _ALL_ALLOWED_EXTENSIONS)


def is_empty(file: Path) -> bool:
    """Whether there is nothing in it, packed or not."""
    size = file.stat().st_size
    if size and file.suffix == ".gz" and size < 200:  # no more than a header with a name
        with suppress(OSError, EOFError), gzip.open(file) as opened:
            return not opened.read(1)
    return size == 0


def saved_to_disk(folder: Path) -> bool:
    """Whether this is a folder that `save_to_disk` of `datasets` has written."""
    return any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))


def from_disk(kwargs: dict) -> datasets.Dataset | datasets.IterableDataset | dict:
    """What `save_to_disk` has written, with `split` as in `load_dataset`."""
    data = datasets.load_from_disk(kwargs["path"], storage_options=kwargs.get("storage_options"))
    if not isinstance(data, dict):
        data = {str(data.split or "train"): data}
    if (split := kwargs.get("split")) is None:
        return data
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in data.items()})
    taken = [data[part.splitname].select(range(part.from_, part.to)) for part in parts]
    rows = taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)
    if "columns" in kwargs and kwargs["columns"][0] not in rows.column_names:
        raise NoColumn(kwargs["path"], rows.column_names)
    rows = rows.select_columns(
        [name for name in kwargs.get("columns", rows.column_names) if name in rows.column_names]
    )
    return rows.to_iterable_dataset(max(1, len(rows.cache_files))) if kwargs.get("streaming") else rows


def plain(kwargs: Mapping) -> dict:
    """The same as dicts and lists through and through: libraries do not know OmegaConf's."""
    return OmegaConf.to_container(OmegaConf.create(dict(kwargs)), resolve=True)


def first_rows(
    section: str, load_dataset_kwargs: dict, stream: datasets.IterableDataset, num_rows: int
) -> datasets.Dataset:
    """The first rows of a stream, held in memory."""
    with one_sentence(section, load_dataset_kwargs):
        rows = list(islice(stream.with_format("arrow"), num_rows))
        return datasets.Dataset(InMemoryTable(pa.concat_tables(rows, promote_options="permissive")))


class NoRows(Exception):
    """The data has none."""


@contextmanager
def one_sentence(
    section: str, load_dataset_kwargs: dict, columns: dict[str, str] | None = None, looks_like: str = ""
) -> Iterator[None]:
    """Whatever `datasets` raises in the block becomes a ValueError of one sentence that names `section`."""
    load_dataset_kwargs = plain(load_dataset_kwargs)
    name, path = f"{section}.load_dataset_kwargs", load_dataset_kwargs.get("path")
    files = redacted(load_dataset_kwargs.get("data_files"))
    try:
        yield
    except Exception as error:  # whatever its readers raise: Arrow's, JSON's, the system's, the hub's and its own
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if reason.startswith(name):
            raise
        if isinstance(cause, NoColumn):
            ((key, column),) = columns.items()
            sentence = f"{section}.{key}={column}: the data has no such column; it has {', '.join(cause.names)}"
            sentence += f" ({cause.file})."
        elif isinstance(error, NoRows) or "corresponds to no data" in reason:
            way_out = f"give one with some{looks_like}"
            if section == "validation":
                way_out = f"give more rows, or set {name}=null"
            sentence = f"{name}: split={load_dataset_kwargs.get('split')} of {files or path} has no rows; {way_out}."
        elif isinstance(cause, UnicodeDecodeError):
            sentence = f"{name}.data_files={files}: no UTF-8 text ({reason}); convert it"
            sentence += (
                f", or name its encoding: +{name}.encoding=latin-1." if path in ("csv", "json", "text") else "."
            )
        elif place := unwritable(load_dataset_kwargs, error):
            sentence = f"{name}: {place}; set HF_HOME or HF_DATASETS_CACHE to a folder that can be written and locked."
        else:
            sentence = f"{name}: datasets cannot load {redacted(load_dataset_kwargs)}: {reason}"
        raise ValueError(sentence) from error


def unwritable(kwargs: dict, error: Exception) -> str | None:
    """Which cache cannot be used and why, if that is what is wrong."""
    cache = Path(kwargs.get("cache_dir") or datasets.config.HF_DATASETS_CACHE).absolute()
    for one in filter(None, (error, error.__cause__, error.__context__)):
        if "flock" in str(one) or getattr(one, "errno", None) in (errno.ENOLCK, errno.ENOSYS):
            return f"the cache {cache} has no file locks"
        if isinstance(one, OSError) and isinstance(one.filename, str):
            file = Path(one.filename).absolute()
            if file.is_relative_to(cache) or cache.is_relative_to(file):
                return f"the cache {cache} cannot be written ({one.strerror})"
    return None


def check_column(section: str, key: str, column: str, names: list[str]) -> None:
    """Raise ValueError unless the data has the column."""
    if column not in names:
        raise ValueError(f"{section}.{key}={column}: the data has no such column; it has {', '.join(names)}.")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes: what Parquet files that do not say "text" are read as."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


class Column:
    """Random access to one column of a memory-mapped data set: only the rows asked for are read."""

    def __init__(self, rows: datasets.Dataset, name: str):
        self.rows, self.name = rows.with_format("arrow", columns=[name]), name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> pa.ChunkedArray:
        # Not by pyarrow's chunks: 65 million rows have 65,000 of them, and to list those takes longer than to read.
        return self.rows[indices].combine_chunks()[self.name]  # it gives each row as a chunk, slow to go through


def share_of(
    section: str, stream: datasets.IterableDataset, distributed: Distributed, num_workers: int
) -> tuple[datasets.IterableDataset, int]:
    """The part of a stream that this rank reads, and how many workers can share it.

    Raises ValueError if there are none for one of them: it would look for a row for ever.
    """
    rank, num_ranks = distributed.data_rank, distributed.num_data_ranks
    share = split_dataset_by_node(stream, rank, num_ranks)
    num_workers = min(num_workers, share.num_shards)
    for worker in range(max(1, num_workers)):
        part = share
        if num_workers > 1 and stream.num_shards % num_ranks == 0:  # each rank has files of its own
            part = stream.shard(num_ranks * num_workers, rank + num_ranks * worker, contiguous=False)
        elif num_workers > 1:  # all ranks read all files, and each takes rows of its own
            part = split_dataset_by_node(
                stream.shard(num_workers, worker, contiguous=False), rank, num_ranks, "examples"
            )
        if next(iter(part), None) is None:
            raise ValueError(
                f"{section}.load_dataset_kwargs.streaming=true: the stream has no row for worker {worker} of rank "
                f"{rank}; use fewer ranks or a smaller {section}.num_workers than {num_workers}, or streaming=false."
            )
    return share, num_workers
