# SPDX-License-Identifier: Apache-2.0
"""Tests import the recipe's files by name, ask no network, and leave no cache behind."""

import json
import os
import sys
from pathlib import Path

import pytest


RECIPE = Path(__file__).parents[1]
sys.path.insert(0, str(RECIPE))
from common.contract.fixtures import *  # noqa: E402, F403
from common.contract.running import run_here  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A model to train further, after one step."""
    folder = tmp_path_factory.mktemp("base")
    options = ("num_train_steps=1", "checkpoint.save_final_model=true", "validation.load_dataset_kwargs=null")
    run_here("train_ddp", folder, *options, f"checkpoint.ckpt_dir={folder}")
    return folder / "final_model"


@pytest.fixture
def gene_classes(tmp_path) -> Path:
    """A file with two classes of the sample's genes."""
    classes = {"early": range(1, 150), "late": range(200, 350)}
    path = tmp_path / "genes.json"
    path.write_text(json.dumps({name: [f"ENSG{99 * 10**9 + i}" for i in some] for name, some in classes.items()}))
    return path


@pytest.fixture(scope="session")
def real_cells() -> str:
    """400 cells as tokens of Geneformer's first vocabulary, where this checkout has them."""
    beside = [parent / "shared" / "data" for parent in RECIPE.parents]
    folder = Path(os.environ.get("TEST_DATA") or next((path for path in beside if path.is_dir()), "shared/data"))
    if not (folder / "single_cells_400.parquet").exists():
        pytest.skip(f"no single_cells_400.parquet in {folder}")
    return str(folder / "single_cells_400.parquet")
