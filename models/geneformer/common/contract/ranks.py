# SPDX-License-Identifier: Apache-2.0
"""What tests share: call a function on ranks, compare batches, judge a distribution."""

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing

from common.batch import Batch
from common.contract.running import meeting
from common.distributed import process_group


def call_on_ranks(folder: Path, function: Callable, num_ranks: int, *arguments) -> list:
    """`function(distributed, *arguments)` on so many gloo ranks; what each returns, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not fork, because the parent has run threads; the server that conftest.py prepares is quicker than spawn.
    torch.multiprocessing.start_processes(
        _rank, (function, meeting(num_ranks), folder, arguments), nprocs=num_ranks, start_method="forkserver"
    )
    return [pickle.loads((folder / f"rank_{rank}").read_bytes()) for rank in range(num_ranks)]


def _rank(rank: int, function: Callable, variables: list[dict], folder: Path, arguments: Sequence) -> None:
    os.environ |= variables[rank]
    with process_group(seed=0) as distributed:
        (folder / f"rank_{rank}").write_bytes(pickle.dumps(function(distributed, *arguments)))


def content(batch: Batch) -> tuple:
    """Everything in a batch, as values that compare with ==."""
    inputs = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.inputs.items()}
    return batch.name, batch.counts, batch.num_slots, inputs


def excess_chi_square(counts: np.ndarray, expected: np.ndarray | float, degrees: int) -> float:
    """By how many standard deviations the chi-square of these counts is above its mean."""
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5
