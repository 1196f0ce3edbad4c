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


def test_a_hard_limit_that_one_rank_exceeds_and_two_keep(monkeypatch, tmp_path, capsys):
    """What fails within the limit is measured again without it."""
    asked = []

    def train(trainer, cp_size, folder, overrides, timeout_s, limit_gib=None):
        asked.append((cp_size, limit_gib))
        if limit_gib is not None and limit_gib < 2 / cp_size:
            raise context_memory.Failed("no memory")
        return [{"loss": 3.0, "step_time_s": 1.0, "peak_memory_gib": 2 / cp_size}] * 2

    monkeypatch.setattr(context_memory, "train", train)
    output = tmp_path / "x.json"
    assert context_memory.main(["--quick", "--limit-gib", "1.5", "--output", str(output)]) == 0
    assert asked == [(1, 1.5), (1, None), (2, 1.5)]
    runs = json.loads(output.read_text())["runs"]
    assert [run["trains_in_limit"] for run in runs] == [False, True] and runs[0]["reason"] == "no memory"
    one, two = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 2 |")))
    assert "| 2.00 | 100% |" in one and "does not train" in one
    assert "| 1.00 | 50% |" in two and "| trains |" in two


def test_what_fails_without_a_limit_too_is_an_error(monkeypatch, tmp_path, capsys):
    def train(*_):
        raise context_memory.Failed("the disk is full")

    monkeypatch.setattr(context_memory, "train", train)
    assert context_memory.main(["--quick", "--limit-gib", "1.5", "--output", str(tmp_path / "x.json")]) == 1
    assert "error: the disk is full" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_that_takes_too_long_says_nothing_of_the_limit(monkeypatch, tmp_path, capsys):
    def train(*_):
        raise context_memory.TookTooLong("took longer than 9 s")

    monkeypatch.setattr(context_memory, "train", train)
    assert context_memory.main(["--quick", "--limit-gib", "1.5", "--output", str(tmp_path / "x.json")]) == 1
    assert "error: took longer" in capsys.readouterr().err


@pytest.mark.parametrize(("limit_gib", "trains"), [(0.1, False), (8.0, True)])
def test_the_limit_is_the_systems(tmp_path, limit_gib, trains):
    overrides = ["model_tag=esm2_t4_1M", "num_train_steps=1", "precision=fp32", "dataset.num_workers=0"]
    given = ("train_fsdp2", 1, tmp_path / "run", [*overrides, "validation.load_dataset_kwargs=null"], 300, limit_gib)
    if trains:
        assert len(context_memory.train(*given)) == 1
    else:
        with pytest.raises(context_memory.Failed, match="train_fsdp2 on 1 rank failed"):
            context_memory.train(*given)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cp_size=2"], "cp_size=2: the benchmark sets that itself"),
        (["--steps", "1"], "--steps 1 must be at least 2"),
        (["precision=auto"], "fp32 or bf16"),
        (["--quick"], "--output FILE.json"),
        (["--limit-gib", "-1"], "--limit-gib -1 must be a number of GiB above 0"),
    ],
)
def test_what_cannot_be_asked(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        context_memory.read_arguments(arguments)
    assert sentence in capsys.readouterr().err
