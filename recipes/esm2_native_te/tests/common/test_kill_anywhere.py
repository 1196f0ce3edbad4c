# SPDX-License-Identifier: Apache-2.0
"""`kill_anywhere.py` in small, and that it notices what it is there to notice."""

import json
import random
import shutil
import sys

import pytest
from kill_anywhere import Run, compare, deaths_in_order, main

from common.contract.running import TRAINERS


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def test_every_kind_of_death_comes_soon():
    kinds = {kind for _, kind in deaths_in_order(13, random.Random(0))}
    assert kinds == {
        "one rank", "all ranks", "data worker", "in a save", "in a save in the background", "pruning", "SIGTERM",
        "SIGUSR1", "exporting",
    }  # fmt: skip


@pytest.mark.slow
def test_six_deaths(tmp_path):
    result = main(tmp_path, "train_fsdp2", num_deaths=6, seed=1, more=[])
    assert len(result["deaths"]) == 6
    assert result["wrong"] == []
    assert result["most_folders"] <= 4  # two checkpoints, one being written, one being removed

    # What it must notice, on the runs that are there.
    calm, disturbed = (Run(tmp_path / name, "train_fsdp2", result["num_steps"], []) for name in ("calm", "disturbed"))
    lines = (disturbed.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    read_twice = json.loads(lines[5])
    read_twice["first_micro_batch"] = json.loads(lines[4])["first_micro_batch"]
    (disturbed.folder / "metrics.jsonl").write_text("".join([*lines[:5], json.dumps(read_twice) + "\n", *lines[6:]]))
    assert "the steps did not read what the plan says" in compare(disturbed, calm, result["num_steps"])
    (disturbed.folder / "metrics.jsonl").write_text("".join(lines))
    (disturbed.ckpt / ".step_3.partial").mkdir()
    wrong = compare(disturbed, calm, result["num_steps"])
    assert any(sentence.startswith("the checkpoint folder holds ['.step_3.partial'") for sentence in wrong)
    (disturbed.ckpt / ".step_3.partial").rmdir()
    last = f"step_{result['num_steps']}"
    shutil.rmtree(disturbed.ckpt / last)
    shutil.copytree(calm.ckpt / sorted_steps(calm)[0], disturbed.ckpt / last)
    assert any("tensors differ" in sentence for sentence in compare(disturbed, calm, result["num_steps"]))


def sorted_steps(run):
    """The names of a run's checkpoints, oldest first."""
    return sorted((found.name for found in run.ckpt.glob("step_*")), key=lambda name: int(name[5:]))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_dozen_deaths(trainer, tmp_path):
    result = main(tmp_path, trainer, num_deaths=24, seed=0, more=[])
    assert len(result["deaths"]) == 24
    assert result["wrong"] == []
