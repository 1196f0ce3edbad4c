# SPDX-License-Identifier: Apache-2.0
"""Pages on potentials have the numbers of the files that they name."""

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


def test_the_page_on_nequip_has_the_numbers():
    page = (potential_speed.ROOT / "docs" / "moving.md").read_text()
    text = potential_accuracy.sentences(numbers("potential_accuracy"))
    assert with_table(page, "potential_accuracy", text) == page
