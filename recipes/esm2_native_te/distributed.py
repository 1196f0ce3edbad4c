# SPDX-License-Identifier: Apache-2.0
"""The process group, what ranks must agree on, and the signals that ask a run to stop."""

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def stop_with(sentence: str) -> NoReturn:
    """End this process with exit code 2 for a user's mistake, told once: by rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    elif not dist.is_initialized():
        time.sleep(60)  # torchrun ends all ranks as soon as one leaves: not before rank 0 has spoken
    if dist.is_initialized():
        dist.barrier()
    sys.exit(2)


@dataclass(frozen=True)
class Distributed:
    """This process's place among the others; `device` is what it trains on."""

    rank: int
    local_rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64 on the CPU: no GPU has to wait for it."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: float) -> float:
        """The largest of all ranks."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    @contextmanager
    def one_voice(self):
        """Stop all ranks together, with one sentence, when the block raises a ValueError on any of them."""
        mistake = None
        try:
            yield
        except ValueError as error:
            mistake = error
        try:
            self._agree_on(mistake)
        except ValueError as error:
            stop_with(str(error))

    @contextmanager
    def main_first(self):
        """Run the block on rank 0 of each node, then on the others: for caches that must be written once.

        A ValueError on any rank (a file that one node lacks) is raised on all, so that they stay in step.
        """
        if self.local_rank != 0:
            self._agree_on(None)
        mistake = None
        try:
            yield
        except ValueError as error:
            mistake = error
        self._agree_on(mistake)
        if self.local_rank == 0:
            self._agree_on(None)

    def _agree_on(self, mistake: ValueError | None) -> None:
        told: list[str | None] = [None] * self.num_ranks
        dist.all_gather_object(told, str(mistake) if mistake else None)
        if first := next(filter(None, told), None):
            raise mistake or ValueError(first)


@contextmanager
def process_group(seed: int, deterministic: bool = False):
    """Join the ranks that torchrun started (or be the only one), and leave cleanly."""
    env = os.environ
    rank, local_rank, num_ranks = (int(env.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # gloo serves the CPU tensors on GPU machines too: label counts, stop flags and checkpoint plans.
    # Hours, because ranks wait while the first of them converts a large data set or exports a large model.
    options = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo", "timeout": timedelta(hours=3)}
    if "RANK" not in env:  # plain `python`: a group of one that needs no port
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    torch.manual_seed(seed)
    if deterministic:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield Distributed(rank, local_rank, num_ranks, device)
        dist.barrier()  # without it gloo can hang in the next call when a rank is already gone
    finally:
        dist.destroy_process_group()


def passes_per_step(micro_batches_per_step: int | None, num_ranks: int) -> int:
    """How many micro-batches each rank takes a step. Raises ValueError if they do not divide by the ranks."""
    if micro_batches_per_step is None:
        return 1
    if micro_batches_per_step < 1 or micro_batches_per_step % num_ranks:
        below = micro_batches_per_step // num_ranks * num_ranks
        works = f"{below} or {below + num_ranks}" if below > 0 else str(num_ranks)
        raise ValueError(
            f"micro_batches_per_step={micro_batches_per_step} does not divide by the {num_ranks} ranks; {works} would."
        )
    return micro_batches_per_step // num_ranks


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_signals(worker: int | None = None) -> None:
    """From here on, this process goes on at a signal to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_ignored():
    """What is started in the block ignores the signals to stop."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignore_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Remembers SIGTERM or SIGUSR1 (Slurm's warning), so that the run can save and leave after its step."""

    def __init__(self):
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.requested = True


def clip_grad_norm_(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip in place and return the norm of all gradients before clipping, as a plain scalar on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
