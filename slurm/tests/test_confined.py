# SPDX-License-Identifier: Apache-2.0
"""On a cluster that holds jobs to what they asked for, a recipe's job has its node; started by slurm/test.sh."""

import os
import subprocess
from pathlib import Path

import pytest
from test_cluster import output, recipe, sbatch, wait_for_end  # noqa: F401


CONF = os.environ.get("SLURM_CONF")
confined = CONF and "TaskPlugin=task/affinity" in Path(CONF).read_text()
pytestmark = pytest.mark.skipif(not confined, reason="no such cluster: bash slurm/test.sh")
# Has 300 MB for three seconds, more than a job has that asks for nothing.
TRAINER = """
import os, time
held = bytes(300_000_000)
time.sleep(3)
print("cores:", len(os.sched_getaffinity(0)), flush=True)
"""


def test_a_job_has_all_cores_and_all_memory(recipe):  # noqa: F811
    (recipe / "train_small.py").write_text(TRAINER)
    number = sbatch(recipe, ["--nodes=1"], ["x"], TRAINER="train_small.py")
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    cores = int(subprocess.run(["nproc"], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": ""}).stdout)
    assert f"cores: {cores}\n" in output(recipe)


def test_a_job_has_the_part_that_it_asks_for(recipe):  # noqa: F811
    (recipe / "train_small.py").write_text(TRAINER)
    part = ["--oversubscribe", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    number = sbatch(recipe, [*part, "--mem=2G"], ["x"], TRAINER="train_small.py")
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    assert "cores: 1\n" in output(recipe)
    number = sbatch(recipe, [*part, "--mem=200M"], ["x"], TRAINER="train_small.py")
    assert wait_for_end(recipe, number)["JobState"] != "COMPLETED" and "memory limit" in output(recipe)
