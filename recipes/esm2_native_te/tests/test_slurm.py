# SPDX-License-Identifier: Apache-2.0
"""`slurm.sh` starts what exists; Slurm's own commands are stood in for by two scripts that do their part."""

import os
import subprocess

import pytest
from running import RECIPE, TINY, environment, metrics


@pytest.fixture
def slurm(tmp_path):
    for name, text in (("srun", 'exec "$@"'), ("scontrol", "echo 127.0.0.1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node1"}
    return environment() | job | {"SLURM_SUBMIT_DIR": str(RECIPE), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("trainer", [None, "train_ddp.py"])
def test_the_script_trains_with_what_is_passed_on(slurm, trainer, tmp_path):
    if trainer:
        slurm["TRAINER"] = trainer
    command = [
        "bash",
        "slurm.sh",
        "--config-name",
        "L0_sanity",
        *TINY,
        f"logger.log_dir={tmp_path}",
        "num_train_steps=2",
    ]
    subprocess.run(command, cwd=RECIPE, env=slurm, check=True, timeout=180)
    assert len(metrics(tmp_path, "train", "loss")) == 2


def test_a_trainer_that_is_not_there(slurm):
    done = subprocess.run(
        ["bash", "slurm.sh"], cwd=RECIPE, env=slurm | {"TRAINER": "train.py"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "TRAINER=train.py" in done.stderr
