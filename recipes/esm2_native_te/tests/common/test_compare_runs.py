# SPDX-License-Identifier: Apache-2.0
"""The table of a sweep shows what differs, best first."""

import csv
import json
import subprocess
import sys

import pytest
import yaml

from common.contract.running import RECIPE, run_here
from compare_runs import compare, shown


def make_run(path, validation, config, losses=(3.0, 2.0), unit="tokens"):
    path.mkdir()
    lines = [{"kind": "train", "step": i + 1, "loss": x, f"{unit}_per_second": 2000.0} for i, x in enumerate(losses)]
    if validation is not None:
        lines.append({"kind": "validation", "step": len(losses), "loss": validation})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"logger": {"log_dir": str(path)}}))
    return path


def test_best_first_with_the_keys_that_differ(tmp_path):
    runs = [
        make_run(tmp_path / "a", 2.5, {"seed": 1, "adamw_kwargs": {"lr": 1e-3}, "precision": "fp32"}),
        make_run(tmp_path / "b", None, {"seed": 1, "adamw_kwargs": {"lr": 1e-2}, "precision": "fp32"}, (3.0, None)),
        make_run(tmp_path / "c", 2.4, {"seed": 1, "adamw_kwargs": {"lr": 1e-4}, "precision": "fp32"}),
    ]
    first, *rows = compare(runs)
    assert first == ["run", "adamw_kwargs.lr", "steps", "validation loss", "train loss (last tenth)", "tokens/s"]
    assert [row[0][-1] for row in rows] == ["c", "a", "b"]
    assert rows[0][1:] == [1e-4, 2, 2.4, 2.0, 2000.0] and rows[2][3:5] == [None, None]


def test_the_unit_is_the_runs(tmp_path):
    atoms = make_run(tmp_path / "a", 2.5, {"seed": 1}, unit="atoms")
    assert compare([atoms])[0][-1] == "atoms/s"
    tokens = make_run(tmp_path / "b", 2.4, {"seed": 1, "model_kwargs": {}})
    first, *rows = compare([tokens, atoms])
    assert first == ["run", "steps", "validation loss", "train loss (last tenth)", "tokens/s or atoms/s"]
    assert [row[0][-1] for row in rows] == ["b", "a"]


def test_errors_of_potentials_each_have_a_column(tmp_path):
    curves = {"Energy": {"MAE": "e_mae", "RMSE": "e_rmse"}, "Force": {"MAE": "f_mae"}, "Stress": {"MAE": "s_mae"}}
    runs = [make_run(tmp_path / name, None, {"seed": 1}) for name in "ab"]
    for run, energy, forces in zip(runs, (0.1, 0.2), (0.4, 0.3), strict=True):
        with (run / "metrics.jsonl").open("a") as file:
            line = {"kind": "validation", "step": 2, "energy_mae": 9.0, "e_mae": energy, "f_mae": forces}
            file.write("\n" + json.dumps(line))
        (run / "run.json").write_text(json.dumps({"curves": curves}))
    first, *rows = compare(runs)
    assert first[1:5] == ["steps", "validation e_mae", "validation f_mae", "validation s_mae"]
    assert [row[2:5] for row in rows] == [[0.1, 0.4, None], [0.2, 0.3, None]]
    assert [row[3] for row in compare(runs, "f_mae")[1:]] == [0.3, 0.4]
    with pytest.raises(ValueError, match="--by energy: it must be one of e_mae, f_mae, s_mae"):
        compare(runs, "energy")
    runs.append(make_run(tmp_path / "old", 2.5, {"seed": 1}))  # of before there were curves
    first, *rows = compare(runs)
    assert first[1:-2] == ["steps", "validation e_mae", "validation f_mae", "validation s_mae", "validation loss"]
    assert [row[2:6] for row in rows] == [[0.1, 0.4, None, None], [0.2, 0.3, None, None], [None, None, None, 2.5]]


def test_numbers_as_they_are_read():
    row = ["a", 0.1, 3e-4, None, "bf16", 500000, 2.5, 1.25e-5, 12345.6]
    assert shown(row, 4) == ["a", "0.1", "0.0003", "null", "bf16", "500,000", "2.5000", "1.25e-05", "12,346"]
    assert shown(["a", 7, None, -1234.5, 0.5123], 0) == ["a", "7", "", "-1234.5000", "0.512"]


def test_from_the_command_line(tmp_path):
    for seed in (1, 2):
        run_here("train_ddp", tmp_path / f"run_{seed}", f"seed={seed}")
    table = tmp_path / "table.csv"
    command = [sys.executable, RECIPE / "compare_runs.py", tmp_path / "run_1", tmp_path / "run_2", "--out", table]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("| run | seed | steps | validation loss |") and told.count("\n") == 4
    assert len(list(csv.reader(table.open()))) == 3
    done = subprocess.run([*command[:2], tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2 and "does not exist" in done.stderr and "error: none of these" in done.stderr
    done = subprocess.run([*command[:3], tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 0 and "left out" in done.stderr and done.stdout.count("\n") == 3
