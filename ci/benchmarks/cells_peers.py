# SPDX-License-Identifier: Apache-2.0
"""One of the peers' ways to read cells, for cells_speed.py, which starts it where they are installed; prints JSON."""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np


AT_ONCE = 1000  # cells in order
BATCH = 32  # cells at random


def peak_gib() -> float:
    """The largest resident set of this process; not `ru_maxrss`, which begins with that of whoever started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**20


def anndata_in_order(folder: str, order: np.ndarray):
    """A thousand rows of a backed file at a time."""
    import anndata

    backed = anndata.read_h5ad(f"{folder}/cells.h5ad", backed="r")
    yield 0
    for first in range(0, backed.n_obs, AT_ONCE):
        yield backed.X[first : first + AT_ONCE].shape[0]


def anndata_at_random(folder: str, order: np.ndarray):
    """Rows of a batch, sorted, as a backed file wants them."""
    import anndata

    backed = anndata.read_h5ad(f"{folder}/cells.h5ad", backed="r")
    yield 0
    for first in range(0, len(order), BATCH):
        yield backed.X[np.sort(order[first : first + BATCH])].shape[0]


def scdl_rows(folder: str, rows: np.ndarray):
    """Rows of a folder one by one, with the ids of their genes, as BioNeMo's data set asks for them."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    cells = SingleCellMemMapDataset(f"{folder}/peer_scdl")
    yield 0
    for row in rows.tolist():
        (values, columns), _, _ = cells.get_row(row, return_var_features=True, var_feature_names=["feature_id"])
        np.array(values), np.array(columns)
        yield 1


def scdl_in_order(folder: str, order: np.ndarray):
    """From the first on."""
    return scdl_rows(folder, np.sort(order))


def scdl_at_random(folder: str, order: np.ndarray):
    """In a shuffled order."""
    return scdl_rows(folder, order)


def main() -> None:
    """Run for some seconds, and print what it gave."""
    name, folder, cells, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    if name == "convert":
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

        SingleCellMemMapDataset(f"{folder}/peer_scdl", f"{folder}/cells.h5ad", use_X_not_raw=True)
        return
    work = globals()[name](folder, np.random.default_rng(0).permutation(cells))
    next(work)  # opened
    started, number = time.perf_counter(), 0
    for some in islice(work, cells):
        number += some
        if time.perf_counter() - started > seconds:
            break
    spent = time.perf_counter() - started
    print(json.dumps({"cells_per_s": number / spent, "memory_gib": peak_gib()}))


if __name__ == "__main__":
    main()
