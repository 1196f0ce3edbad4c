# SPDX-License-Identifier: Apache-2.0
"""The matrix of runs gives one trajectory, weights included; and its command says no where it does not."""

import json
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import curve_matrix
import pytest
from curve_matrix import REFERENCE, Case, execute, main

from common.contract.running import RECIPE, run_here, run_ranks


COMMAND = [sys.executable, "tests/curve_matrix.py"]
# The reference, and packed batches on one rank.
PACKED = ["--trainers", "train_ddp", "--ranks", "1", "--layouts", "packed", "--steps=3"]
ONE_MORE = [*PACKED, "--workers", "0"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small matrix's exit code, what it says and leaves; its ranks without torchrun, whose start is most of it."""
    folder, said = tmp_path_factory.mktemp("matrix"), StringIO()
    out = ["--json", f"{folder}/m.json", "--plot", f"{folder}/m.png", "--table", f"{folder}/m.md"]
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        in_this_process(patch, lambda case: [])
        code = main(["--small", "--steps=20", *out])
    return code, said.getvalue(), folder


def in_this_process(monkeypatch, change):
    """Let the matrix run here, with what `change` adds for a case."""

    def run(case, arguments, timeout_s):
        log_dir = Path(next(a for a in arguments if a.startswith("logger.log_dir=")).partition("=")[2])
        if case.ranks == 1:
            run_here(case.trainer, log_dir, *arguments, *change(case))
        else:
            run_ranks(case.trainer, case.ranks, log_dir, *arguments, *change(case))

    monkeypatch.setattr(curve_matrix, "execute", run)


def test_small_matrix(small):
    code, said, folder = small
    assert code == 0, said[-4000:]
    assert len([line for line in said.splitlines() if "/5  train_" in line]) == 5
    result = json.loads((folder / "m.json").read_text())
    first, *others = result["runs"]
    assert first["curves"]["loss"][-1] < first["curves"]["loss"][0] - 0.1
    assert len(first["curves"]["grad_norm"]) == result["steps"] == 20
    assert all(0 < run["differences"]["weights"] < 1e-5 for run in others)
    assert (folder / "m.png").stat().st_size > 10_000


def test_the_numbers_say_what_ran_and_nothing_of_where(small):
    *_, folder = small
    result = json.loads((folder / "m.json").read_text())
    assert result["machine"]["cores"] and result["versions"]["torch"] and "seed" not in result["command"]
    assert str(RECIPE) not in json.dumps(result) and str(folder) not in json.dumps(result)


def test_a_table_is_checked_against_the_numbers(small, tmp_path, capsys):
    *_, folder = small
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{(folder / 'm.md').read_text()}After.\n")
    check = ["--from", str(folder / "m.json"), "--check", str(page)]
    assert main(check) == 0
    page.write_text(page.read_text().replace("| packed |", "| padded |", 1))
    assert main(check) == 1
    assert "--table" in capsys.readouterr().err
    assert main(["--from", str(folder / "m.json"), "--table", str(page)]) == main(check) == 0
    assert page.read_text().startswith("Before.\n") and page.read_text().endswith("After.\n")


def test_another_trajectory_is_told(monkeypatch, capsys):
    in_this_process(monkeypatch, lambda case: [] if case == REFERENCE else ["seed=1"])
    assert main(ONE_MORE) == 1
    message = capsys.readouterr().err
    for what in ("loss", "validation loss", "gradient norm", "weights", "key biases"):
        assert f"packed, 0 workers: {what} differ" in message


def test_the_same_trajectory_is_not(monkeypatch):
    in_this_process(monkeypatch, lambda case: [])
    assert main([*ONE_MORE, "seed=1", "dataset.micro_batch_size=null", "dataset.token_micro_batch_size=400"]) == 0


def test_workers_must_not_change_a_bit(monkeypatch, capsys, tmp_path):
    # Far below any tolerance.
    change = lambda case: ["dataset.num_workers=0", f"adamw_kwargs.lr={4e-4 + 1e-10 * case.workers}"]  # noqa: E731
    in_this_process(monkeypatch, change)
    numbers = str(tmp_path / "m.json")
    assert main([*PACKED, "--workers", "0", "2", "--json", numbers]) == 1
    message = capsys.readouterr()
    assert "not equal to the bit" in message.err and "differ by" not in message.err
    assert "0 and 2: **not equal**" in message.out
    assert main(["--from", numbers]) == 1


def test_a_failing_run_is_told_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    def change(case):
        if case == Case("train_ddp", 1, "packed", 0):
            raise RuntimeError("the command\nthe reason")
        return ["dataset.num_workers=0"]

    in_this_process(monkeypatch, change)
    assert main([*PACKED, "--workers", "0", "2"]) == 1
    message = capsys.readouterr()
    assert "2/3  train_ddp, 1 rank, packed, 0 workers" in message.err and "the reason" in message.err
    assert "3/3  train_ddp, 1 rank, packed, 2 workers" in message.err and "0 **failed**" in message.out


def test_a_failing_command_is_shown_with_its_reason(monkeypatch):
    monkeypatch.setattr(curve_matrix, "RECIPE", RECIPE / "tests")  # where there are no trainers
    with pytest.raises(RuntimeError, match=r"(?s)--nproc_per_node=1 train_ddp.py seed=1.*can't open file"):
        execute(REFERENCE, ["seed=1"], 60)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["use_sequence_packing=true"], "--layouts"),
        (["--small", "--ranks", "1"], "--ranks"),
        (["num_train_steps=3"], "--steps"),
        (["seed"], "key=value"),
        (["--check", "page.md"], "--from"),
        (["--from", "m.json", "seed=1"], "--from"),
    ],
)
def test_what_the_matrix_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_whole_matrix():
    done = subprocess.run(COMMAND, cwd=RECIPE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(": equal |") == 18
