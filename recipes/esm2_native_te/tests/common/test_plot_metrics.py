# SPDX-License-Identifier: Apache-2.0
"""The plot is drawn from what runs leave behind, cut and repeated lines included, and mistakes are named."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import plot_metrics
from common import RECIPE
from plot_metrics import metrics_path, read_facts, read_metrics, smoothed, throughput_key, throughput_unit


def train_line(step: int, loss: float | None = 2.5, unit: str = "tokens") -> str:
    return json.dumps({
        "kind": "train", "step": step, "loss": loss, "grad_norm": None, "learning_rate": 4e-4,
        f"{unit}_per_second": 1e4,
    })  # fmt: skip


def validation_line(step: int) -> str:
    return json.dumps({"kind": "validation", "step": step, "loss": 2.6})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 30 steps that was resumed at step 20 and killed while it wrote step 31."""
    lines = [train_line(step, 3.0) for step in range(1, 26)] + [train_line(step) for step in range(20, 31)]
    lines += [validation_line(15), validation_line(30), train_line(31)[:20]]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines))
    run_json = {"model_tag": "esm2_tiny", "num_parameters": 814386, "strategy": "ddp", "num_ranks": 1, "device": "cpu"}
    (tmp_path / "a" / "run.json").write_text(json.dumps(run_json))
    return tmp_path / "a"


def plot(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RECIPE / "plot_metrics.py", *arguments], capture_output=True, text=True, check=False
    )


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:24])


def test_cut_line_is_dropped_and_later_line_wins(run: Path):
    metrics = read_metrics(metrics_path(run))
    assert [entry["step"] for entry in metrics["train"]] == list(range(1, 31))
    assert [entry["loss"] for entry in metrics["train"]] == [3.0] * 19 + [2.5] * 11
    assert [entry["step"] for entry in metrics["validation"]] == [15, 30]


def test_facts(run: Path):
    assert read_facts(run / "metrics.jsonl") == ["esm2_tiny", "814.4k parameters", "ddp", "1 rank", "cpu"]
    assert read_facts(run.parent / "metrics.jsonl") == []


def test_smoothing_skips_what_was_not_recorded():
    assert smoothed([1.0, math.nan, 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]


def test_the_unit_and_the_loss_are_the_runs(run: Path, tmp_path: Path, monkeypatch):
    atoms = tmp_path / "atoms"
    atoms.mkdir()
    (atoms / "metrics.jsonl").write_text(train_line(1, unit="atoms"))
    (atoms / "run.json").write_text(json.dumps({"loss_name": "Loss of energies and forces"}))
    assert throughput_key(read_metrics(atoms / "metrics.jsonl")) == "atoms_per_second"
    assert throughput_unit("atoms_per_second") == "atoms/s"
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, _: drawn.append([ax.get_title("left") for ax in figure.axes])
    )
    plot_metrics.plot_metrics([atoms], tmp_path / "one.png")
    plot_metrics.plot_metrics([run, atoms], tmp_path / "two.png")
    assert drawn[0][:2] == ["Loss of energies and forces", "Throughput, real atoms/s"]
    both = "Loss (lines: train, markers: validation)"
    assert drawn[1] == [both, "Throughput, real tokens/s or atoms/s", "Learning rate", "Gradient norm"]


def test_errors_of_validations_are_drawn(tmp_path: Path, monkeypatch):
    curves = {"Energy error, eV": {"MAE": "e_mae", "RMSE": "e_rmse"}, "Stress error, GPa": {"MAE": "s_mae"}}
    for name in "ab":
        (tmp_path / name).mkdir()
        lines = [train_line(step, 10.0**-step, "atoms") for step in (1, 2, 3)]
        lines += [json.dumps({"kind": "validation", "step": n, "e_mae": 1 / n, "e_rmse": 2 / n}) for n in (1, 2, 9)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        (tmp_path / name / "run.json").write_text(json.dumps({"curves": curves}))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append(figure))
    plot_metrics.plot_metrics([tmp_path / "a"], tmp_path / "one.png")
    plot_metrics.plot_metrics([tmp_path / "a", tmp_path / "b"], tmp_path / "two.png")
    (loss, errors, *_), (_, several, *_) = (figure.axes for figure in drawn)
    assert [ax.get_title("left") for ax in drawn[0].axes[1:3]] == ["Energy error, eV", "Throughput, real atoms/s"]
    assert loss.get_yscale() == errors.get_yscale() == "log"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train 0.001"]  # no validation
    assert [text.get_text() for text in errors.get_legend().get_texts()] == ["MAE 0.111", "RMSE 0.222"]
    assert [list(line.get_ydata()) for line in several.lines] == [[1, 1 / 2, 1 / 9]] * 2
    assert several.get_title("left") == "Energy error, eV (MAE)"


def test_a_single_logged_step_shows(tmp_path: Path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(train_line(10))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append(figure))
    plot_metrics.plot_metrics([tmp_path], tmp_path / "one.png")
    for ax in drawn[0].axes[:3]:  # the line has no gradient norm
        assert "o" in [line.get_marker() for line in ax.lines]
        assert [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]] == [10]


@pytest.mark.parametrize("given", ["a", "a/metrics.jsonl"])
def test_one_run(run: Path, given: str):
    result = plot(run.parent / given, "--reference-loss", "2.87", "--reference-label", "unigram entropy")
    assert result.returncode == 0, result.stderr
    assert png_size(run / "metrics.png") == (1500, 1020)


def test_several_runs_of_one_name(run: Path, tmp_path: Path):
    other = tmp_path / "other" / "a"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_text(train_line(1, None) + "\n" + train_line(2))
    result = plot(run, other, "--out", tmp_path / "both.png", "--smooth", "5")
    assert result.returncode == 0, result.stderr
    assert png_size(tmp_path / "both.png") == (1500, 1020)


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, [], "does not exist"),
        ("", [], "holds no training step"),
        (validation_line(10), [], "holds no training step"),
        (train_line(1), ["--smooth", "0"], "1 or more"),
        (train_line(1), ["--out", "no/such/folder.png"], "No such file"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, content: str | None, arguments: list[str], message: str):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    result = plot(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
