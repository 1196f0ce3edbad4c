# SPDX-License-Identifier: Apache-2.0
"""The report says what is there and what is wrong, and leaves a picture and numbers behind."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from structure_files import labelled, write

import inspect_data


def arguments(path, folder, **changes):
    given = {"files": [path], "cutoff": 4.0, "max_neighbors": None, "label": [], "unit": [], "split": None}
    return Namespace(**given | {"potential": None, "out": folder / "report"} | changes)


def test_sound_data(tmp_path, distributed, capsys):
    path = write(labelled(12), tmp_path / "a.extxyz")
    assert inspect_data.inspect(distributed, arguments(path, tmp_path, potential=Path("emt")))
    text = capsys.readouterr().out
    assert "12 structures" in text and "elements Al Ni Cu" in text and "nothing is wrong" in text
    whole = json.loads((tmp_path / "report" / "data.json").read_text())
    assert whole["statistics"]["num_structures"] == 12 and whole["findings"] == []
    assert (tmp_path / "report" / "data.png").stat().st_size > 10_000


def test_what_is_wrong_with_the_data_as_a_whole_is_written_too(tmp_path, distributed, capsys):
    frames = labelled(12)
    for frame in frames:
        frame.calc.results["stress"] = frame.calc.results["stress"] * 160.2 * 100
    assert not inspect_data.inspect(distributed, arguments(write(frames, tmp_path / "a.extxyz"), tmp_path))
    assert "+dataset.units.stress=" in capsys.readouterr().out
    (finding,) = json.loads((tmp_path / "report" / "data.json").read_text())["findings"]
    assert finding["bad"] is True and finding["rows"] == []


@pytest.mark.parametrize("unit", ["-eV/Ang^3", "bar"])
def test_stress_against_a_potential(unit, tmp_path, distributed, capsys):
    path = write(labelled(6), tmp_path / "a.extxyz")
    given = arguments(path, tmp_path, potential=Path("emt"), unit=[f"stress={unit}"])
    assert not inspect_data.inspect(distributed, given)
    factor = "-1 times" if unit.startswith("-") else "6.24e-07 times"
    assert f"BAD  Stress is {factor} what differences" in capsys.readouterr().out


def test_bad_data_without_any_labels(tmp_path, distributed, capsys):
    frames = [Atoms("Cu2", positions=np.eye(3)[:2] * 2, info={"gap": 0.5}) for _ in range(3)]
    assert not inspect_data.inspect(distributed, arguments(write(frames, tmp_path / "a.extxyz"), tmp_path))
    text = capsys.readouterr().out
    assert "a.extxyz, frame 0 (and 1, 2; 3 of 3 in all) has neither an energy nor forces" in text
    assert "the file has gap." in text


def test_options_that_cannot_be(tmp_path, distributed):
    path = write(labelled(2), tmp_path / "a.extxyz")
    for changes, words in (({"label": ["x"]}, "give NAME=VALUE"), ({"potential": Path("none")}, "is no final model")):
        with pytest.raises(ValueError, match=words):
            inspect_data.inspect(distributed, arguments(path, tmp_path, **changes))
