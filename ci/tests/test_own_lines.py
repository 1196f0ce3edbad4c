# SPDX-License-Identifier: Apache-2.0
"""Lines are counted once, as a recipe's own or as shared; a recipe that was cast from another has few of its own."""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

from own_lines import count  # noqa: E402


def test_own_and_shared(tmp_path):
    for recipe, own in (("a", "x = 1\n\n\ny = 2\n"), ("b", "x = 1\n")):
        folder = tmp_path / "recipes" / recipe
        (folder / "common").mkdir(parents=True)
        (folder / "tests").mkdir()
        (folder / "common" / "shared.py").write_text("one\n\ntwo\n")
        (folder / "model.py").write_text(own)
        (folder / "tests" / "test_model.py").write_text("not counted\n")
        (folder / "README.md").write_text("nor this\n")
    assert count(tmp_path) == {
        "a": {"own": {"model.py": 2}, "shared": {"common/shared.py": 2}},
        "b": {"own": {"model.py": 1}, "shared": {"common/shared.py": 2}},
    }


def test_amplify_was_cast():
    counted = count()["amplify_native_te"]
    assert sum(counted["own"].values()) <= 900
    assert {"train_ddp.py", "train_fsdp2.py", "train_mfsdp.py", "checkpoint.py"} <= counted["shared"].keys()
