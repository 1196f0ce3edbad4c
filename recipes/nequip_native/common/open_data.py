# SPDX-License-Identifier: Apache-2.0
"""Rows by `datasets.load_dataset`, where a user's mistake is one sentence."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.distributed import split_dataset_by_node
from datasets.table import InMemoryTable
from omegaconf import OmegaConf

from common.distributed import Distributed
from common.redaction import redacted


def open_rows(section: str, load_dataset_kwargs: dict) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset`; a user's mistake is a ValueError of one sentence that names `section`."""
    load_dataset_kwargs = plain(load_dataset_kwargs)
    # Else the hub is asked to count each local file: seconds, where none answers.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    name, path = f"{section}.load_dataset_kwargs", load_dataset_kwargs.get("path")
    files = load_dataset_kwargs.get("data_files")
    if path in ("parquet", "arrow", "csv", "json", "text", "fasta") and "data_dir" not in load_dataset_kwargs:
        if not files:  # datasets would read whatever lies in the working folder
            raise ValueError(f"{name}.data_files is not set; path={path} needs a file, a pattern or a list of them.")
        for pattern in _patterns(files):
            found = [] if "://" in pattern else [Path(match) for match in glob(pattern, recursive=True)]
            if not found and "://" not in pattern:
                raise ValueError(
                    f"{name}.data_files={pattern}: no such file; give a full path or one from {Path.cwd()}."
                )
            if empty := [str(file) for file in found if file.stat().st_size == 0]:
                raise ValueError(f"{name}.data_files={empty[0]}: the file is empty; give one with rows in it.")
    if path == "parquet":  # by default a row group at once, and an error where a file among others has no rows
        load_dataset_kwargs = {"batch_size": 10_000, **load_dataset_kwargs}
    with one_sentence(section, load_dataset_kwargs):
        rows = datasets.load_dataset(**load_dataset_kwargs)
        if isinstance(rows, dict):
            raise ValueError(f"{name}.split is not set; this data set has the splits {', '.join(rows)}.")
        # A stream opens its files only when it is asked for a row; as Arrow, because text need not decode.
        if next(iter(rows.with_format("arrow")), None) is None:
            raise NoRows
    return rows


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
def one_sentence(section: str, load_dataset_kwargs: dict) -> Iterator[None]:
    """Whatever `datasets` raises in the block becomes a ValueError of one sentence that names `section`."""
    load_dataset_kwargs = plain(load_dataset_kwargs)
    name, path = f"{section}.load_dataset_kwargs", load_dataset_kwargs.get("path")
    files = load_dataset_kwargs.get("data_files")
    try:
        yield
    except Exception as error:  # whatever its readers raise: Arrow's, JSON's, the system's, the hub's and its own
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if reason.startswith(name):
            raise
        if isinstance(error, NoRows) or "corresponds to no data" in reason:
            way_out = "give one with some"
            if section == "validation":
                way_out = f"give more rows, or set {name}=null"
            elif path == "fasta":
                way_out += ", each after a line that begins with >"
            sentence = f"{name}: split={load_dataset_kwargs.get('split')} of {files or path} has no rows; {way_out}."
        elif isinstance(cause, UnicodeDecodeError):
            sentence = f"{name}.data_files={files}: no UTF-8 text ({reason}); convert it"
            sentence += (
                f", or name its encoding: +{name}.encoding=latin-1." if path in ("csv", "json", "text") else "."
            )
        else:
            sentence = f"{name}: datasets cannot load {redacted(load_dataset_kwargs)}: {reason}"
        raise ValueError(sentence) from error


def _patterns(files: str | Iterable[str] | Mapping) -> list[str]:
    """`data_files` is a pattern, a list of them, or either by split."""
    if isinstance(files, str):
        return [files]
    if isinstance(files, Mapping):
        return [pattern for some in files.values() for pattern in _patterns(some)]
    return list(files)


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
