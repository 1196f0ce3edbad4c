# SPDX-License-Identifier: Apache-2.0
"""Evaluation without training: the trainer's numbers, of runs, checkpoints and final models, on any ranks."""

import json

import pytest
from omegaconf import OmegaConf

from common import RECIPE
from common.contract import ranks
from common.contract.running import LAST, THIS_RECIPE, TRAINERS, metrics, recipe_module


pytestmark = pytest.mark.skipif(not (RECIPE / "evaluate.py").exists(), reason="this recipe has no evaluate.py")


def same(found: dict, run) -> None:
    for name in THIS_RECIPE.CURVE["validation"]:
        assert found[name] == pytest.approx(metrics(run, "validation", name)[-1], rel=1e-5), name


@pytest.mark.parametrize("source", [".", f"step_{LAST}", "final_model"])
def test_it_gives_the_trainers_numbers(straight, source, capfd, tmp_path):
    run = straight(TRAINERS[-1])
    capfd.readouterr()
    recipe_module("evaluate").main([str(run / source), f"--out={tmp_path}"])
    found = json.loads(capfd.readouterr().out)
    assert found.pop("model").startswith(str(run))
    same(found, run)


def on_a_rank(distributed, config, source, out):
    return recipe_module("evaluate").evaluate(distributed, config, source, out)


def test_two_ranks_give_them_too(straight, tmp_path):
    run = straight(TRAINERS[-1])
    source, config = recipe_module("evaluate").find_run(str(run))
    one, other = ranks.call_on_ranks(tmp_path, on_a_rank, 2, OmegaConf.create(config), source, tmp_path)
    assert one == other
    same(one, run)
