# SPDX-License-Identifier: Apache-2.0
"""A short run of the benchmark of the index of lengths: who reads what, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import row_index  # noqa: E402


NUM_ROWS, WINDOW = (row_index.QUICK[key] for key in ("num_rows", "window_rows"))
NUM_WORKERS = row_index.QUICK["num_ranks"] * row_index.QUICK["num_workers"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a quick run, and its numbers."""
    folder = tmp_path_factory.mktemp("row_index")
    command = [sys.executable, "row_index.py", "--quick", f"--output={folder}/numbers.json", f"--table={folder}/p.md"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() in (folder / "p.md").read_text()
    return folder, json.loads((folder / "numbers.json").read_text())


@pytest.mark.slow
def test_who_reads_what(run, tmp_path):
    _, numbers = run
    (rows,), (built,), (mapped,) = (numbers["rounds"][way] for way in row_index.WAYS)
    source = row_index.write_proteins(tmp_path, NUM_ROWS, ("parquet",))["parquet"]
    lengths = [len(x) for x in row_index.datasets.Dataset.from_parquet(source["data_files"])["sequence"]]
    for turn in (rows, built, mapped):  # one rank looks at the first window
        assert turn["bytes_to_first_step"]["check"] == sum(lengths[:WINDOW])
    assert built["bytes_to_first_step"]["index"] == sum(lengths)  # each row once
    assert rows["bytes_to_last_step"]["index"] == mapped["bytes_to_last_step"]["index"] == 0
    # Every worker has read at least a window; with the index, no more than is ahead of what was taken.
    window = WINDOW * sum(lengths) / NUM_ROWS
    assert rows["bytes_to_first_step"]["workers"] > 0.9 * NUM_WORKERS * window
    for turn in (built, mapped):
        assert 0 < turn["bytes_to_first_step"]["workers"] < turn["bytes_to_last_step"]["workers"]
        ahead = (2 + 1) * NUM_WORKERS  # micro-batches that workers have ready, or are making
        taken = row_index.QUICK["steps"] * row_index.QUICK["num_ranks"]
        most = (taken + ahead) * row_index.QUICK["token_micro_batch_size"]
        assert turn["bytes_to_last_step"]["workers"] < most < rows["bytes_to_last_step"]["workers"]


@pytest.mark.slow
def test_times(run):
    _, numbers = run
    for (turn,) in numbers["rounds"].values():
        assert 0 < turn["open_s"] < turn["first_batch_s"] and turn["cpu_s"] > 0


@pytest.mark.slow
def test_the_numbers_say_what_ran_and_nothing_of_where(run):
    folder, numbers = run
    text = (folder / "numbers.json").read_text()
    assert str(HERE.parents[1]) not in text and str(folder) not in text
    assert numbers["versions"]["torch"] and numbers["machine"]["cores"] and numbers["settings"] == row_index.QUICK


@pytest.mark.slow
def test_the_table_is_checked_against_the_numbers(run, tmp_path, capsys):
    folder, _ = run
    page, numbers = tmp_path / "page.md", str(folder / "numbers.json")
    page.write_text(f"Before.\n{(folder / 'p.md').read_text()}After.\n")
    check = ["--from", numbers, "--check", str(page)]
    assert row_index.main(check) == 0
    page.write_text(page.read_text().replace("| the rows |", "| the columns |"))
    assert row_index.main(check) == 1 and "--table" in capsys.readouterr().err


@pytest.mark.slow
def test_ratios_are_within_a_round(run):
    _, numbers = run
    turn = {**numbers["rounds"]["mapped"][0], "open_s": 1.0, "cpu_s": 8.0}
    rounds = {"rows": (10.0, 20.0, 30.0), "built": (20.0, 40.0, 90.0), "mapped": (10.0, 10.0, 10.0)}
    found = row_index.table(numbers | {"rounds": {
        way: [turn | {"first_batch_s": seconds} for seconds in many] for way, many in rounds.items()
    }})  # fmt: skip
    assert "| 1.0 | 20.0 | 8.0 |" in found
    assert "| 40.0: 2.00 x (2.00 – 3.00) | 8.0: 1.00 x (1.00 – 1.00) |" in found
    assert "| 10.0: 0.50 x (0.33 – 1.00) |" in found


@pytest.mark.slow
def test_ways_that_give_different_batches_are_refused(run, monkeypatch, tmp_path, capsys):
    turn = run[1]["rounds"]["rows"][0]
    monkeypatch.setattr(row_index, "run", lambda way, *_: (turn, ["one" if way == "rows" else "other"]))
    assert row_index.main(["--quick", f"--output={tmp_path}/numbers.json"]) == 1
    assert "error: the ways gave different batches" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--quick"], "--output"),
        (["--check", "page.md"], "--from"),
        (["--from", "numbers.json"], "no such file"),
        (["seed=3", "--output", "x.json"], "nothing is trained"),
    ],
)
def test_what_it_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        row_index.main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
