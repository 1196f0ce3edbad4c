# SPDX-License-Identifier: Apache-2.0
"""Masks and crops have the published rates, by statistics that would see others."""

from collections.abc import Callable

import datasets
import numpy as np
import pytest
import reference

from collator import MaskedLMCollator
from common.contract.ranks import excess_chi_square
from dataset import SequenceRows
from tokens.layout import IGNORED


# ---- masks

NUM_BATCHES, NUM_TOKENS = 300, 1000


def unlikely(masker: Callable[[list[int], int], tuple]) -> dict[str, float]:
    """How improbable the masks of many micro-batches are, each statistic in standard deviations of its chi-square."""
    random = np.random.default_rng(8)
    tokens = random.integers(4, 24, (NUM_BATCHES, NUM_TOKENS))
    tokens[:, 0], tokens[:, -1] = 0, 2
    masked, labels = map(
        np.array, zip(*(masker(row.tolist(), index) for index, row in enumerate(tokens)), strict=True)
    )
    labels = np.where(labels == None, IGNORED, labels).astype(int)  # noqa: E711
    chosen = labels != IGNORED
    assert not chosen[:, [0, -1]].any() and (masked[~chosen] == tokens[~chosen]).all()
    assert (labels[chosen] == tokens[chosen]).all()
    tokens, masked, chosen = tokens[:, 1:-1], masked[:, 1:-1], chosen[:, 1:-1]

    def share(chosen: np.ndarray, size: np.ndarray | int) -> float:
        sizes = np.broadcast_to(size, chosen.shape)
        return excess_chi_square(
            np.stack((chosen, sizes - chosen)), np.stack((0.15 * sizes, 0.85 * sizes)), chosen.size
        )

    kept, hidden = masked[chosen] == tokens[chosen], masked[chosen] == reference.MASK
    pairs = np.bincount(2 * chosen[:, ::2].ravel() + chosen[:, 1::2].ravel(), minlength=4)
    changed = np.bincount(masked[chosen][~kept & ~hidden], minlength=33)
    return {
        "rate": share(chosen.sum(), chosen.size),
        # A random amino acid is the old one 1 time in 20.
        "kinds": excess_chi_square(
            np.array([hidden.sum(), kept.sum(), changed.sum()]), np.array([0.8, 0.105, 0.095]) * chosen.sum(), 2
        ),
        "replacements": excess_chi_square(changed[4:24], changed.sum() / 20, 19),
        "micro-batches": share(chosen.sum(1), NUM_TOKENS - 2),
        "places": share(chosen.sum(0), NUM_BATCHES),
        "residues": share(np.bincount(tokens[chosen])[4:], np.bincount(tokens.ravel())[4:]),
        "neighbours": excess_chi_square(pairs, pairs.sum() * np.array([0.85**2, 0.1275, 0.1275, 0.15**2]), 3),
    }


def test_masks_have_the_published_rates():
    def masker(tokens: list[int], index: int) -> tuple:
        sample = {"name": (index % 2, index // 2 % 5, index // 10), "items": [np.array(tokens)]}
        inputs = MaskedLMCollator(True, 3, 0.15)(sample).inputs
        return inputs["input_ids"].tolist(), inputs["labels"].tolist()

    for name, deviations in unlikely(masker).items():
        assert abs(deviations) < 5, name


@pytest.mark.parametrize(
    "seen, options",
    [
        ("rate", {"rate": 0.16}),
        ("rate", {"rate": 0.14}),
        ("kinds", {"shares": (0.78, 0.11)}),
        ("kinds", {"shares": (0.8, 0.11)}),
        ("kinds", {"shares": (0.8, 0.0)}),
        ("replacements", {"others": reference.AMINO_ACIDS[:19]}),
        ("replacements", {"others": reference.RESIDUES}),
        ("micro-batches", {"spread": 0.03}),  # 12% and 18% in turn
        ("places", {"seeds": 20}),  # twenty micro-batches' masks again and again
        (None, {}),
    ],
)
def test_other_rates_would_be_seen(seen, options):
    def masker(tokens: list[int], index: int) -> tuple:
        kwargs = {"rate": 0.15} | options
        kwargs["rate"] += kwargs.pop("spread", 0) * (-1) ** index
        return reference.mask(tokens, np.random.default_rng((1, index % kwargs.pop("seeds", NUM_BATCHES))), **kwargs)

    found = unlikely(masker)
    assert found[seen] > 10 if seen else max(map(abs, found.values())) < 5


# ---- crops

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"  # tokens 4, 5, 6, ...: the first one tells where a crop starts
LONG_ROWS = [LETTERS] * 1500 + [LETTERS[: 11 + i % 14] for i in range(1400)]
NUM_STARTS = np.array([len(text) - 9 for text in LONG_ROWS])  # with room for 10 residues


def uneven(starts: np.ndarray) -> dict[str, float]:
    """How improbable these starts are, [epoch, row], each statistic in standard deviations of its chi-square."""
    counts, expected, degrees = [], [], 0
    for num in range(2, 17):
        some = starts[:, num == NUM_STARTS]
        counts += np.bincount(some.ravel(), minlength=num).tolist()
        expected += [some.size / num] * num
        degrees += num - 1
    quarters = starts[:, NUM_STARTS == 16] // 4
    pairs = np.bincount((4 * quarters[:-1] + quarters[1:]).ravel(), minlength=16)
    return {
        "starts": excess_chi_square(np.array(counts), np.array(expected), degrees),
        "next epoch": excess_chi_square(pairs, pairs.sum() / 16, 15),
    }


def test_crops_start_anywhere_in_every_row_and_epoch():
    rows = SequenceRows("dataset", datasets.Dataset.from_dict({"sequence": LONG_ROWS}), "sequence", 12, 9)
    everything = np.arange(len(LONG_ROWS))
    tokens = np.array([rows.read(everything, epoch) for epoch in range(12)]).astype(int)
    assert tokens.shape == (12, len(LONG_ROWS), 12)
    starts = tokens[:, :, 1] - 4
    for num in range(2, 17):
        some = starts[:, num == NUM_STARTS]
        assert (some.min(), some.max()) == (0, num - 1)  # the first residue is seen, and the last one
    for name, deviations in uneven(starts).items():
        assert abs(deviations) < 5, name


@pytest.mark.parametrize(
    "seen, start",
    [
        ("starts", lambda u, num: u * (num - 1)),  # the last one never
        ("starts", lambda u, num: u * (num - 1) + 0.5),  # both ends half as often
        ("starts", lambda u, num: 0.97 * u * num),
        ("next epoch", lambda u, num: (u[0] + 0.1 * u) % 1 * num),  # near where it was
        (None, lambda u, num: u * num),
    ],
)
def test_other_crops_would_be_seen(seen, start):
    found = uneven(start(np.random.default_rng(0).random((12, len(LONG_ROWS))), NUM_STARTS).astype(int))
    assert found[seen] > 10 if seen else max(map(abs, found.values())) < 5
