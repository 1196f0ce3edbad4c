# SPDX-License-Identifier: Apache-2.0
"""A short run of the benchmark of many cells: what a size takes, and that memory is seen at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_short_run(tmp_path):
    command = [sys.executable, "cells_at_scale.py", "--quick", f"--output={tmp_path}/numbers.json"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes = json.loads((tmp_path / "numbers.json").read_text())["sizes"]
    for cells, ways in sizes.items():
        assert all(0.02 < one["memory_gib"] < 4 and one["seconds"] > 0 for one in ways.values())
        assert ways["h5ad"]["index_bytes"] == 128 + 4 * int(cells) == ways["scdl"]["index_bytes"]
        assert ways["h5ad"]["tokens_bytes"] > 50 * int(cells)
    assert "training, h5ad: to the first step" in done.stdout
