# SPDX-License-Identifier: Apache-2.0
"""What we save, others load: the field's own library gives what the trained model gives, without a file of ours."""

import subprocess
import sys

import pytest
import torch

from common import RECIPE
from common.contract.running import LAST, THIS_RECIPE, TRAINERS, command_here


# In a process that cannot import the recipe: python -I does not look into the folder that it runs in.
OPEN = """
import runpy, sys, torch
from pathlib import Path
recipe, folder, result = map(Path, sys.argv[1:])
opened = runpy.run_path(recipe / "tests" / "this_recipe.py")["open_final_model"](folder)
ours = [m.__name__ for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(f"{recipe}/")]
assert not ours, ours
torch.save(opened, result)
"""


@pytest.fixture
def run(straight):
    return straight(TRAINERS[-1])


def opened(folder, scratch):
    command = [sys.executable, "-I", "-c", OPEN, str(RECIPE), str(folder), str(scratch / "result.pt")]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(scratch / "result.pt")


def test_it_gives_what_the_trained_model_gives(run, tmp_path):
    ours = THIS_RECIPE.open_checkpoint(run / f"step_{LAST}")
    torch.testing.assert_close(opened(run / "final_model", tmp_path), ours, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_exported_by_itself_too(run, tmp_path):
    assert command_here("export.py", run / f"step_{LAST}", tmp_path / "exported") == 0
    for name in (p.relative_to(run / "final_model") for p in (run / "final_model").rglob("*") if p.is_file()):
        assert (tmp_path / "exported" / name).read_bytes() == (run / "final_model" / name).read_bytes(), name
