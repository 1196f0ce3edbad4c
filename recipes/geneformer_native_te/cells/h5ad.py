# SPDX-License-Identifier: Apache-2.0
"""h5ad files by ranges of rows, straight from HDF5: sparse by rows or by columns, or dense, of old and new versions.

Which matrix has the counts: `layer` if it is named; else the first of raw.X, X, layers/counts and layers/raw_counts
whose first cells are whole numbers. Files are opened to read only, and no more than a block is in memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from cells.dictionaries import setting
from cells.rank_values import Block


LAYERS = ("raw/X", "raw.X", "X", "layers/counts", "layers/raw_counts")
CELLS, ENTRIES = 1024, 4_000_000  # of a block, at most
LOOKED_AT = 1000  # cells


@contextmanager
def sentence_for(path: Path):
    """What HDF5 raises in the block becomes a ValueError of one sentence."""
    try:
        yield
    except (OSError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if "truncated" in reason or "eof" in reason:
            reason = "the file is cut short; copy it anew"
        elif "signature not found" in reason:
            reason = "it is no HDF5 file"
        raise ValueError(f"{path} cannot be read: {reason}.".replace("..", ".")) from error


def texts(node: h5py.Group | h5py.Dataset, rows: slice = slice(None)) -> list[str]:
    """A column of obs or var as text: strings, categories, numbers."""
    if isinstance(node, h5py.Group):
        if "categories" in node:
            names = texts(node["categories"])
            return [names[code] if code >= 0 else "" for code in node["codes"][rows].tolist()]
        return texts(node["values"], rows)  # strings or numbers with a mask
    return [one.decode() if isinstance(one, bytes) else str(one) for one in node[rows].tolist()]


def index_of(frame: h5py.Group) -> str:
    """Which column of obs or var is its index."""
    name = frame.attrs.get("_index", "_index")
    return name.decode() if isinstance(name, bytes) else name


class H5ad:
    """One file; `layer` is what `choose_layer` has said, `by_rows` the folder with what `transpose` wrote."""

    def __init__(self, path: str, layer: str | None = None, by_rows: Path | None = None):
        self.path, self.layer, self.by_rows = Path(path), layer, by_rows
        with sentence_for(self.path):
            self.file = h5py.File(path)
            if "X" not in self.file and "raw/X" not in self.file and not self.file.get("layers"):
                raise ValueError(f"{path} is no h5ad file: there is no X in it.")

    @property
    def layers(self) -> list[str]:
        """All matrices of the file that could have counts, in the order in which they are asked."""
        others = [f"layers/{name}" for name in self.file.get("layers", ())]
        return [name for name in dict.fromkeys([*LAYERS, *others]) if name in self.file]

    @cached_property
    def matrix(self) -> h5py.Group | h5py.Dataset:
        return self.file[self.layer]

    @cached_property
    def form(self) -> str:
        """How it is kept: csr, csc or dense."""
        if isinstance(self.matrix, h5py.Dataset):
            return "dense"
        kind = self.matrix.attrs.get("encoding-type", self.matrix.attrs.get("h5sparse_format", ""))
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        if kind[:3] not in ("csr", "csc"):
            raise ValueError(
                f"{self.path}: {self.layer} is kept as {kind or 'an unknown kind'}, not as csr, csc or dense."
            )
        return kind[:3]

    @cached_property
    def shape(self) -> tuple[int, int]:
        if self.form == "dense":
            return self.matrix.shape
        attributes = self.matrix.attrs
        found = attributes["shape"] if "shape" in attributes else attributes["h5sparse_shape"]
        return int(found[0]), int(found[1])

    def check(self) -> None:
        """Raise ValueError where the parts of a matrix do not fit together."""
        with sentence_for(self.path):
            if self.form == "dense":
                return
            pointers, entries = self.matrix["indptr"], len(self.matrix["data"])
            lines = self.shape[self.form == "csc"]
            if len(pointers) != lines + 1 or int(pointers[-1]) != entries or len(self.matrix["indices"]) != entries:
                raise ValueError(
                    f"{self.path}: {self.layer} is damaged: indptr has {len(pointers):,} numbers for {lines:,} lines "
                    f"and ends with {int(pointers[-1]):,} for {entries:,} entries."
                )

    # ---- names

    def columns(self) -> dict[str, list[str]]:
        """What var says of each column of the matrix: names by the column of var, "index" first."""
        inside = self.layer.startswith("raw")
        with sentence_for(self.path):
            var = self.file["raw.var" if self.layer == "raw.X" else "raw/var" if inside else "var"]
            if isinstance(var, h5py.Dataset):  # of anndata before 0.7: an array of records
                index = next((name for name in ("index", "_index") if name in var.dtype.names), var.dtype.names[0])
                names = {"index": index} | {name: name for name in var.dtype.names if name != index}
                return {name: [one.decode() if isinstance(one, bytes) else str(one) for one in var[field].tolist()]
                        for name, field in names.items() if var.dtype[field].kind in "SO"}  # fmt: skip
            index = index_of(var)
            return {"index": texts(var[index])} | {
                name: texts(node) for name, node in var.items() if name != index and _is_text(node)
            }

    def obs(self, name: str, first: int, stop: int) -> list[str] | None:
        """A column of obs for some cells, as text; None where there is none."""
        with sentence_for(self.path):
            obs = self.file.get("obs")
            if isinstance(obs, h5py.Dataset):
                return [str(one) for one in obs[name][first:stop].tolist()] if name in obs.dtype.names else None
            return texts(obs[name], slice(first, stop)) if obs is not None and name in obs else None

    # ---- counts

    def transpose(self, folder: Path, progress=lambda entries: None) -> None:
        """Write a matrix that is kept by columns by rows, into files; memory for a stretch and the pointers."""
        cells, indptr = self.shape[0], self.matrix["indptr"][:].astype(np.int64)
        entries = int(indptr[-1])
        kinds = {"columns": np.dtype(np.int32), "values": self.matrix["data"].dtype}
        out = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (entries,))
               for name, kind in kinds.items()}  # fmt: skip
        for one in out.values():  # now, because a disk that fills up while a map is written ends the process
            with open(one.filename, "r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, one.offset + one.nbytes)
        with sentence_for(self.path):
            counts = np.zeros(cells, np.int64)
            for a in range(0, entries, ENTRIES):
                counts += np.bincount(self.matrix["indices"][a : a + ENTRIES], minlength=cells)
            pointers = np.concatenate(([0], np.cumsum(counts)))
            np.save(folder / "indptr.npy", pointers)
            free = pointers[:-1].copy()
            for a in range(0, entries, ENTRIES):
                rows = self.matrix["indices"][a : a + ENTRIES].astype(np.int64)
                columns = np.searchsorted(indptr, np.arange(a, a + len(rows)), side="right") - 1
                order = np.argsort(rows, kind="stable")
                rows = rows[order]
                begins = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
                sizes = np.diff(np.r_[begins, len(rows)])
                to = free[rows] + np.arange(len(rows)) - np.repeat(begins, sizes)
                out["columns"][to], out["values"][to] = columns[order], self.matrix["data"][a : a + ENTRIES][order]
                free[rows[begins]] += sizes
                progress(len(rows))
            for one in out.values():
                one.flush()

    def _arrays(self) -> tuple:
        if self.by_rows is not None:
            return tuple(
                np.load(self.by_rows / f"{name}.npy", mmap_mode="r") for name in ("indptr", "columns", "values")
            )
        return self.matrix["indptr"], self.matrix["indices"], self.matrix["data"]

    def blocks(self, first: int, stop: int) -> Iterator[Block]:
        """The cells from `first` to `stop`, in blocks."""
        with sentence_for(self.path):
            if self.form == "dense":
                cells = max(1, min(CELLS, ENTRIES // max(1, self.shape[1])))
                for a in range(first, stop, cells):
                    dense = self.matrix[a : min(a + cells, stop)]
                    rows, columns = np.nonzero(dense)
                    yield Block(a, np.searchsorted(rows, np.arange(len(dense) + 1)), columns, dense[rows, columns])
                return
            if self.form == "csc" and self.by_rows is None:
                raise ValueError(f"{self.path}: {self.layer} is kept by columns, and was not transposed.")
            indptr, columns, values = self._arrays()
            pointers = np.asarray(indptr[first : stop + 1]).astype(np.int64)
            yield from sparse_blocks(first, pointers, columns, values)


def sparse_blocks(first: int, pointers: np.ndarray, columns, values) -> Iterator[Block]:
    """Blocks of at most CELLS cells and, but for a single cell, ENTRIES entries; `pointers` are of these cells."""
    at = 0
    while at < len(pointers) - 1:
        end = int(np.searchsorted(pointers, pointers[at] + ENTRIES, side="right")) - 1
        end = min(max(end, at + 1), at + CELLS, len(pointers) - 1)
        a, b = int(pointers[at]), int(pointers[end])
        yield Block(first + at, pointers[at : end + 1] - a, np.asarray(columns[a:b]), np.asarray(values[a:b]))
        at = end


def _is_text(node: h5py.Group | h5py.Dataset) -> bool:
    if isinstance(node, h5py.Group):
        inner = node.get("categories", node.get("values"))
        return inner is not None and (isinstance(inner, h5py.Group) or inner.dtype.kind in "SO")
    return node.ndim == 1 and node.dtype.kind in "SO"


def first_cells(path: str, layer: str) -> np.ndarray:
    """Whether each of the first cells has whole counts only; of a matrix kept by columns, its first entries."""
    one = H5ad(path, layer)
    one.check()
    if one.form == "csc":
        with sentence_for(one.path):
            values = one.matrix["data"][: LOOKED_AT * 1000]
        return ~np.isfinite(values) | (values == np.floor(values))
    found = []
    for block in one.blocks(0, min(LOOKED_AT, one.shape[0])):
        broken = ~np.isfinite(block.values) | (block.values == np.floor(block.values))
        found.append(np.bincount(block.rows[~broken], minlength=len(block.indptr) - 1) == 0)
    return np.concatenate(found) if found else np.ones(1, bool)


def choose_layer(path: str, section: str, wanted: str | None, whole: bool = True) -> str:
    """Which matrix of a file has its counts. Raises ValueError where none is of whole numbers, if `whole`."""
    file = H5ad(path)
    if not (there := file.layers):
        raise ValueError(f"{path} has no matrix: neither X, raw.X nor layers.")
    if wanted is not None:
        forms = {"raw": ("raw/X", "raw.X"), "raw.X": ("raw/X", "raw.X")}.get(wanted, (wanted, f"layers/{wanted}"))
        there = [name for name in forms if name in there]
        if not there:
            raise ValueError(
                f"{setting(section, 'layer')}={wanted}: {path} has no such matrix; it has {', '.join(file.layers)}."
            )
    candidates = [name for name in there if wanted or name in LAYERS]
    if not candidates:
        raise ValueError(
            f"{path} has neither X nor raw.X; {setting(section, 'layer')} names one of {', '.join(there)}."
        )
    for name in candidates:
        if first_cells(path, name).mean() >= 0.5 or not whole:
            return name
    gene, row, value = first_fraction(H5ad(path, candidates[-1] if len(candidates) == 1 else candidates[0]))
    raise ValueError(
        f"{path}: {' and '.join(candidates)} {'have' if len(candidates) > 1 else 'has'} no counts: {value:g} for gene "
        f"{gene}{row}; normalised data cannot be ranked; give raw counts in raw.X, or name the layer that "
        f"holds them by {setting(section, 'layer')}."
    )


def first_fraction(file: H5ad) -> tuple[str, str, float]:
    """The gene, the cell and the value of the first number that is not whole."""
    names = file.columns()["index"]
    if file.form == "csc":
        with sentence_for(file.path):
            values, indptr = file.matrix["data"][: LOOKED_AT * 1000], file.matrix["indptr"][:]
        at = int(np.flatnonzero(values != np.floor(values))[0])
        row = int(file.matrix["indices"][at])
        return names[int(np.searchsorted(indptr, at, side="right")) - 1], f" in row {row}", float(values[at])
    for block in file.blocks(0, file.shape[0]):
        wrong = np.flatnonzero(block.values != np.floor(block.values))
        if len(wrong):
            row = block.first + int(np.searchsorted(block.indptr, wrong[0], side="right")) - 1
            return names[int(block.columns[wrong[0]])], f" in row {row}", float(block.values[wrong[0]])
    raise AssertionError(file.path)
