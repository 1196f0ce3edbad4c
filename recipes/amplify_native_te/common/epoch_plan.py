# SPDX-License-Identifier: Apache-2.0
"""The order in which a run reads its data: a function of (seed, epoch, data) that no rank or worker can move.

A keyed permutation orders the rows of an epoch without holding it. The order is read in windows, and the rows of a
window are packed into micro-batches. A micro-batch is known by (epoch, window, index), and that name seeds its noise.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, dtype=np.uint64)  # an array, because numpy warns when a scalar overflows
    for part in key:
        state = _mix(state ^ np.array([part], dtype=np.int64).view(np.uint64))
    return state


def permuted(places: np.ndarray, num_rows: int, *key: int) -> np.ndarray:
    """The rows at these places of the keyed permutation of `range(num_rows)`; no more memory than `places` takes.

    A six-round Feistel network on the next even number of bits, walked until it lands inside (Black & Rogaway 2002).
    """
    half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    round_keys = [_hash((*key, turn)) for turn in range(6)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << shift) | right

    rows = encrypt(places.astype(np.uint64))
    while (outside := rows >= num_rows).any():
        rows[outside] = encrypt(rows[outside])
    return rows.astype(np.int64)


def uniform_below(limit: np.ndarray, rows: np.ndarray, *key: int) -> np.ndarray:
    """An integer in [0, limit) for each row, drawn from the key and the row's number."""
    fraction = (_mix(rows.astype(np.uint64) ^ _hash(key)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (fraction * limit).astype(np.int64)


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity`: longest first, each into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        at = bisect_left(room, (size, -1))
        free, chosen = room.pop(at) if at < len(room) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        insort(room, (free - size, chosen))
    return bins


class Grouping:
    """How the rows of a window become micro-batches: `num_rows` each, or filled up to a `budget` of their sizes."""

    def __init__(self, num_rows: int | None = None, budget: int | None = None):
        assert (num_rows is None) != (budget is None), (num_rows, budget)
        self.num_rows, self.budget = num_rows, budget

    def __call__(self, sizes: np.ndarray, key: tuple[int, ...] | None) -> list[np.ndarray]:
        """Places in the window that go together, in an order shuffled by `key`; rows of size 0 are skipped."""
        places = np.flatnonzero(sizes)
        if self.budget is None:
            return [places[i : i + self.num_rows] for i in range(0, len(places), self.num_rows)]
        bins = best_fit_decreasing(sizes[places], self.budget)
        order = range(len(bins)) if key is None or not bins else permuted(np.arange(len(bins)), len(bins), *key)
        return [places[bins[i]] for i in order]


class MicroBatch(NamedTuple):
    """Rows that go through the model together; (epoch, window, index) is their name."""

    epoch: int
    window: int
    index: int
    rows: np.ndarray


class EpochPlan:
    """The micro-batches of every epoch, from any place on; `seed=None` keeps the rows in order.

    `source` has a length, and `sizes(rows, epoch)`: of each row in that epoch, 0 for one to leave out. If it cuts
    rows, its `max_size` says to what.
    """

    def __init__(self, source, grouping: Grouping, seed: int | None, window_rows: int):
        self.source, self.grouping, self.seed = source, grouping, seed
        multiple = grouping.num_rows or 1  # so that, but for empty rows, only an epoch's last micro-batch can be short
        self.window_rows = max(1, window_rows // multiple) * multiple
        self.num_rows = len(source)
        self.num_windows = -(-self.num_rows // self.window_rows)

    @property
    def rules(self) -> dict:
        """What decides which rows a micro-batch has, besides the data: for a resume to compare."""
        return {
            "seed": self.seed, "window_rows": self.window_rows, "num_rows": self.grouping.num_rows,
            "budget": self.grouping.budget, "max_size": getattr(self.source, "max_size", None),
        }  # fmt: skip

    def place_under(self, rules: dict, position: tuple[int, int, int]) -> tuple[tuple[int, int, int], str | None]:
        """Where to go on, by these rules, from a position by other ones; and a sentence where that is not exact."""
        now, (epoch, window, _) = self.rules, position
        changed = [name for name in rules if rules[name] != now.get(name)]
        if not changed:
            return position, None
        if "seed" in changed:  # the order of the rows is another one
            return (epoch + 1, 0, 0), f"The seed has changed: what was left of epoch {epoch} is not read."
        first = window * rules["window_rows"] // self.window_rows * self.window_rows
        sentence = (
            f"Micro-batches are made up again, because {', '.join(changed)} changed, from row {first:,} of epoch "
            f"{epoch} on; what had been read since is read again."
        )
        return (epoch, first // self.window_rows, 0), sentence

    def window(self, epoch: int, window: int) -> list[MicroBatch]:
        """The micro-batches of one window."""
        first = window * self.window_rows
        rows = np.arange(first, min(first + self.window_rows, len(self.source)))
        if self.seed is not None:
            rows = permuted(rows, len(self.source), self.seed, epoch)
        key = None if self.seed is None else (self.seed, epoch, window)
        groups = self.grouping(self.source.sizes(rows, epoch), key)
        return [MicroBatch(epoch, window, index, rows[group]) for index, group in enumerate(groups)]

    @property
    def num_micro_batches(self) -> int:
        """Of an epoch, as in its first window."""
        return round(len(self.window(0, 0)) * max(1.0, len(self.source) / self.window_rows))

    def epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """All micro-batches of one epoch."""
        for window in range(self.num_windows):
            yield from self.window(epoch, window)

    def starting_at(self, epoch: int, window: int, index: int) -> Iterator[MicroBatch]:
        """Micro-batches without end; an `index` past the end of its window counts on into the next."""
        while True:
            while window < self.num_windows:
                micro_batches = self.window(epoch, window)
                yield from micro_batches[index:]
                index = max(0, index - len(micro_batches))
                window += 1
            epoch, window = epoch + 1, 0


class RankSampler:
    """This rank's share of the plan: of every `num_ranks` micro-batches the one at `rank`."""

    def __init__(self, plan: EpochPlan, rank: int, num_ranks: int):
        self.plan, self.rank, self.num_ranks = plan, rank, num_ranks
        self.position = (0, 0, 0)

    def __iter__(self) -> Iterator[MicroBatch]:
        return islice(self.plan.starting_at(*self.position), self.rank, None, self.num_ranks)

    def position_after(self, name: tuple[int, int, int]) -> tuple[int, int, int]:
        """Where all ranks stand once each has read its micro-batch beside this one."""
        epoch, window, index = name
        return epoch, window, index + self.num_ranks - self.rank
