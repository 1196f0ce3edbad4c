# SPDX-License-Identifier: Apache-2.0
"""What every test of a recipe stands on: no network is asked, no cache is left, no process group outlives its test.

A conftest.py takes it over by `from common.contract.fixtures import *`.
"""

import multiprocessing
import os
import sys
import tempfile
from functools import partial


from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import pytest


CACHE = tempfile.TemporaryDirectory(prefix="recipe_tests_")  # removed when pytest ends
os.environ["HF_DATASETS_CACHE"] = CACHE.name
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which the next import does
# Read once, at a process's first matrix product on a GPU: a deterministic run may come after others.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
from common.contract.running import THIS_RECIPE, straight_run  # noqa: E402


__all__ = ["distributed", "no_group_of_an_earlier_test", "pytest_collection_modifyitems", "straight"]
# Ranks and workers are forked from a server that has imported these once.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.tensor", "torchdata.stateful_dataloader", "hydra", "megatron_fsdp", *THIS_RECIPE.PRELOAD]
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Of a test marked `rotated`, which runs for each trainer and other options, all but one trainer each are slow."""
    groups: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("rotated"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in groups.values():
        trainers = list(dict.fromkeys(item.callspec.params["trainer"] for item in group))
        others = [{**item.callspec.params, "trainer": None} for item in group]
        for item, other in zip(group, others, strict=True):
            turn = [one for i, one in enumerate(others) if one not in others[:i]].index(other)
            if item.callspec.params["trainer"] != trainers[turn % len(trainers)]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_group_of_an_earlier_test():
    """Groups end with their test, although DTensor's caches keep them."""
    yield
    running = sys.modules["common.contract.running"]
    if running.has_groups():
        running.forget_groups()


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A function from a trainer to the folder of a run that was never stopped; pytest's processes share it."""
    base = tmp_path_factory.getbasetemp()
    return partial(straight_run, base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def distributed():
    """A process group of this process alone."""
    from common.distributed import process_group

    with process_group(seed=0) as alone:
        yield alone
