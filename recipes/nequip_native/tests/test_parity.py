# SPDX-License-Identifier: Apache-2.0
"""Parity plots of what has labels; a set without any is a sentence."""

import numpy as np
import pytest
from matplotlib import image

from atoms.parity import parity_plot


UNITS = {"energy": "eV", "forces": "eV/A"}


def test_a_panel_for_each_label(tmp_path):
    true = np.random.default_rng(0).normal(size=(50, 3))
    true[3] = np.nan
    pairs = {"energy": (np.full(5, np.nan), np.zeros(5)), "forces": (true, true + 0.1)}
    elements = np.repeat(["Cu", "Al"], 75)
    parity_plot(tmp_path / "one.png", pairs, UNITS, {"forces": elements}, "of a test")
    pairs["energy"] = (np.arange(5.0), np.arange(5.0))
    parity_plot(tmp_path / "two.png", pairs, UNITS)
    one, two = (image.imread(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=4) and one.std() > 0.05


def test_nothing_to_compare_with(tmp_path):
    none, some = np.full(5, np.nan), np.zeros(5)
    for pair in ((none, some), (some, none)):  # no labels; no prediction that is a number
        with pytest.raises(ValueError, match="there is nothing to compare"):
            parity_plot(tmp_path / "none.png", {"energy": pair}, UNITS)
