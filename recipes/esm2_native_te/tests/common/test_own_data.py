# SPDX-License-Identifier: Apache-2.0
"""Whoever names data of his own gets it, and figures of it; the recipe's sample stays where nothing else is named."""

import json

import pytest
from omegaconf import OmegaConf

from common import RECIPE
from common.contract.running import metrics, run_here
from common.own_data import data_names, no_validation, take_own, validated_on, weights_of


SAMPLE = f"{RECIPE}/data/train.parquet"
SAMPLE_TOO = f"{RECIPE}/data/validation.parquet"


def taken(train, validation=None, typed=(), **more):
    """Files for training, and for validation (None: no validation), of a configuration that names these."""
    validation = {"path": "parquet", "data_files": SAMPLE_TOO} if validation is None else validation
    config = OmegaConf.create(
        {
            "dataset": {"load_dataset_kwargs": {"path": "parquet", "data_files": SAMPLE, **train}, **more},
            "validation": {"load_dataset_kwargs": validation},
        }
    )
    take_own(config, typed)
    kwargs = config.validation.load_dataset_kwargs
    assert (no_validation(config) is None) == (kwargs is not None)
    return config.dataset.load_dataset_kwargs.data_files, kwargs and kwargs.data_files


def test_the_sample_stays_where_nothing_else_is_named():
    assert taken({}) == (SAMPLE, SAMPLE_TOO)
    assert taken({"split": "train[:50%]"}) == (SAMPLE, SAMPLE_TOO)


@pytest.mark.parametrize("train", [{"path": "/some/folder"}, {"path": "me/set"}, {"data_dir": "folder"}])
def test_other_data_takes_the_samples_place(train):
    assert taken(train) == (None, None)


def test_a_folder_beside_the_command(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert taken({"path": "mine"}) == (None, None)


def test_ones_own_files_are_not_validated_on_the_sample():
    assert taken({"data_files": "x.parquet"}) == ("x.parquet", None)
    assert taken({"data_files": ["x.parquet"]}, {"data_files": "y.parquet"}) == (["x.parquet"], "y.parquet")
    typed = ["validation.load_dataset_kwargs.data_files"]
    assert taken({"data_files": "x.parquet"}, typed=typed) == ("x.parquet", SAMPLE_TOO)


def test_another_file_for_validation_is_read_whole():
    def split(typed, **validation):
        data = {"path": "fasta", "data_files": "x.fasta", "split": "train[:95%]"}
        named = {"path": "fasta", "data_files": "${dataset.load_dataset_kwargs.data_files}", "split": "train[95%:]"}
        kwargs = {"dataset": {"load_dataset_kwargs": data}, "validation": {"load_dataset_kwargs": named | validation}}
        config = OmegaConf.create(kwargs)
        take_own(config, [f"validation.load_dataset_kwargs.{key}" for key in typed])
        return config.validation.load_dataset_kwargs.split

    assert split([]) == split(["data_files"], data_files="x.fasta") == "train[95%:]"
    assert split(["data_files"], data_files="y.fasta") == split(["path"], path="csv") == "train"
    assert split(["data_files", "split"], data_files="y.fasta") == "train[95%:]"


def test_data_that_was_named_and_then_taken_out():
    data = {"dataset": {"load_dataset_kwargs": {"data_files": "x"}}, "validation": {"load_dataset_kwargs": None}}
    config = OmegaConf.create(data)
    take_own(config, ["validation.load_dataset_kwargs.data_files", "validation.load_dataset_kwargs"])
    assert config.validation.load_dataset_kwargs is None


def test_mixtures():
    mix = {"a": {"load_dataset_kwargs": {"data_files": SAMPLE}}}
    assert taken({}, mix=mix) == (SAMPLE, SAMPLE_TOO)
    assert taken({}, mix=mix | {"b": {"load_dataset_kwargs": {"data_files": "x.parquet"}}}) == (SAMPLE, None)


def test_what_others_read_has_names_alone():
    assert data_names({"path": "csv", "data_files": {"train": ["/home/me/a.csv", "b.csv"]}}) == "a.csv, b.csv"
    assert data_names({"path": "fasta", "data_files": "a.fa", "split": "train[:95%]"}) == "a.fa, train[:95%]"
    assert data_names({"path": "me/set"}) == "me/set" and data_names({"path": "/home/me/set"}) == "set"
    run = {"step": 9, "config": {}, "logger": {"validation": {"step": 6, "data": "a.csv", "loss": 1.0}}}
    assert validated_on(run) == "`a.csv`, after 6 steps"
    assert validated_on({"step": 9, "logger": {"validation": {}}}) == "none"
    assert weights_of({"ema": {"num_updates": 3, "decay": 0.9}}) == "running average (ema_decay=0.9)"


def test_a_run_on_data_of_ones_own(tmp_path, capsys, monkeypatch):
    """A folder, given as users give it; the sample is not validated on, and the card says so."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "some.parquet").write_bytes((RECIPE / "data" / "validation.parquet").read_bytes())
    monkeypatch.chdir(tmp_path)
    final = ["checkpoint.ckpt_dir=log", "checkpoint.save_final_model=true", "num_train_steps=1"]
    run_here("train_ddp", tmp_path / "log", "dataset.load_dataset_kwargs.path=mine", *final, "ema_decay=0.9")
    config = OmegaConf.load("log/config.yaml")
    assert config.dataset.load_dataset_kwargs.data_files is None
    assert "There is no validation: name data of your own" in capsys.readouterr().err
    assert metrics(tmp_path / "log", "validation", "step") == []
    card = (tmp_path / "log" / "final_model" / "README.md").read_text()
    assert "on `mine`." in card and "| validation data | none |" in card
    assert "running average (ema_decay=0.9)" in card
    assert json.loads((tmp_path / "log" / "run.json").read_text())["run_id"]
