# SPDX-License-Identifier: Apache-2.0
"""A long sequence is really shared; runs that differ are refused."""

import json
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import context_memory  # noqa: E402


def test_a_quick_run(tmp_path, capsys):
    output, page = tmp_path / "numbers.json", tmp_path / "page.md"
    assert context_memory.main(["--quick", "--output", str(output), "--table", str(page), "precision=fp32"]) == 0
    numbers = json.loads(output.read_text())
    assert [run["cp_size"] for run in numbers["runs"]] == [1, 2]
    assert all(run["peak_memory_gib_per_rank"] > 0 and run["step_time_s"] > 0 for run in numbers["runs"])
    assert "| 2 | " in capsys.readouterr().out
    check = ["--from", str(output), "--check", str(page)]
    assert context_memory.main(check) == 0
    numbers["runs"][1]["peak_memory_gib_per_rank"] += 1
    output.write_text(json.dumps(numbers))
    assert context_memory.main(check) == 1


def test_runs_that_come_to_another_loss_are_refused(monkeypatch, tmp_path, capsys):
    lines = ({"loss": 3.0 + cp_size, "step_time_s": 1.0, "peak_memory_gib": 1.0} for cp_size in (1, 1, 2, 2))
    monkeypatch.setattr(context_memory, "train", lambda *_: [next(lines), next(lines)])
    assert context_memory.main(["--quick", "--output", str(tmp_path / "x.json")]) == 1
    assert "cp_size=2 has the loss 5.0, and cp_size=1 4.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cp_size=2"], "cp_size=2: the benchmark sets that itself"),
        (["--steps", "1"], "--steps 1 must be at least 2"),
        (["precision=auto"], "fp32 or bf16"),
        (["--quick"], "--output FILE.json"),
    ],
)
def test_what_cannot_be_asked(arguments, told, capsys):
    with pytest.raises(SystemExit):
        context_memory.read_arguments(arguments)
    assert told in capsys.readouterr().err
