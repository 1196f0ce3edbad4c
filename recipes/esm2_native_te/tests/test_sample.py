# SPDX-License-Identifier: Apache-2.0
"""The committed sample is what its script writes, like UniRef90 in length, and validates on new proteins."""

import statistics
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest


DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

from make_sample import BACKGROUND, SEED, make_sample, unigram_entropy  # noqa: E402


@pytest.fixture(scope="module")
def sample() -> dict[str, list[dict[str, str]]]:
    return {part: pq.read_table(DATA / f"{part}.parquet").to_pylist() for part in ("train", "validation")}


def test_files_hold_what_the_script_makes(sample):
    # Contents, not bytes: the bytes of a parquet file depend on the version of pyarrow.
    assert make_sample(SEED) == sample


@pytest.mark.parametrize("part, num_rows", [("train", 3600), ("validation", 240)])
def test_lengths_are_like_uniref90s(sample, part, num_rows):
    lengths = sorted(len(row["sequence"]) for row in sample[part])
    assert len(lengths) == num_rows
    assert lengths[0] >= 25
    assert statistics.median(lengths) == pytest.approx(278, rel=0.05)
    assert statistics.mean(lengths) == pytest.approx(335, rel=0.05)
    assert lengths[int(0.99 * num_rows)] == pytest.approx(1361, rel=0.05)


def test_residues_are_like_uniprots(sample):
    sequences = [row["sequence"] for row in sample["train"]]
    assert set("".join(sequences)) == set(BACKGROUND)
    assert all(sequence.startswith("M") for sequence in sequences)
    assert 2.8 < unigram_entropy(sequences) < 2.95


def test_validation_is_new(sample):
    sequences = [row["sequence"] for rows in sample.values() for row in rows]
    assert len(set(sequences)) == len(sequences)
    ids = [row["id"] for rows in sample.values() for row in rows]
    assert len(set(ids)) == len(ids)
