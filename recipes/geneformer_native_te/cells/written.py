# SPDX-License-Identifier: Apache-2.0
"""Small matrices of counts written as h5ad and as SCDL, as other programs write them: for the sample and for tests."""

import json
import struct
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def csr(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pointers, columns and values of what is not 0."""
    rows, columns = np.nonzero(dense)
    return np.searchsorted(rows, np.arange(len(dense) + 1)), columns.astype(np.int32), dense[rows, columns]


def mark(node: h5py.Group | h5py.Dataset, kind: str, version: str, **more) -> h5py.Group | h5py.Dataset:
    """The same, with what anndata wants to know of it."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version, **more})
    return node


def write_matrix(parent: h5py.Group, name: str, dense: np.ndarray, form: str) -> None:
    """Dense, csr or csc."""
    if form == "dense":
        mark(parent.create_dataset(name, data=dense), "array", "0.2.0")
        return
    pointers, columns, values = csr(dense if form == "csr" else dense.T)
    node = mark(parent.create_group(name), f"{form}_matrix", "0.1.0", shape=np.array(dense.shape))
    for key, array in {"indptr": pointers, "indices": columns, "data": values}.items():
        node.create_dataset(key, data=array, compression=9, shuffle=True)


def write_frame(parent: h5py.Group, name: str, index: list[str], columns: dict[str, list] | None = None) -> None:
    """A table as of obs or var; text columns as categories."""
    text, order = h5py.string_dtype(), np.array(list(columns or {}), dtype=h5py.string_dtype())
    frame = mark(parent.create_group(name), "dataframe", "0.2.0", _index="_index", **{"column-order": order})
    mark(frame.create_dataset("_index", data=index, dtype=text), "string-array", "0.2.0")
    for key, column in (columns or {}).items():
        if isinstance(column[0], str):
            names, codes = np.unique(column, return_inverse=True)
            group = mark(frame.create_group(key), "categorical", "0.2.0", ordered=False)
            mark(group.create_dataset("categories", data=names.tolist(), dtype=text), "string-array", "0.2.0")
            mark(
                group.create_dataset("codes", data=codes.astype(np.int8 if len(names) < 128 else np.int32)),
                "array",
                "0.2.0",
            )
        else:
            mark(frame.create_dataset(key, data=np.array(column)), "array", "0.2.0")


def write_h5ad(path: Path, dense: np.ndarray, names: list[str], form: str = "csr", raw: bool = False,
               var: dict | None = None, obs: dict | None = None, layers: dict | None = None) -> Path:  # fmt: skip
    """A file; with `raw` the counts are in raw.X, and X has their logarithms."""
    with h5py.File(path, "w") as file:
        mark(file, "anndata", "0.1.0")
        write_matrix(file, "X", np.log1p(dense) if raw else dense, form)
        write_frame(file, "var", names, var)
        write_frame(file, "obs", [f"cell{i}" for i in range(len(dense))], obs)
        if raw:
            write_matrix(mark(file.create_group("raw"), "raw", "0.1.0"), "X", dense, form)
            write_frame(file["raw"], "var", names, var)
        if layers:
            mark(file.create_group("layers"), "dict", "0.1.0")
        for name, layer in (layers or {}).items():
            write_matrix(file["layers"], name, layer, form)
    return path


def write_scdl(folder: Path, dense: np.ndarray, names: list[str], header: bool = False) -> Path:
    """A folder, of the first generation, or with a header and the smallest types."""
    pointers, columns, values = csr(dense)
    small = (np.min_scalar_type(len(values)), np.min_scalar_type(dense.shape[1] - 1))
    kinds = (np.float32, *(small if header else (np.uint64, np.uint32)))
    features = folder / ("var_features" if header else "features")
    features.mkdir(parents=True)
    out = b"SCDL" + bytes([0, 1, 0, 1]) + struct.pack(">II", 1, 3)
    for (name, file), array, kind in zip(
        (("DATA", "data"), ("ROWPTR", "row_ptr"), ("COLPTR", "col_ptr")), (values, pointers, columns), kinds,
        strict=True,
    ):  # fmt: skip
        array.astype(kind).tofile(folder / f"{file}.npy")
        number = {"uint8": 1, "uint16": 2, "uint32": 3, "float32": 6}.get(np.dtype(kind).name, 0)
        out += struct.pack(">I", len(name)) + name.encode() + struct.pack(">QIB", len(array), number, 0)
    if header:
        (folder / "header.sch").write_bytes(out + struct.pack(">I", 0))
    (folder / "metadata.json").write_text(json.dumps({"num_rows": len(dense)}))
    (folder / "version.json").write_text('"0.1.3"')
    pq.write_table(pa.table({"feature_id": names}), features / "dataframe_0.parquet")
    for name, array in (("cumulative_sum_index", [-1, len(dense)]), ("labels", [folder.name]), ("version", "0.1.3")):
        np.save(features / f"{name}.npy", np.array(array))
    return folder
