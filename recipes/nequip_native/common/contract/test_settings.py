# SPDX-License-Identifier: Apache-2.0
"""Every configuration composes, is bound to the callables that read its keys, and says how it is started."""

import re
import sys
from unittest.mock import patch

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from common import RECIPE
from common.config import keyword_only, launch
from common.contract.running import THIS_RECIPE, TRAINERS, recipe_module


FOLDER = RECIPE / "hydra_config"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def composed(name: str, trainer: str = TRAINERS[0], *more: str) -> dict:
    """The configuration that a trainer gets, after it has been checked."""
    found = []

    def keep(config: DictConfig, distributed) -> None:
        found.append(OmegaConf.to_container(config, resolve=True))

    GlobalHydra.instance().clear()
    module = recipe_module(trainer)
    arguments = [f"{trainer}.py", *THIS_RECIPE.OPEN_CONFIGS.get(name, ()), *more, "--config-name", name]
    with patch.object(sys, "argv", arguments), patch.object(module, "train", keep):
        launch(module.main)
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_and_is_bound_to_what_reads_it(name):
    keys = recipe_module("keys")
    config = composed(name)
    assert config.keys() == keyword_only(keys.top_level).keys() | keys.SECTIONS.keys()
    for section, callable_ in keys.SECTIONS.items():
        assert keyword_only(callable_).keys() <= config[section].keys(), section
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    if name not in THIS_RECIPE.OPEN_CONFIGS:
        assert re.search(rf"^#  +\w.*train_\w+\.py --config-name {name}\b", text, re.MULTILINE)


@pytest.mark.parametrize(
    "name", sorted({"my_proteins", "my_structures", "my_cells", "continue", "finetune"} & {*NAMES})
)
def test_of_ones_own_data_the_schedule_is_as_long_as_the_run(name):
    """A shorter run, which tries the settings, has the schedule of the whole."""
    usual = composed(name)["num_train_steps"]
    for steps in (3, 9 * usual):
        schedule = composed(name, TRAINERS[0], f"num_train_steps={steps}")["lr_scheduler_kwargs"]
        assert schedule["num_training_steps"] == max(usual, steps)


def test_every_trainer_starts_with_the_small_one():
    assert len({str(composed("L0_sanity", trainer)) for trainer in TRAINERS}) == 1
    for trainer in TRAINERS:
        assert 'config_name="L0_sanity"' in (RECIPE / f"{trainer}.py").read_text()


def test_the_defaults_have_every_key_and_say_what_it_is():
    lines = (FOLDER / "defaults.yaml").read_text().partition("\n# ---- ")[2].partition("\nhydra:")[0].splitlines()
    unexplained = [line for line in lines if re.match(r" *\w+:", line) and not re.search(r" # .{3,}", line)]
    assert not unexplained
    defaults = OmegaConf.to_container(OmegaConf.load(FOLDER / "defaults.yaml"))
    keys = recipe_module("keys")
    for section, callable_ in keys.SECTIONS.items():
        assert keyword_only(callable_).keys() <= defaults[section].keys(), section
