# SPDX-License-Identifier: Apache-2.0
"""Energies, forces, stress, gradients are those of `nequip-allegro` with the same weights (golden.json)."""

import json
from pathlib import Path

import pytest
from golden import COMMON, our_digest, set_waves, worst
from make_golden import CASES

from modeling_allegro import Allegro, AllegroConfig


GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_package_says_the_same(name):
    model = Allegro(AllegroConfig(**COMMON | CASES[name]))
    set_waves(model)
    found = worst(our_digest(model), GOLDEN[name])
    assert max(found.values()) < (1e-5 if "float32" in name else 1e-10), found
