# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process: enough for what only gathers and sums, and quick."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch


class Rank:
    """What `Distributed` has for the data's sake."""

    def __init__(self, rank, num_ranks, barrier, board, one_node=True):
        self.rank = self.data_rank = rank
        self.num_ranks = self.num_data_ranks = num_ranks
        self.local_rank, self.num_local_ranks = (rank, num_ranks) if one_node else (0, 1)
        self.barrier, self.board = barrier, board
        self.is_main, self.device, self.said = rank == 0, torch.device("cpu"), []
        self.group_rank, self.group_size = 0, 1

    def gather(self, value):
        self.barrier.wait()
        self.board[self.rank] = value
        self.barrier.wait()
        found = [self.board[i] for i in range(self.num_ranks)]
        self.barrier.wait()
        return found

    def from_rank(self, rank, value=None):
        return self.gather(value)[rank]

    def sum(self, *values):
        return [sum(column) for column in zip(*self.gather([float(v) for v in values]), strict=True)]

    def counted_once(self, batch):
        return batch

    def say(self, text):
        self.said.append(text)

    @contextmanager
    def shared_errors(self):
        yield
        self.gather(None)

    @contextmanager
    def main_first(self):
        if self.local_rank:
            self.gather(None)
        yield
        if not self.local_rank:
            self.gather(None)


def on_ranks(num_ranks, work, one_node=True):
    """What `work(rank)` gives on each rank."""
    barrier, board = Barrier(num_ranks, timeout=60), {}
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(work, [Rank(i, num_ranks, barrier, board, one_node) for i in range(num_ranks)]))
