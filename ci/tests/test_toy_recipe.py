# SPDX-License-Identifier: Apache-2.0
"""A recipe without a token in sight stands on `common/`: a conservative potential whose forces are a derivative.

Its trainers are ESM-2's, but for the lines that only a token recipe has.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


ROOT = Path(__file__).resolve().parents[2]
ESM2 = ROOT / "recipes" / "esm2_native_te"
LINES = (  # of a trainer, and what stands there instead
    (r"        distributed = distributed.in_groups\(.*\n", ""),
    (r"model_config\(config.model_tag, .*?\)\n", "model_config(**config.model_kwargs)\n"),
    (r"build_precision\(.*?\)\n", 'Precision(distributed.device, "fp32", bf16_pays=False)\n'),
    (r"        layout = .*\n", ""),
    (r"\*\*layout, ", ""),
    (r"        pretrained = .*\n", ""),
    (r"from pretrained import .*\n", ""),
    (r", backend=precision.backend", ""),
    (r"    prepare\(.*\n", ""),
    (r"config.seed, pretrained, ", "config.seed, "),
    (r"(    parts = .*)}\n",
     r'    schedules = LossSchedules(config.loss_schedules)\n\1, "loss_schedules": schedules}\n'),
    (r"distributed, config.seed\)\n", "distributed, config.seed, **schedules.coefficients(step, epoch))\n"),
    (r"from common.perf_logger", "from common.loss_schedules import LossSchedules\nfrom common.perf_logger"),
    (r"from build_model import \([^)]*\)\n",
     "from build_model import build_model, materialize, model_config, sharded_parts, training_flops\n"
     "from common.precision import Precision\n"),
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The toy, `common/`, `checkpoint.py`, and two of the trainers."""
    folder = tmp_path_factory.mktemp("toy") / "toy_recipe"
    shutil.copytree(Path(__file__).parent / "toy_recipe", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ESM2 / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("checkpoint.py", "plot_metrics.py"):
        shutil.copy(ESM2 / name, folder)
    for name in ("train_ddp.py", "train_fsdp2.py"):
        text = (ESM2 / name).read_text()
        for pattern, new in LINES:
            text, number = re.subn(pattern, new, text)
            assert number, f"{name} has no {pattern}"
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Sixty structures of 2 to 7 atoms, of which any two repel each other with exp(-distance)."""
    random, rows = np.random.default_rng(0), []
    for _ in range(60):
        x = random.normal(size=(random.integers(2, 8), 3)) * 1.5
        vectors = x[:, None] - x
        distances = np.linalg.norm(vectors, axis=-1) + np.eye(len(x))
        repulsion = np.exp(-distances) * (1 - np.eye(len(x)))
        forces = (repulsion / distances)[..., None] * vectors
        rows.append({
            "positions": x.ravel().tolist(), "energy": repulsion.sum() / 2, "forces": forces.sum(1).ravel().tolist(),
        })  # fmt: skip
    path = tmp_path_factory.mktemp("structures") / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def train(recipe: Path, file: Path, trainer: str, ranks: int, folder: Path, *overrides: str) -> list[dict]:
    """What it wrote into `metrics.jsonl`."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, f"{trainer}.py", f"dataset.load_dataset_kwargs.data_files={file}"]
    command += [f"logger.log_dir={folder}", *overrides]
    done = subprocess.run(command, cwd=recipe, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "atoms/s" in done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(lines: list[dict]) -> list[float]:
    keys = ("loss", "energy_loss", "force_loss", "grad_norm", "num_atoms", "energy_mae", "force_rmse")
    return [line[key] for line in lines for key in keys if key in line]


@pytest.fixture(scope="module")
def curve(recipe, file, tmp_path_factory) -> list[float]:
    return numbers(train(recipe, file, "train_ddp", 1, tmp_path_factory.mktemp("run"), "ema_decay=0.9"))


def test_it_learns_and_counts_atoms(recipe, file, tmp_path):
    lines = train(recipe, file, "train_ddp", 1, tmp_path, "num_train_steps=40")
    steps, checks = ([line for line in lines if line["kind"] == kind] for kind in ("train", "validation"))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"] and checks[-1]["force_rmse"] < checks[0]["force_rmse"]
    assert [line["epoch"] for line in steps] == sorted(line["epoch"] for line in steps) and steps[-1]["epoch"] > 5
    assert all(line["loss"] == pytest.approx(line["energy_loss"] + line["force_loss"]) for line in steps)
    assert steps[-1]["num_atoms"] > 40 * 4 * 15 and min(line["fill"] for line in steps) == 1.0
    assert {line["num_structures"] for line in checks} == {60}
    done = subprocess.run([sys.executable, "plot_metrics.py", tmp_path], cwd=recipe, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "metrics.png").exists(), done.stderr


# On two ranks also below.
@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [("train_fsdp2", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("train_ddp", "train_fsdp2"))],
)
def test_one_curve(recipe, file, trainer, ranks, curve, tmp_path):
    found = numbers(train(recipe, file, trainer, ranks, tmp_path, "ema_decay=0.9", f"dataset.num_workers={ranks - 1}"))
    assert found == pytest.approx(curve, rel=1e-9)


def test_stopped_and_gone_on_on_other_ranks_under_the_other_strategy(recipe, file, curve, tmp_path):
    saving = (f"checkpoint.ckpt_dir={tmp_path}", "ema_decay=0.9", "checkpoint.save_final_model=true")
    train(recipe, file, "train_fsdp2", 2, tmp_path, *saving[:2], "num_train_steps=4")
    assert numbers(train(recipe, file, "train_ddp", 1, tmp_path, *saving)) == pytest.approx(curve, rel=1e-9)
    assert (tmp_path / "final_model" / "model.safetensors").exists()


SCHEDULES = (
    "loss_schedules={force_weight: {kind: linear, start: 0.0, end: 4.0, first: 2, last: 6}, "
    "energy_weight: {kind: step, values: [1.0, 0.5], at: [1], by: epoch}}",
)


def test_coefficients_follow_steps_and_epochs_and_are_restored(recipe, file, tmp_path):
    whole = train(recipe, file, "train_ddp", 1, tmp_path / "whole", *SCHEDULES)
    steps = [line for line in whole if line["kind"] == "train"]
    assert [line["force_loss"] == 0 for line in steps] == [True] * 2 + [False] * 6
    saving = (f"checkpoint.ckpt_dir={tmp_path / 'cut'}", *SCHEDULES)
    train(recipe, file, "train_ddp", 2, tmp_path / "cut", *saving, "num_train_steps=4")
    gone_on = train(recipe, file, "train_fsdp2", 2, tmp_path / "cut", *saving)
    assert numbers(gone_on) == pytest.approx(numbers(whole), rel=1e-9)
    kept = json.loads((tmp_path / "cut" / "step_8" / "run.json").read_text())["loss_schedules"]
    assert kept["force_weight"]["end"] == 4.0


def test_a_mistake_is_one_sentence(recipe, file):
    command = [sys.executable, "train_ddp.py", f"dataset.load_dataset_kwargs.data_files={file}"]
    for override, sentence in (
        ("model_kwargs.widths=3", "error: Unknown key model_kwargs.widths: did you mean model_kwargs.width?"),
        ("model_kwargs.width=wide", "error: model_kwargs.width=wide must be a whole number above 0."),
    ):
        done = subprocess.run([*command, override], cwd=recipe, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.strip() == sentence
