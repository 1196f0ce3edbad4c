# SPDX-License-Identifier: Apache-2.0
"""Two runs of training beside each other: what they train on, when they were how good, and who was first."""

import sys

import potential_accuracy as benchmark
import pytest
from ase.io import read


SAMPLE = benchmark.RECIPE / "data" / "validation.extxyz"


def test_frames_are_trained_on_or_validated(tmp_path):
    elements, number = benchmark.split(SAMPLE, tmp_path)
    train, others = (read(tmp_path / f"{name}.extxyz", ":") for name in ("train", "validation"))
    assert elements == ["Al", "Cu", "Ni"] and len(train) == number and number % benchmark.BATCH == 0
    both = sorted(atoms.get_potential_energy() for atoms in [*train, *others])
    assert both == pytest.approx(sorted(atoms.get_potential_energy() for atoms in read(SAMPLE, ":")))
    assert number > 1.5 * len(others) > 0


def test_a_run_is_watched(tmp_path):
    code = (
        "import time; print('step 0  validation of the weights forces_mae 9'); time.sleep(0.3); "
        "print('step 20  validation of the averaged weights forces_mae 0.25  forces_max 2', flush=True)"
    )
    found = benchmark.run([sys.executable, "-c", code], 1)
    (line,) = found["curve"]
    assert (line["step"], line["forces_mae"]) == (20, 0.25) and 0.3 < line["seconds"] < 30
    assert found["peak_mib"] > 1 and found["cpu_seconds"] < found["seconds"] + 1
    with pytest.raises(SystemExit, match="no such thing"):
        benchmark.run([sys.executable, "-c", "raise SystemExit('no such thing')"], 1)


def test_who_is_first():
    curve = [
        {"step": step, "seconds": step / 10, "forces_mae": mae} for step, mae in ((20, 0.3), (40, 0.2), (60, 0.1))
    ]
    assert benchmark.first_at(curve, 0.2)["step"] == 40 and benchmark.first_at(curve, 0.05) is None
