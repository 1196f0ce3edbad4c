# SPDX-License-Identifier: Apache-2.0
"""1 and 2 ranks are really run, on the same data; what cannot be compared is refused."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import scaling_ranks  # noqa: E402
from command_line import first_error  # noqa: E402


def lines(losses, tokens=100, seconds=2.0):
    return [
        {"loss": loss, "num_tokens": tokens * (i + 1), "step_time_s": seconds * (1 + 9 * (i == 0))}
        for i, loss in enumerate(losses)
    ]


def test_the_warm_up_does_not_count():
    assert scaling_ranks.tokens_per_second(lines([3, 3, 3]), 1) == 50
    assert scaling_ranks.tokens_per_second(lines([3, 3, 3, 3]), 2) == 50


def test_runs_that_differ_are_not_compared():
    assert scaling_ranks.loss_difference(lines([2.0, 1.0]), lines([2.0, 1.001]), 1e-2, "x") == pytest.approx(1e-3)
    with pytest.raises(scaling_ranks.Failed, match="losses of 1 and 2 ranks differ"):
        scaling_ranks.loss_difference(lines([2.0, 1.0]), lines([2.0, 1.1]), 1e-2, "x")
    with pytest.raises(scaling_ranks.Failed, match="differ"):
        scaling_ranks.loss_difference(lines([float("nan")]), lines([2.0]), 1e-2, "x")
    with pytest.raises(scaling_ranks.Failed, match="same tokens"):
        scaling_ranks.loss_difference(lines([2.0]), lines([2.0], tokens=99), 1e-2, "x")


CHILD_FAILED = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\x20
============================================================
train_ddp.py FAILED
------------------------------------------------------------
Root Cause (first observed failure):
  exitcode  : -11 (pid: 3)
  error_file: <N/A>
"""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "Traceback:\nerror: precision=fp9 must be fp32.\nRuntimeError: later\n",
            "error: precision=fp9 must be fp32.",
        ),
        ("Error executing job with overrides: []\n[rank0]: RuntimeError: no memory\n", "RuntimeError: no memory"),
        ("[rank1]: Traceback (most recent call last):\n[rank1]: MemoryError\n", "MemoryError"),
    ],
)
def test_the_reason_of_a_failed_run(output, reason):
    assert first_error(output + CHILD_FAILED) == reason


def test_a_run_that_dies_silently_is_told_by_its_end():
    assert "exitcode  : -11" in first_error("terminate called\n" + CHILD_FAILED)


def test_a_run_that_takes_too_long_is_ended_with_its_ranks(tmp_path):
    overrides = ["model_tag=esm2_t4_1M", "num_train_steps=1000000", "precision=fp32", "dataset.num_workers=0"]
    with pytest.raises(scaling_ranks.Failed, match="train_ddp on 2 ranks took longer than 12 s"):
        scaling_ranks.train(
            "train_ddp", 2, tmp_path / "run", [*overrides, "validation.load_dataset_kwargs=null"], timeout_s=12
        )
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes())
    assert commands and not [command for command in commands if str(tmp_path / "run").encode() in command]


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    output, page = tmp_path / "numbers.json", tmp_path / "page.md"
    command = [sys.executable, "scaling_ranks.py", "--quick", "--trainers", "train_ddp", f"--output={output}"]
    done = subprocess.run(
        [*command, f"--table={page}", "precision=fp32"], cwd=HERE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(output.read_text())
    assert numbers["settings"]["precision"] == "fp32" and list(numbers["trainers"]) == ["train_ddp"]
    assert all(turn["one_rank"] > 0 < turn["two_ranks"] for turn in numbers["trainers"]["train_ddp"])
    assert str(tmp_path) not in output.read_text() and str(HERE.parents[1]) not in output.read_text()
    check = ["--from", str(output), "--check", str(page)]
    assert scaling_ranks.main(check) == 0
    page.write_text(page.read_text().replace("`train_ddp`", "`train_other`"))
    assert scaling_ranks.main(check) == 1


def test_a_run_that_fails_is_told(tmp_path, capsys):
    arguments = ["--quick", "--trainers", "train_ddp", f"--output={tmp_path}/x.json", "dataset.max_seq_length=1"]
    assert scaling_ranks.main(arguments) == 1
    assert "error: train_ddp on 1 rank failed" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--micro-batches-per-step", "3"], "even"),
        (["--data", "nowhere.fasta"], "no such file"),
        (["num_train_steps=3"], "sets that itself"),
        (["precision=auto"], "fp32 or bf16"),
        (["--quick"], "--output"),
        (["--check", "page.md"], "--from"),
    ],
)
def test_what_it_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling_ranks.main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
