# SPDX-License-Identifier: Apache-2.0
"""A short run of the benchmark of starts with many structures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_short_run(tmp_path):
    command = [sys.executable, "structures_start.py", "--quick", f"--output={tmp_path}/numbers.json"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    stages = json.loads((tmp_path / "numbers.json").read_text())["stages"]
    assert stages["start"]["open_s"] < stages["convert"]["open_s"]
    assert stages["run_1"]["first_s"] > stages["start"]["first_s"] > stages["start"]["open_s"]
    assert all(one["atoms_per_s"] > 0 and 0 < one["memory_gib"] < 4 for one in stages.values())
