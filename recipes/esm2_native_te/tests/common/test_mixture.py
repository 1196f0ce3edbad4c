# SPDX-License-Identifier: Apache-2.0
"""Several sources as one: exact shares, every row of each once a pass, and a plan that no rank moves."""

from itertools import islice

import numpy as np
import pytest

from common.epoch_plan import EpochPlan, Grouping, RankSampler
from common.mixture import Mixture, sources_of_mix


class Numbers:
    """Row r of source `name` reads as (name, r, pass)."""

    max_size = 10

    def __init__(self, name: str, length: int):
        self.name, self.length = name, length
        self.identity = {"num_rows": length}

    def __len__(self):
        return self.length

    def sizes(self, rows, epoch):
        return rows % 7 + 1

    def read(self, rows, epoch):
        return [(self.name, row, epoch) for row in rows.tolist()]

    def describe(self, rows, epoch):
        return [str(row) for row in rows.tolist()]


def mixture(lengths, weights, seed=5):
    names = [f"s{i}" for i in range(len(lengths))]
    sources = {name: Numbers(name, length) for name, length in zip(names, lengths, strict=True)}
    return Mixture(sources, dict(zip(names, weights, strict=True)), seed)


@pytest.mark.parametrize(
    ("lengths", "weights"), [((50, 30, 20), (3, 2, 1)), ((1000, 7, 3), (15134, 136, 1)), ((5, 95), (1, 1))]
)
def test_shares_and_passes(lengths, weights):
    mixed, drawn = mixture(lengths, weights), []
    for epoch in range(40):
        drawn += mixed.read(np.arange(len(mixed)), epoch)
        for i, weight in enumerate(weights):
            count = sum(name == f"s{i}" for name, _, _ in drawn)
            assert abs(count - len(drawn) * weight / sum(weights)) < len(weights)
    for i, length in enumerate(lengths):
        own = [(row, turn) for name, row, turn in drawn if name == f"s{i}"]
        assert [turn for _, turn in own] == [draw // length for draw in range(len(own))]
        for turn in range(len(own) // length):
            assert sorted(row for row, t in own if t == turn) == list(range(length))
    own = [row for name, row, _ in drawn if name == "s0"][: 2 * lengths[0]]
    if len(own) == 2 * lengths[0] and lengths[0] > 5:
        assert own[: lengths[0]] != own[lengths[0] :]  # another order in each pass


def test_sizes_and_descriptions_belong_to_the_rows():
    mixed = mixture((50, 30, 20), (3, 2, 1))
    rows = np.random.default_rng(0).permutation(100)[:37]
    for epoch in (0, 1, 9):
        read = mixed.read(rows, epoch)
        assert mixed.sizes(rows, epoch).tolist() == [row % 7 + 1 for _, row, _ in read]
        assert mixed.describe(rows, epoch) == [f"{name}: {row}" for name, row, _ in read]


def test_the_plan_is_one_on_any_ranks():
    def steps(num_ranks, position=(0, 0, 0)):
        ranks = []
        for rank in range(num_ranks):
            sampler = RankSampler(
                EpochPlan(mixture((50, 30, 20), (3, 2, 1)), Grouping(budget=20), 1, 40), rank, num_ranks
            )
            sampler.position = position
            ranks.append(sampler)
        turns = zip(*ranks, strict=True)
        source = ranks[0].plan.source
        return [source.read(m.rows, m.epoch) for turn in islice(turns, 120 // num_ranks) for m in turn]

    assert steps(1) == steps(2) == steps(4)
    sampler = RankSampler(EpochPlan(mixture((50, 30, 20), (3, 2, 1)), Grouping(budget=20), 1, 40), 1, 2)
    *_, last = islice(sampler, 30)
    assert steps(1, sampler.position_after(last[:3]))[:60] == steps(1)[60:]


OF_ALL = {"load_dataset_kwargs": {"path": "csv", "split": "train"}, "sequence_column": "sequence"}


def test_what_is_said_of_each_source():
    mix = {"a": {"weight": 3, "load_dataset_kwargs": {"data_files": "a.csv"}},
           "b": {"weight": 0.5, "load_dataset_kwargs": {"path": "fasta"}, "sequence_column": "protein"}}  # fmt: skip
    assert sources_of_mix("dataset.mix", mix, OF_ALL) == {
        "a": {"weight": 3, "sequence_column": "sequence",
              "load_dataset_kwargs": {"path": "csv", "split": "train", "data_files": "a.csv"}},
        "b": {"weight": 0.5, "sequence_column": "protein", "load_dataset_kwargs": {"path": "fasta", "split": "train"}},
    }  # fmt: skip


def test_a_file_that_no_source_reads():
    of_all = OF_ALL | {"load_dataset_kwargs": {"path": "csv", "data_files": "mine.csv"}}
    named = {"weight": 1, "load_dataset_kwargs": {"data_files": "x.csv"}}
    assert sources_of_mix("dataset.mix", {"a": named, "b": {"weight": 1}}, of_all)["b"]["load_dataset_kwargs"] == {
        "path": "csv", "data_files": "mine.csv",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"dataset.load_dataset_kwargs.data_files=mine.csv is read by none of a, b"):
        sources_of_mix("dataset.mix", {"a": named, "b": named}, of_all)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "many", None, True])
def test_a_weight_that_is_none(weight):
    with pytest.raises(ValueError, match=r"dataset.mix.b.weight=.* must be a number above 0"):
        sources_of_mix("dataset.mix", {"a": {"weight": 1}, "b": {"weight": weight}}, OF_ALL)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"a": {"weight": 1}}, "must name two sources or more"),
        ({"a": {"weight": 1}, "b": {"weight": 1, "share": 2}}, "with some of weight, load_dataset_kwargs, sequence"),
        ({"a": {"weight": 1}, "b": 3}, "dataset.mix.b=3 must be a section"),
        ({"a": {"weight": 1}, "b": {"weight": 1, "load_dataset_kwargs": {"streaming": True}}}, "streaming=false"),
    ],
)
def test_other_mistakes(mix, words):
    with pytest.raises(ValueError, match=words):
        sources_of_mix("dataset.mix", mix, OF_ALL)


def test_it_says_what_an_epoch_has():
    assert mixture((50, 30, 20), (3, 2, 1)).note() == (
        "an epoch of 100 rows has 51 of s0 (1 times its 50 rows), 33 of s1 (1.1 times its 30 rows), "
        "16 of s2 (0.8 times its 20 rows)"
    )


def test_more_sources_than_shares_can_be_rounded_to():
    with pytest.raises(ValueError, match="mix: 5 sources of 6 rows together cannot be mixed"):
        mixture((2, 1, 1, 1, 1), (1, 1, 1, 1, 1))
    mixed = mixture((16, 1, 1, 1, 1), (1, 1, 1, 1, 1))
    draws = np.array([mixed.draws_before(epoch) for epoch in range(40)])
    assert (np.diff(draws, axis=0) >= 0).all() and (draws.sum(1) == 20 * np.arange(40)).all()
