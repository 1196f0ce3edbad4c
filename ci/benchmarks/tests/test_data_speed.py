# SPDX-License-Identifier: Apache-2.0
"""A short run of the benchmark of the data: its numbers, its tables, and what it does not take."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
import data_speed  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a quick run, and its numbers."""
    folder = tmp_path_factory.mktemp("data_speed")
    command = [sys.executable, "data_speed.py", "--quick", f"--output={folder}/numbers.json", f"--table={folder}/p.md"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() in (folder / "p.md").read_text()
    return folder, json.loads((folder / "numbers.json").read_text())


def test_loaders_and_model(run):
    _, result = run
    (group,) = result["loaders"]
    rates = {name: median(found) for name, found in group["tokens_per_second"].items()}
    assert set(rates) == {"ours", "transformers", "transformers, tokenised ahead"}
    assert min(*rates.values(), *result["model"]["tokens_per_second"]) > 0
    assert 0 <= result["model"]["data_wait_share"] < 1


def test_start_and_plan(run):
    _, result = run
    (start,) = result["start"]
    assert start["cold_s"][0] > 1 and not start["warm_s"]
    plan = result["plan"]
    assert 0 < plan["shuffle_window_ms"] < plan["plan_window_ms"]
    assert plan["plan_indexed_window_ms"] > 0 and plan["read_window_ms"] > 0
    assert data_speed.extrapolated(plan) == pytest.approx(6500 * plan["epochs"][0]["cpu_s"])


def test_the_numbers_say_what_ran_and_nothing_of_where(run):
    folder, result = run
    text = (folder / "numbers.json").read_text()
    assert str(HERE.parents[1]) not in text and str(folder) not in text
    assert result["versions"]["torch"] and result["machine"]["cores"] and result["data"] == "train.parquet"


def test_tables_are_checked_against_the_numbers(run, tmp_path, capsys):
    folder, _ = run
    page, numbers = tmp_path / "page.md", str(folder / "numbers.json")
    page.write_text(f"Before.\n{(folder / 'p.md').read_text()}After.\n")
    assert data_speed.main(["--from", numbers, "--check", str(page)]) == 0
    page.write_text(page.read_text().replace("| packed |", "| padded |"))
    assert data_speed.main(["--from", numbers, "--check", str(page)]) == 1
    assert "--table" in capsys.readouterr().err
    assert data_speed.main(["--from", numbers, "--table", str(page)]) == 0
    assert data_speed.main(["--from", numbers, "--check", str(page)]) == 0
    assert page.read_text().startswith("Before.\n") and page.read_text().endswith("After.\n")


def test_one_part_anew(run, tmp_path, capsys):
    folder, result = run
    numbers = tmp_path / "numbers.json"
    numbers.write_text((folder / "numbers.json").read_text())
    again = ["--quick", "--only", "plan", f"--output={numbers}"]
    assert data_speed.main(again) == 0
    anew = json.loads(numbers.read_text())
    assert anew["plan"] != result["plan"] and anew["loaders"] == result["loaders"]
    numbers.write_text(json.dumps(result | {"machine": {"name": "another", "cores": 1}}))
    assert data_speed.main(again) == 2 and "another machine" in capsys.readouterr().err


def test_a_run_that_fails_is_told(tmp_path):
    source = {"path": "parquet", "data_files": str(tmp_path / "none.parquet")}
    with pytest.raises(data_speed.Failed, match=r"none\.parquet: no such file"):
        data_speed.start(source, tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "fasta"])
def test_the_proteins_that_start_up_reads(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data_speed.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = data_speed.write_proteins(tmp_path, 500, ("parquet", "fasta"))[kind]
    rows = data_speed.open_rows("dataset", {**source, "split": "train"})
    lengths = [len(sequence) for sequence in rows["sequence"]]
    assert len(rows) == 500 and 250 < median(lengths) < 310 and max(lengths) <= 1022
    assert set("".join(rows["sequence"])) == set("LAGVSERTIDPKQNFYMHWC")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "nowhere.fasta"], "no such file"),
        (["--quick"], "--output"),
        (["--check", "page.md"], "--from"),
        (["--from", "numbers.json", "--quick"], "leave"),
        (["--only", "nothing"], "loaders"),
    ],
)
def test_what_it_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        data_speed.main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
