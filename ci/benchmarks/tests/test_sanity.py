# SPDX-License-Identifier: Apache-2.0
"""The commands are those of a README, and its sentences those of the numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
import sanity  # noqa: E402


README = """```bash
python train_ddp.py
```
<!-- sanity_loss: begin -->
<!-- sanity_loss: end -->
<!-- sanity_classes: begin -->
<!-- sanity_classes: end -->
"""
MARKED = """<!-- sanity -->
```bash
torchrun train_ddp.py --config-name L0_sanity \\
  checkpoint.ckpt_dir=outputs/sanity
python train_ddp.py model_tag=outputs/sanity/final_model
```
"""


def result(confusion: list[list[int]] | None = None) -> dict:
    """Numbers as a run writes them."""
    first = {"seconds": 90.0, "training": {"first_loss": 6.0}, "validation": {"loss": 5.0625}}
    tuned = {"seconds": 9.0, "validation": {"accuracy": 0.875, "macro_f1": 0.75, "confusion": confusion}}
    random = {"seconds": 9.0, "validation": {"accuracy": 0.5, "macro_f1": 0.25, "confusion": confusion}}
    return {"recipe": "small", "machine": {"cores": 2, "cpu": "C"}, "baselines": {"rank_position_loss": 5.704},
            "commands": [first, *([tuned, random] if confusion else [])]}  # fmt: skip


def test_commands_are_those_below_the_mark():
    assert sanity.commands(README, Path("/x")) == [["python", "train_ddp.py"]]
    first, second = sanity.commands(README + MARKED, Path("/x"))
    assert first == ["torchrun", "train_ddp.py", "--config-name", "L0_sanity", "checkpoint.ckpt_dir=/x"]
    assert second == ["python", "train_ddp.py", "model_tag=/x/final_model"]


def test_sentences():
    text = sanity.updated(README, result([[3, 1], [0, 4]]))
    assert "1.5 minutes on 2 cores (C)" in text and "5.06" in text and "5.70" in text
    said = " ".join(text.split())
    assert "8 validation cells: 87.5% (0.750); from random weights 50.0% (0.250)" in said
    assert "the most frequent type has 50.0% of the cells" in said
    assert sanity.updated(text, result([[3, 1], [0, 4]])) == text


def test_sentences_of_a_potential():
    commands = [{"seconds": 90.0, "cpu_seconds": 80.0}, {"seconds": 10.0, "cpu_seconds": 8.0}]
    found = {"forces_mae": 0.0576, "energy_per_atom_mae": 0.0107, "stress_mae": 0.0029}
    numbers = {"recipe": "small", "machine": {"cores": 2, "cpu": "C"}, "errors": found, "commands": commands}
    marks = "".join(
        f"<!-- {name}: {end} -->\n" for name in ("sanity_errors", "sanity_whole") for end in ("begin", "end")
    )
    said = " ".join(sanity.updated(marks, numbers).split())
    assert "1.5 minutes on 2 cores (C), and ends at mean absolute errors of 0.058 eV/A, 0.011 eV/atom" in said
    assert "Together they take 100 s, and 88 s of processor time" in said


@pytest.mark.parametrize("changed", [False, True])
def test_a_page_is_checked(tmp_path, changed):
    numbers, page = tmp_path / "numbers.json", tmp_path / "README.md"
    numbers.write_text(json.dumps(result([[3, 1], [0, 4]])))
    page.write_text(sanity.updated(README, result([[3, 1], [0, 4]])).replace("5.70", "5.71" if changed else "5.70"))
    words = [sys.executable, str(HERE / "sanity.py"), "--from", str(numbers), "--check", str(page)]
    assert subprocess.run(words, capture_output=True).returncode == changed
