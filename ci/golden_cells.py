#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the small files of cells, by anndata and bionemo-scdl, that the tests of Geneformer's recipe read.

    python3.11 -m venv env && env/bin/pip install torch==2.13.0 bionemo-scdl==0.1.3 anndata==0.12.19
    env/bin/python ci/golden_cells.py

Into recipes/geneformer_native_te/tests/golden_cells: counts as anndata writes them (by rows with raw, by columns,
dense), the SCDL folder that bionemo-scdl makes of the first, and what the two read of them, in golden.json.
"""

import json
import os
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset


OUT = Path(__file__).resolve().parents[1] / "recipes/geneformer_native_te/tests/golden_cells"


def main() -> None:
    """Write all of it."""
    warnings.filterwarnings("ignore")
    random = np.random.default_rng(0)
    dense = (random.poisson(3.0, (9, 12)) * (random.random((9, 12)) < 0.5)).astype(np.float32)
    dense[:, 0] += 1
    var = pd.DataFrame({"feature_id": [f"ENSG{i:011d}" for i in range(12)], "mean": dense.mean(0)},
                       index=[f"GENE{i}" for i in range(12)])  # fmt: skip
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", "b", "a"] * 3), "donor": [f"d{i}" for i in range(9)]},
                       index=[f"cell{i}" for i in range(9)])  # fmt: skip
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    with_raw = anndata.AnnData(sp.csr_matrix(dense), obs, var)
    with_raw.raw = with_raw.copy()
    with_raw.X = sp.csr_matrix(np.log1p(dense))
    with_raw.write_h5ad(OUT / "raw_csr.h5ad", compression="gzip")
    anndata.AnnData(sp.csc_matrix(dense), obs, var).write_h5ad(OUT / "csc.h5ad", compression="gzip")
    anndata.AnnData(dense, obs, var).write_h5ad(OUT / "dense.h5ad", compression="gzip")
    os.chdir(OUT)  # the folder keeps the name of its source
    SingleCellMemMapDataset("scdl", "raw_csr.h5ad")
    read = anndata.read_h5ad(OUT / "raw_csr.h5ad")
    assert (read.raw.X.toarray() == dense).all()
    with tempfile.TemporaryDirectory() as folder:  # it opens what it reads to write
        shutil.copytree(OUT / "scdl", f"{folder}/scdl")
        scdl = SingleCellMemMapDataset(f"{folder}/scdl")
        rows = [scdl.get_row_padded(i, return_var_features=True, var_feature_names=["feature_id"]) for i in range(9)]
    assert all((row[0] == cell).all() for row, cell in zip(rows, dense, strict=True))
    found = {
        "versions": {name: version(name) for name in ("anndata", "bionemo-scdl")},
        "counts": dense.astype(int).tolist(),
        "genes": list(map(str, rows[0][1][0])),
        "cell_type": read.obs["cell_type"].tolist(),
        "donor": read.obs["donor"].tolist(),
    }
    (OUT / "golden.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
