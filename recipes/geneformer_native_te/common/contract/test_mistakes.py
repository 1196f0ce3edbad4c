# SPDX-License-Identifier: Apache-2.0
"""A user's mistake ends as one sentence and exit code 2, before a model is built and with nothing written."""

import runpy

import pytest

from common import RECIPE
from common.contract.running import THIS_RECIPE, TRAINERS, recipe_module, run_here


EVERY_RECIPES = [
    (["sed=1"], ["Unknown key sed: did you mean seed?"]),
    (["checkpoint.ckpt_folder=x"], ["Unknown key checkpoint.ckpt_folder: did you mean checkpoint.ckpt_dir?"]),
    (["num_train_steps=many"], ["num_train_steps=many must be a whole number above 0."]),
    (["num_train_steps=???"], ["num_train_steps is not set; give it on the command line"]),
    (["checkpoint.async_save=maybe"], ["checkpoint.async_save=maybe must be true or false."]),
    (["checkpoint=null"], ["checkpoint=null must be a section"]),
    (["~seed"], ["seed was taken out"]),
    (["seed"], ["seed cannot be read", "key=value"]),
    (["--num_train_steps", "6"], ["--num_train_steps 6 cannot be read", "num_train_steps=6"]),
    (["seed=1,2"], ["seed=1,2 can mean several things: a list is seed=[1,2]"]),
    (["num_train_steps=99999999999"], ["num_train_steps=99999999999 must be less than 2^31"]),
    (["seed=18446744073709551616"], ["seed=18446744073709551616 must be less than 2^63"]),
    (
        ["checkpoint.ckpt_dir=s3://b/r"],
        ["checkpoint.ckpt_dir=s3://b/r: nothing is written to an address; give a folder"],
    ),
    (["logger.log_dir=gs://b/r"], ["logger.log_dir=gs://b/r: nothing is written to an address"]),
    (["+wandb_init_args.dir=s3://b/r"], ["wandb_init_args.dir=s3://b/r: nothing is written to an address"]),
    (["--config-name=none"], ["none: there is no such file; known are", "L0_sanity"]),
    (["checkpoint.save_every_n_steps=2"], ["checkpoint.save_every_n_steps=2 needs checkpoint.ckpt_dir"]),
]

# Of the commands beside the trainers.
COMMANDS = [
    ("export.py nope", ["nope is no whole checkpoint: there is no such folder; give a step_<n> folder"]),
    ("rows.py nope --step 1", ["nope has no config.yaml"]),
    ("rows.py nope", ["--step --micro-batch is required"]),
    ("compare_runs.py nope", ["none of these is a run"]),
    ("plot_metrics.py nope", ["nope does not exist"]),
]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("overrides", "words"), EVERY_RECIPES + THIS_RECIPE.BAD_INPUTS, ids=lambda x: x[0])
def test_it_is_refused(overrides, words, tmp_path, capfd, monkeypatch):
    trainer = TRAINERS[0]

    def built(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr(recipe_module(trainer), "materialize", built)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_here(trainer, "log", *overrides)
    sentence = capfd.readouterr().err
    assert stopped.value.code == 2
    assert sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
    assert not [word for word in words if word not in sentence], sentence
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("line", "words"),
    COMMANDS + getattr(THIS_RECIPE, "BAD_COMMANDS", []),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_commands_say_it_too(line, words, tmp_path, capfd, monkeypatch):
    script, *arguments = line.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE / script), run_name="__main__")
    said = capfd.readouterr().err
    assert stopped.value.code == 2
    assert "error: " in said.splitlines()[-1]
    assert not [word for word in words if word not in said], said
    assert files(tmp_path) == {}


def test_there_are_enough_of_this_recipe():
    assert len(THIS_RECIPE.BAD_INPUTS) >= 4
