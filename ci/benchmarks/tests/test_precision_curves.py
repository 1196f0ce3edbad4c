# SPDX-License-Identifier: Apache-2.0
"""Curves in few bits are compared step by step with FP32's, on the same tokens."""

import json
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import precision_curves  # noqa: E402


@pytest.mark.slow
def test_a_quick_run(tmp_path, capsys):
    output, page, picture = (tmp_path / name for name in ("numbers.json", "page.md", "picture.png"))
    files = ["--output", str(output), "--table", str(page), "--plot", str(picture)]
    assert precision_curves.main(["--quick", *files, "dataset.max_seq_length=64"]) == 0
    losses = json.loads(output.read_text())["losses"]
    assert list(losses) == list(precision_curves.FORMATS) and {len(one) for one in losses.values()} == {4}
    assert len({tuple(one) for one in losses.values()}) == len(losses)  # all differ
    assert all(0 < abs(losses["BF16"][i] - losses["FP32"][i]) < 0.05 * losses["FP32"][i] for i in range(4))
    assert picture.read_bytes()[:4] == b"\x89PNG" and "MXFP8BlockScaling" in capsys.readouterr().out
    check = ["--from", str(output), "--check", str(page)]
    assert precision_curves.main(check) == 0
    page.write_text(page.read_text().replace("| BF16 |", "| BF16 | 0"))
    assert precision_curves.main(check) == 1


def test_the_tables_numbers():
    losses = {"FP32": [2.0] * 30, "BF16": [2.0] * 10 + [2.2] * 10 + [1.98] * 10}
    numbers = {"losses": losses, "settings": {"steps": 30, "seed": 1, "overrides": []}, "num_tokens": 7,
               "machine": "m", "date": "d", "versions": {"torch": "1", "torchao": "2"}}  # fmt: skip
    assert "| BF16 | 1.9800 | -1.00% | 10.00% | 10.00% |" in precision_curves.table(numbers)
    assert "| FP32 | 2.0000 | | | |" in precision_curves.table(numbers)


@pytest.mark.parametrize(
    ("losses", "tokens", "sentence"),
    [([3.0, None], [1, 2], "the loss became no number"), ([3.0, 2.0], None, "did not read the same tokens")],
)
def test_runs_that_cannot_be_compared_are_refused(losses, tokens, sentence, monkeypatch, tmp_path, capsys):
    counter = iter(range(100))
    monkeypatch.setattr(precision_curves, "train", lambda *_: [
        {"loss": loss, "num_tokens": tokens[i] if tokens else next(counter)} for i, loss in enumerate(losses)
    ])  # fmt: skip
    assert precision_curves.main(["--quick", "--output", str(tmp_path / "x.json")]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["precision=fp32"], "precision=fp32: the benchmark sets that itself"),
        (["--quick"], "--quick measures too little"),
        (["--check", "page.md"], "--check needs the numbers"),
    ],
)
def test_what_does_not_go_together(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        precision_curves.main(arguments)
    assert sentence in capsys.readouterr().err
