# SPDX-License-Identifier: Apache-2.0
"""SCDL folders as BioNeMo 2 has them, read only: memory maps of numbers, called .npy, without a header of their own.

Of two generations: without a header data is float32, columns uint32 and pointers uint64; with `header.sch` it says
what they are. Genes are in parquet files of `var_features` or `features`, one for each stretch of cells.
Source: the schema of bionemo-scdl 0.1.
"""

import json
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cells.h5ad import sparse_blocks
from cells.rank_values import Block


FILES = {"DATA": "data.npy", "ROWPTR": "row_ptr.npy", "COLPTR": "col_ptr.npy"}
WITHOUT_HEADER = {"DATA": "float32", "ROWPTR": "uint64", "COLPTR": "uint32"}
TYPES = {1: "uint8", 2: "uint16", 3: "uint32", 4: "uint64", 5: "float16", 6: "float32", 7: "float64"}


def scdl_folders(path: Path) -> list[Path]:
    """The folders of that kind at a path and below it."""
    return sorted(file.parent for file in path.rglob(FILES["ROWPTR"])) if path.is_dir() else []


def read_header(file: Path) -> dict[str, tuple[int, str]]:
    """Length and type of each array. Raises ValueError for a file that is no such header, or is cut short."""
    data, at = file.read_bytes(), 16
    try:
        if data[:4] != b"SCDL":
            raise ValueError
        found = {}
        for _ in range(struct.unpack(">I", data[12:16])[0]):
            (size,) = struct.unpack(">I", data[at : at + 4])
            name = data[at + 4 : at + 4 + size].decode()
            at += 4 + size
            length, kind, shaped = struct.unpack(">QIB", data[at : at + 13])
            at += 13
            if shaped:
                at += 4 + 4 * struct.unpack(">I", data[at : at + 4])[0]
            found[name] = (length, TYPES[kind])
        if not FILES.keys() <= found.keys():
            raise ValueError
    except (struct.error, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no header of SCDL, or is cut short; write the folder anew.") from error
    return found


class Scdl:
    """One folder."""

    layer = None

    def __init__(self, path: str):
        self.path = Path(path)
        if missing := [name for name in FILES.values() if not (self.path / name).is_file()]:
            raise ValueError(f"{path} is no SCDL folder: it lacks {', '.join(missing)}.")

    def check(self) -> None:
        """Raise ValueError where files, header and metadata do not go together."""
        self._arrays  # noqa: B018
        genes = [len(next(iter(self.columns(number).values()))) for number in range(len(self.stretches))]
        if self.stretches and self.stretches[-1] != self.shape[0]:
            raise ValueError(
                f"{self.path}: genes are given for {self.stretches[-1]:,} cells, and there are {self.shape[0]:,}; "
                "write the folder anew."
            )
        most = int(self._arrays[1].max(initial=0)) if len(self._arrays[1]) <= 100_000 else 0
        if genes and most >= max(genes):
            raise ValueError(f"{self.path}: a cell has gene {most:,} of {max(genes):,}; write the folder anew.")

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        header = self.path / "header.sch"
        said = read_header(header) if header.is_file() else None
        found = {}
        for name, file in FILES.items():
            length, kind = said[name] if said else (None, WITHOUT_HEADER[name])
            size, width = (self.path / file).stat().st_size, np.dtype(kind).itemsize
            if size % width or (length is not None and size != length * width):
                expected = f"{length:,} numbers of {kind}, {length * width:,} bytes" if said else f"numbers of {kind}"
                way = "the header is stale, or the file cut short" if said else "it is cut short, or needs header.sch"
                raise ValueError(
                    f"{self.path / file} has {size:,} bytes, not {expected}: {way}; write the folder anew."
                )
            found[name] = np.memmap(self.path / file, kind, "r") if size else np.zeros(0, kind)
        pointers, entries = found["ROWPTR"], len(found["DATA"])
        metadata = self.path / "metadata.json"
        rows = json.loads(metadata.read_text()).get("num_rows") if metadata.is_file() else None
        # Of folders that bionemo-scdl has joined it says how many cells the first had: then the genes have to agree.
        if rows is not None and rows != len(pointers) - 1 and self.stretches[-1:] != [len(pointers) - 1]:
            raise ValueError(
                f"{self.path}: metadata.json says {rows:,} cells and row_ptr.npy, as {pointers.dtype}, has "
                f"{len(pointers) - 1:,}: {'the header is stale' if said else 'it needs header.sch'}; write it anew."
            )
        if len(pointers) < 2 or pointers[0] != 0 or pointers[-1] != entries or len(found["COLPTR"]) != entries:
            raise ValueError(
                f"{self.path}: row_ptr.npy ends with {int(pointers[-1]) if len(pointers) else 0:,}, and there are "
                f"{entries:,} counts and {len(found['COLPTR']):,} columns: "
                f"{'the header is stale' if said else 'it needs header.sch'}, or files are cut short; write it anew."
            )
        return found["ROWPTR"], found["COLPTR"], found["DATA"]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._arrays[0]) - 1, len(next(iter(self.columns(0).values())))

    @cached_property
    def _var(self) -> Path:
        for name in ("var_features", "features"):
            if (self.path / name).is_dir():
                return self.path / name
        raise ValueError(f"{self.path} lacks var_features, where the genes are; write the folder anew.")

    @cached_property
    def stretches(self) -> list[int]:
        """Where each stretch of cells with the same genes ends."""
        return [int(one) for one in np.load(self._var / "cumulative_sum_index.npy").tolist() if one > 0]

    def columns(self, stretch: int = 0) -> dict[str, list[str]]:
        """What is said of each column of the matrix in a stretch: names by the column of the table."""
        files = sorted(self._var.rglob("*.parquet"))
        if stretch >= len(files):
            raise ValueError(f"{self._var} has {len(files)} tables of genes, and more stretches; write it anew.")
        table = pq.read_table(files[stretch])
        texts = [field.name for field in table.schema
                 if not pa.types.is_floating(field.type) and not pa.types.is_nested(field.type)]  # fmt: skip
        found = {name: table[name].cast(pa.string()).to_pylist() for name in texts}
        if not found:
            raise ValueError(f"{files[stretch]} has no column with names of genes; write it anew.")
        return {name: [one or "" for one in column] for name, column in found.items()}

    def obs(self, name: str, first: int, stop: int) -> list[str] | None:
        """A column of obs_features for some cells, as text; None where there is none."""
        files = sorted((self.path / "obs_features").glob("*.parquet"))
        found, at = [], 0
        for file in files:
            with pq.ParquetFile(file) as table:
                if name not in table.schema_arrow.names:
                    return None
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if at < stop and at + rows > first:
                        column = table.read_row_group(group, columns=[name])[name].cast(pa.string())
                        found += column[max(0, first - at) : stop - at].to_pylist()
                    at += rows
        return [one or "" for one in found] if files else None

    def blocks(self, first: int, stop: int) -> Iterator[Block]:
        """The cells from `first` to `stop`, in blocks."""
        pointers, columns, values = self._arrays
        here = pointers[first : stop + 1].astype(np.int64)
        if (np.diff(here) < 0).any():
            raise ValueError(f"{self.path}: row_ptr.npy falls between rows {first} and {stop}; write the folder anew.")
        yield from sparse_blocks(first, here, columns, values)
