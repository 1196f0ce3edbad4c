# SPDX-License-Identifier: Apache-2.0
"""Tests import the recipe's files by name, ask no network, and leave no cache behind."""

import os
import sys
from pathlib import Path

import pytest


RECIPE = Path(__file__).parents[1]
sys.path.insert(0, str(RECIPE))
from common.contract.fixtures import *  # noqa: E402, F403


@pytest.fixture(scope="session")
def real_cells() -> str:
    """400 cells as tokens of Geneformer's first vocabulary, where this checkout has them."""
    beside = [parent / "shared" / "data" for parent in RECIPE.parents]
    folder = Path(os.environ.get("TEST_DATA") or next((path for path in beside if path.is_dir()), "shared/data"))
    if not (folder / "single_cells_400.parquet").exists():
        pytest.skip(f"no single_cells_400.parquet in {folder}")
    return str(folder / "single_cells_400.parquet")
