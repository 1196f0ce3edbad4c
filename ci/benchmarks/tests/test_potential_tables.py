# SPDX-License-Identifier: Apache-2.0
"""The README of the potentials has the numbers of the files that it names."""

import json

import potential_accuracy
import potential_speed

from common.contract.running import with_table


RESULTS = potential_speed.ROOT / "docs" / "results"


def numbers(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_readme_has_the_numbers():
    page = (potential_accuracy.RECIPE / "README.md").read_text()
    speed = potential_speed.table([numbers("potential_speed"), numbers("potential_speed_lips")])
    assert with_table(page, "potential_speed", speed) == page
