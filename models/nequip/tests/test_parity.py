# SPDX-License-Identifier: Apache-2.0
"""Energies, forces, stress and gradients are those of the package `nequip` with the same weights (golden.json)."""

import json
from pathlib import Path

import pytest
from golden import COMMON, our_digest, set_waves, worst
from make_golden import CASES

from modeling_nequip import NequIP, NequIPConfig


GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_package_says_the_same(name):
    model = NequIP(NequIPConfig(**COMMON | CASES[name]))
    set_waves(model)
    found = worst(our_digest(model), GOLDEN[name])
    assert max(found.values()) < (1e-5 if "float32" in name else 1e-10), found
