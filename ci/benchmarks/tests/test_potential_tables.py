# SPDX-License-Identifier: Apache-2.0
"""The README of the potentials has the numbers of the files that it names."""

import json

import potential_accuracy
import potential_speed
import pytest

from common.contract.running import with_table


RESULTS = potential_speed.ROOT / "docs" / "results"
TABLES = {
    "potential_speed": lambda numbers: potential_speed.table(numbers["rows"]),
    "potential_speed_lips": lambda numbers: potential_speed.table(numbers["rows"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_its_numbers(name):
    page = (potential_accuracy.RECIPE / "README.md").read_text()
    assert with_table(page, name, TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))) == page
