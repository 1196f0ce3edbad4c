# SPDX-License-Identifier: Apache-2.0
"""The committed sample is what its script writes, its labels are EMT's, and it validates on other structures."""

import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest


DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

from make_sample import SEED, describe, make_sample  # noqa: E402


@pytest.fixture(scope="module")
def sample():
    return {part: ase.io.read(DATA / f"{part}.extxyz", ":") for part in ("train", "validation")}


def test_files_hold_what_the_script_makes(sample):
    for part, frames in make_sample(SEED).items():
        assert len(frames) == len(sample[part])
        for made, read in zip(frames, sample[part], strict=True):
            assert made.symbols.get_chemical_formula() == read.symbols.get_chemical_formula()
            assert np.allclose(made.positions, read.positions, atol=1e-8) and np.allclose(
                made.cell, read.cell, atol=1e-8
            )
            assert (made.pbc == read.pbc).all() and made.info == read.info
            for label, value in made.calc.results.items():
                assert np.allclose(value, read.calc.results[label], atol=2e-8), label
        assert describe(sample[part]) in (DATA / "README.md").read_text()


def test_validation_is_new(sample):
    train = {atoms.positions.tobytes() for atoms in sample["train"]}
    assert len(train) == len(sample["train"]) and not train & {a.positions.tobytes() for a in sample["validation"]}
    assert {a.info["config_type"] for a in sample["validation"]} == {"bulk", "surface", "cluster"}
