# SPDX-License-Identifier: Apache-2.0
"""Tests import the recipe's files by name, ask no network, and leave no cache behind."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import pytest


RECIPE = Path(__file__).parents[1]
sys.path.insert(0, str(RECIPE))
import quiet  # noqa: E402, F401


CACHE = tempfile.TemporaryDirectory(prefix="esm2_tests_")  # removed when pytest ends
os.environ["HF_DATASETS_CACHE"] = CACHE.name
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read once, at a process's first matrix product on a GPU: a deterministic run may come after others.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Ranks and workers are forked from a server that has imported these once.
multiprocessing.set_forkserver_preload([
    "torch.distributed.tensor", "datasets", "torchdata.stateful_dataloader", "hydra", "megatron_fsdp",
    "transformers.models.esm.modeling_esm",
])  # fmt: skip


@pytest.fixture(autouse=True)
def no_group_of_an_earlier_test():
    """Groups end with their test, although DTensor's caches keep them."""
    yield
    running = sys.modules.get("running")
    if running and running.has_groups():
        running.forget_groups()


@pytest.fixture
def distributed():
    """A process group of this process alone."""
    from distributed import process_group

    with process_group(seed=0) as alone:
        yield alone


@pytest.fixture(scope="session")
def real_proteins() -> str:
    """8,000 UniRef proteins, where this checkout has them."""
    beside = [parent / "shared" / "data" for parent in RECIPE.parents]
    folder = Path(os.environ.get("TEST_DATA") or next((path for path in beside if path.is_dir()), "shared/data"))
    if not (folder / "proteins_8k.parquet").exists():
        pytest.skip(f"no proteins_8k.parquet in {folder}")
    return str(folder / "proteins_8k.parquet")
