# SPDX-License-Identifier: Apache-2.0
"""A short run of the benchmark of cells, without the peers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_short_run(tmp_path):
    command = [sys.executable, "cells_speed.py", "--quick", f"--output={tmp_path}/numbers.json"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ways = json.loads((tmp_path / "numbers.json").read_text())["ways"]
    assert {"h5ad_in_order", "tokens_at_random", "convert_csc"} <= ways.keys()
    assert all(one["cells_per_s"] > 0 and 0 < one["memory_gib"] < 4 for runs in ways.values() for one in runs)
    assert "counts in order, h5ad | ours" in done.stdout
