# SPDX-License-Identifier: Apache-2.0
"""The search for the largest model, with made-up memory, and one run whose memory is measured."""

import json
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import largest_model  # noqa: E402


def made_up(fixed_gib, layer_gib, more_gib=0.0):
    """In place of `train`; `more_gib` is what the line does not tell."""

    def train(asked, num_layers):
        peak = fixed_gib + layer_gib * num_layers + (more_gib if num_layers > max(asked.depths) else 0.0)
        return {
            "num_layers": num_layers,
            "num_parameters": 20_000_000 * num_layers,
            "peak_gib": round(peak, 2),
            "tokens_per_second": 10.0,
            "losses": [3.0, 3.0],
        }

    return train


@pytest.mark.parametrize(
    ("memory", "largest"),
    [((2.0, 0.3), 60), ((2.0, 0.3, 0.9), 57), ((15.0, 0.4), 12)],
    ids=["as the line says", "more than it says", "none larger"],
)
def test_the_deepest_that_fits(memory, largest, tmp_path, monkeypatch):
    monkeypatch.setattr(largest_model, "train", made_up(*memory))
    output, page = tmp_path / "numbers.json", tmp_path / "page.md"
    assert largest_model.main([f"--output={output}", f"--table={page}"]) == 0
    runs = json.loads(output.read_text())["runs"]
    assert max(run["num_layers"] for run in runs if run["peak_gib"] <= 20) == largest
    assert f"| **{largest}** | **{20 * largest:,}** |" in page.read_text()
    check = ["--from", str(output), "--check", str(page)]
    assert largest_model.main(check) == 0
    page.write_text(page.read_text().replace(f"**{largest}**", f"**{largest + 1}**"))
    assert largest_model.main(check) == 1


def test_nothing_fits(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(largest_model, "train", made_up(30.0, 0.3))
    assert largest_model.main([f"--output={tmp_path}/numbers.json"]) == 1
    assert "--limit-gib 20: no depth fits; 33.60 GiB" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_is_measured():
    asked = largest_model.read_arguments(["--quick", "--output=x.json", "dataset.max_seq_length=64"])
    run = largest_model.train(asked, 2)
    assert run["num_parameters"] < 7_500_000 and 2.5 < run["losses"][-1] < 4
    assert 0.5 < run["peak_gib"] < 8 and run["tokens_per_second"] > 0


def test_a_run_that_fails_is_told(tmp_path, capsys):
    arguments = ["--quick", f"--output={tmp_path}/x.json", "dataset.max_seq_length=1"]
    assert largest_model.main(arguments) == 1
    assert "error: 4 layers: exit code" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--limit-gib", "-3"], "must be more than 0"),
        (["--limit-gib", "nan"], "must be more than 0"),
        (["--quick"], "--output"),
        (["--check", "page.md"], "--from"),
        (["--from", "nowhere.json"], "no such file"),
    ],
)
def test_what_it_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        largest_model.main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
