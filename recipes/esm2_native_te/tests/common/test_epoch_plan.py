# SPDX-License-Identifier: Apache-2.0
"""The order of the rows, how they are packed, and the plan that no number of ranks can move."""

import tracemalloc
from itertools import chain, islice

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.contract.ranks import excess_chi_square
from common.epoch_plan import EpochPlan, Grouping, RankSampler, best_fit_decreasing, permuted, uniform_below


MANY = 65_000_000  # UniRef50


class Sizes:
    """A source of which only the sizes matter."""

    def __init__(self, sizes):
        self.values = np.array(sizes)

    def __len__(self):
        return len(self.values)

    def sizes(self, rows, epoch):
        return self.values[rows]


def protein_lengths(num_rows: int, seed: int = 0) -> np.ndarray:
    """Tokens with <cls> and <eos>, a median of 280 residues, cut at 1,024."""
    residues = np.exp(np.random.default_rng(seed).normal(np.log(280), 0.6, num_rows)).astype(int)
    return np.clip(residues + 2, 3, 1024)


def budget(tokens: int = 2048) -> Grouping:
    return Grouping(budget=tokens)


def plan_with_gaps(seed: int | None = 7, grouping: Grouping | None = None, window_rows: int = 60) -> EpochPlan:
    """500 rows, the last window short; every ninth row is empty, and so is all of some windows if unshuffled."""
    lengths = protein_lengths(500)
    lengths[::9] = 0
    return EpochPlan(Sizes(lengths), grouping or budget(), seed, window_rows)


def contents(micro_batches) -> list[tuple]:
    return [(*m[:3], m.rows.tolist()) for m in micro_batches]


# ---- the permutation


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 100, 257, 10_001])
def test_permutation_has_each_row_once(num_rows):
    for epoch in range(5):
        windows = [permuted(np.arange(i, min(i + 999, num_rows)), num_rows, 1, epoch) for i in range(0, num_rows, 999)]
        assert np.array_equal(np.sort(np.concatenate(windows)), np.arange(num_rows))
        assert np.array_equal(np.concatenate(windows), permuted(np.arange(num_rows), num_rows, 1, epoch))


@pytest.mark.parametrize("num_rows", [MANY, 10**9])
def test_a_window_of_many_rows_takes_little_memory(num_rows):
    assert len(np.unique(permuted(np.arange(9), 9, 42, 0))) == 9  # what numpy imports and keeps at a first call
    tracemalloc.start()
    for first in (0, 12_345_678, num_rows - 10_000):
        rows = permuted(np.arange(first, first + 10_000), num_rows, 42, 0)
        assert rows.min() >= 0 and rows.max() < num_rows and len(np.unique(rows)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_windows_of_65_million_rows_share_no_row():
    # 300,000 rows drawn with replacement would repeat about 700 of them.
    windows = [permuted(np.arange(i, i + 10_000), MANY, 42, 0) for i in range(0, MANY - 10_000, MANY // 30)]
    assert len(np.unique(np.concatenate(windows))) == 10_000 * len(windows)


@pytest.mark.parametrize("other", [(1, 1), (2, 0), (0, 1), (-1, 0), (1 << 40, 0)])
def test_permutation_differs_by_seed_and_epoch(other):
    places = np.arange(5000)
    assert (permuted(places, 5000, 1, 0) == permuted(places, 5000, *other)).sum() < 10  # one is expected


@pytest.mark.parametrize("num_rows, num_keys", [(2, 1000), (3, 1000), (7, 1000), (100, 1000)])
def test_every_row_is_equally_likely_at_every_place(num_rows, num_keys):
    places, counts = np.arange(num_rows), np.zeros((num_rows, num_rows))
    for key in range(num_keys):
        counts[places, permuted(places, num_rows, key, 3)] += 1
    assert excess_chi_square(counts, num_keys / num_rows, (num_rows - 1) ** 2) < 5


def test_neighbours_are_not_related():
    rows = permuted(np.arange(100_000), MANY, 42, 5)
    for values in (rows, np.diff(rows) % MANY, rows[2:] - rows[:-2]):
        counts = np.bincount(values % MANY * 100 // MANY, minlength=100)
        assert excess_chi_square(counts, len(values) / 100, 99) < 5


def test_uniform_below_is_uniform_and_below():
    draws = uniform_below(np.full(50_000, 17), np.arange(50_000), 1, 2, 3)
    assert excess_chi_square(np.bincount(draws, minlength=17), 50_000 / 17, 16) < 5
    assert uniform_below(np.ones(1000), np.arange(1000), 1).max() == 0
    assert (draws == uniform_below(np.full(50_000, 17), np.arange(50_000), 1, 3, 3)).mean() == pytest.approx(
        1 / 17, rel=0.1
    )


# ---- packing


def check_packing(lengths: np.ndarray, capacity: int) -> float:
    """Assert that each item is in one bin and no bin is too full; return the fill."""
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(chain.from_iterable(bins)) == list(range(len(lengths)))
    assert max(lengths[items].sum() for items in bins) <= capacity
    return lengths.sum() / (len(bins) * capacity)


@pytest.mark.parametrize("capacity", [4096, 16384])
@pytest.mark.parametrize("seed", range(3))
def test_fill_of_log_normal_lengths(capacity, seed):
    assert check_packing(protein_lengths(10_000, seed), capacity) >= 0.99


@pytest.mark.parametrize("capacity", [4096, 16384])
def test_fill_of_real_proteins(real_proteins, capacity):
    sequences = pq.read_table(real_proteins).column("sequence").to_pylist()
    assert check_packing(np.minimum([len(s) + 2 for s in sequences], 1024), capacity) >= 0.99


def test_best_fit_takes_the_fullest_bin():
    lengths = np.array([2, 7, 6, 3, 4, 8])
    assert best_fit_decreasing(lengths, 10) == [[5, 0], [1, 3], [2, 4]]


@pytest.mark.parametrize("lengths", [[10], [10, 10, 10], [1] * 25, [6, 6, 6]])
def test_packing_at_the_edges(lengths):
    check_packing(np.array(lengths), 10)
    assert best_fit_decreasing(np.array([], dtype=int), 10) == []


# ---- the plan


def test_an_epoch_has_each_row_once_but_not_the_empty_ones():
    plan = plan_with_gaps()
    for epoch in range(3):
        micro_batches = list(plan.epoch(epoch))
        rows = np.concatenate([m.rows for m in micro_batches])
        assert sorted(rows) == np.flatnonzero(plan.source.values).tolist()
        assert all(0 < plan.source.values[m.rows].sum() <= 2048 for m in micro_batches)
        assert len({m[:3] for m in micro_batches}) == len(micro_batches)


def test_order_differs_by_epoch_and_seed_and_is_the_same_again():
    first = [m.rows.tolist() for m in plan_with_gaps(seed=7).epoch(0)]
    assert first == [m.rows.tolist() for m in plan_with_gaps(seed=7).epoch(0)]
    assert first != [m.rows.tolist() for m in plan_with_gaps(seed=7).epoch(1)]
    assert first != [m.rows.tolist() for m in plan_with_gaps(seed=8).epoch(0)]


def test_no_seed_keeps_the_rows_in_order():
    plan = plan_with_gaps(seed=None, grouping=Grouping(num_rows=8))
    rows = np.concatenate([m.rows for m in plan.epoch(0)])
    assert rows.tolist() == np.flatnonzero(plan.source.values).tolist()


def test_a_window_is_its_stretch_of_the_permutation():
    plan = plan_with_gaps()
    order = permuted(np.arange(500), 500, 7, 2)
    assert plan.num_windows == 9
    for window in range(9):
        stretch = order[60 * window : 60 * window + 60]
        found = np.concatenate([m.rows for m in plan.window(2, window)])
        assert sorted(found) == sorted(stretch[plan.source.values[stretch] > 0])


def test_micro_batches_of_a_window_are_shuffled():
    # Packing goes from long to short: in its order the first micro-batches of a window would hold the longest rows.
    plan = EpochPlan(Sizes(protein_lengths(10_000)), budget(4096), 1, 10_000)
    longest = [plan.source.values[m.rows].max() for m in plan.epoch(0)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.15


@pytest.mark.parametrize("num_rows, window_rows, of_a_window", [(500, 60, 56), (500, 8, 8), (500, 3, 8), (5, 60, 56)])
def test_rows_in_equal_numbers(num_rows, window_rows, of_a_window):
    plan = EpochPlan(Sizes([5] * num_rows), Grouping(num_rows=8), 1, window_rows)
    assert plan.window_rows == of_a_window
    sizes = [len(m.rows) for m in plan.epoch(0)]
    assert sizes == [8] * (num_rows // 8) + [num_rows % 8]  # only the last of the epoch is short


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_plan_over_the_ends_of_epochs(num_ranks):
    plan = plan_with_gaps()
    whole = contents(chain.from_iterable(plan.epoch(epoch) for epoch in range(4)))
    per_rank = [RankSampler(plan, rank, num_ranks) for rank in range(num_ranks)]
    steps = zip(*per_rank, strict=True)
    read = contents(chain.from_iterable(islice(steps, len(whole) // num_ranks)))
    assert read == whole[: len(read)]
    assert len(read) > len(whole) - num_ranks


def test_an_index_past_the_window_counts_on():
    plan = plan_with_gaps()
    whole = contents(chain.from_iterable(plan.epoch(epoch) for epoch in range(3)))
    for index in (0, 1, 7, 20, 55, len(list(plan.epoch(0))), len(list(plan.epoch(0))) + 3):
        assert contents(islice(plan.starting_at(0, 0, index), 15)) == whole[index : index + 15]


def test_windows_without_micro_batches_are_passed():
    lengths = np.zeros(100, dtype=int)
    lengths[[5, 95]] = 10
    plan = EpochPlan(Sizes(lengths), budget(), None, 10)
    assert contents(islice(plan.starting_at(0, 0, 1), 3)) == [(0, 9, 0, [95]), (1, 0, 0, [5]), (1, 9, 0, [95])]


@pytest.mark.parametrize("grouping", [budget(), Grouping(num_rows=3)])
@pytest.mark.parametrize("steps", [1, 12, 25, 50])
def test_resume_on_another_number_of_ranks(grouping, steps):
    """So many steps on 2 ranks, then on 1, then on 4, read what one rank reads in one go."""
    plan = plan_with_gaps(grouping=grouping)
    position, read = (0, 0, 0), []
    for num_ranks in (2, 1, 4):
        samplers = [RankSampler(plan, rank, num_ranks) for rank in range(num_ranks)]
        for sampler in samplers:
            sampler.position = position
        taken = list(islice(zip(*samplers, strict=True), steps))
        read += contents(chain.from_iterable(taken))
        # Any rank's word will do: they may write the place differently, but they mean the same one.
        positions = [sampler.position_after(m[:3]) for sampler, m in zip(samplers, taken[-1], strict=True)]
        goes_on = [contents(islice(plan.starting_at(*p), 3)) for p in positions]
        assert all(some == goes_on[0] for some in goes_on)
        position = positions[-1]
    assert read == contents(islice(plan.starting_at(0, 0, 0), 7 * steps))


class Computed:
    """A million rows whose sizes take no memory."""

    def __len__(self):
        return 10**6

    def sizes(self, rows, epoch):
        return 30 + uniform_below(np.full(len(rows), 600), rows, 7)


def peak_bytes(work) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "grouping, num_rows",
    [(Grouping(num_rows=16), 10**6), (budget(4096), 2 * 10**5)],
    ids=["rows", "tokens"],
)
def test_a_million_rows_take_the_memory_of_a_window(grouping, num_rows):
    plan, read = EpochPlan(Computed(), grouping, 1, 10_000), []
    one_window = peak_bytes(lambda: plan.window(0, 0))
    assert peak_bytes(lambda: next(plan.starting_at(5, 87, 3))) < 1.2 * one_window
    many = islice(plan.epoch(0), num_rows // len(plan.window(0, 0)[0].rows))
    # Two, because the next window is made while the one before is still held.
    assert peak_bytes(lambda: read.append(sum(len(m.rows) for m in many))) < 2.2 * one_window
    assert read[0] == pytest.approx(num_rows, rel=0.3)
    assert one_window < 2e6 < 8e6 <= peak_bytes(lambda: np.random.default_rng(1).permutation(10**6))


@pytest.mark.parametrize("given", [{}, {"num_rows": 4, "budget": 64}])
def test_rows_or_a_budget(given):
    with pytest.raises(AssertionError):
        Grouping(**given)
