# SPDX-License-Identifier: Apache-2.0
"""On a GPU: what a CPU gives, with every trainer, on one and two of them, and what they save opens on a CPU."""

import json
import subprocess
import sys

import pytest
import torch

from common import RECIPE
from common.contract.running import (
    LAST,
    THIS_RECIPE,
    TINY,
    TRAINERS,
    curve,
    environment,
    run_here,
    run_ranks,
    saving_to,
)
from common.contract.test_final_model import opened


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on_cpu(log_dir, *overrides):
    """A run in a process that sees no GPU."""
    command = [sys.executable, f"{TRAINERS[0]}.py", *TINY, f"logger.log_dir={log_dir}", *overrides]
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=RECIPE, env=hidden, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return log_dir


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory):
    return curve(on_cpu(tmp_path_factory.mktemp("cpu"), f"num_train_steps={LAST}"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_in_fp32_the_curve_is_the_cpus(trainer, straight, on_a_cpu):
    path = straight(trainer)
    assert "cpu" not in json.loads((path / "run.json").read_text())["device"].lower()
    assert curve(path) == pytest.approx(on_a_cpu, rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_gpus_give_the_same_curve(trainer, on_a_cpu, tmp_path):
    assert curve(run_ranks(trainer, 2, tmp_path, f"num_train_steps={LAST}")) == pytest.approx(on_a_cpu, rel=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu(trainer, on_a_cpu, tmp_path):
    run_here(trainer, tmp_path, *saving_to(tmp_path, 3))
    on_cpu(tmp_path, *saving_to(tmp_path, LAST), "checkpoint.resume_from_checkpoint=true")
    assert curve(tmp_path) == pytest.approx(on_a_cpu, rel=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_its_final_model_opens(trainer, straight, tmp_path):
    ours = THIS_RECIPE.open_checkpoint(straight(trainer) / f"step_{LAST}")
    torch.testing.assert_close(opened(straight(trainer) / "final_model", tmp_path), ours, rtol=1e-5, atol=1e-5)
