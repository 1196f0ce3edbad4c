# SPDX-License-Identifier: Apache-2.0
"""What a resume takes for a change of the configuration, and what not."""

import shutil

import pyarrow.parquet as pq
import pytest

from common import RECIPE, changes
from common.changes import check_start, comparable
from common.contract.running import curve, run_here


@pytest.fixture
def defaults(tmp_path, monkeypatch):
    text = "model_tag: ???\nseed: 42\nnew: {rate: 0.5, size: '${model_tag}'}\n"
    (tmp_path / "defaults.yaml").write_text(f"defaults: [_self_]\n{text}hydra: {{run: {{dir: .}}}}\n")
    monkeypatch.setattr(changes, "DEFAULTS", tmp_path / "defaults.yaml")


def test_a_key_that_is_new_counts_as_its_default(defaults):
    old = {"model_tag": "tiny", "seed": 42}
    assert comparable(old) == comparable(old | {"new": {"rate": 0.5, "size": "tiny"}})
    assert comparable(old)["new.rate"] != comparable(old | {"new": {"rate": 0.6}})["new.rate"]
    assert comparable(old | {"gone": 1}) != comparable(old)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({"data_files": "/old/place/x.parquet"}, {"data_files": "/new/x.parquet"}, True),
        ({"data_files": ["/old/x.parquet", "/old/y.parquet"]}, {"data_files": ["new/x.parquet", "y.parquet"]}, True),
        ({"data_files": {"train": "/old/x.parquet"}}, {"data_files": {"train": "x.parquet"}}, True),
        ({"path": "/old/folder"}, {"path": "/new/folder"}, True),
        ({"cache_dir": "/old", "num_proc": 2}, {"cache_dir": "/new"}, True),
        ({"data_files": "/old/x.parquet"}, {"data_files": "/old/y.parquet"}, False),
        ({"data_files": "s3://a/x.parquet"}, {"data_files": "s3://b/x.parquet"}, False),
        ({"path": "me/set"}, {"path": "you/set"}, False),
        ({"split": "train"}, {"split": "test"}, False),
    ],
)
def test_where_data_lies_is_no_change(defaults, before, now, same):
    before, now = ({"model_tag": "a", "dataset": {"load_dataset_kwargs": kwargs}} for kwargs in (before, now))
    assert (comparable(before) == comparable(now)) == same


def test_other_weights_to_start_from(tmp_path):
    check_start({"init_from": "a"}, {"init_from": "a"}, tmp_path)
    with pytest.raises(ValueError, match=r"init_from was null and is b, but .* has weights .*; give init_from=null"):
        check_start({}, {"init_from": "b"}, tmp_path)


def test_a_recipe_that_has_moved_goes_on(tmp_path, capsys):
    """The data lies elsewhere; on the way an average of the weights begins, and is dropped again."""
    run_here("train_ddp", tmp_path / "whole", "num_train_steps=4", "dataset.mlm_probability=0.2")
    log = tmp_path / "log"

    def go(steps, *more):
        given = [f"num_train_steps={steps}", f"checkpoint.ckpt_dir={log}", "dataset.mlm_probability=0.2", *more]
        run_here("train_ddp", log, *given)
        return capsys.readouterr().err

    go(2)
    shutil.copytree(RECIPE / "data", tmp_path / "data")
    moved = [f"{part}.load_dataset_kwargs.data_files={tmp_path}/data/{name}.parquet"
             for part, name in (("dataset", "train"), ("validation", "validation"))]  # fmt: skip
    said = go(3, *moved, "ema_decay=0.9")
    assert "The weights' average begins here (ema_decay)" in said
    assert "step 3  validation of the averaged weights loss" in said
    assert "The averaged weights are dropped (ema_decay=null)" in go(4, *moved)
    assert curve(log)[:16] == curve(tmp_path / "whole")[:16]  # what training alone decides


def test_other_data_of_the_same_name_is_refused(tmp_path, capsys):
    run_here("train_ddp", tmp_path / "log", "num_train_steps=1", f"checkpoint.ckpt_dir={tmp_path}/log")
    rows = pq.read_table(RECIPE / "data" / "train.parquet")
    pq.write_table(rows.take(list(range(len(rows)))[::-1]), tmp_path / "train.parquet")
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path / "log", f"checkpoint.ckpt_dir={tmp_path}/log",
                 f"dataset.load_dataset_kwargs.data_files={tmp_path}/train.parquet")  # fmt: skip
    assert "the data is not what the checkpoint was made with" in capsys.readouterr().err


LENGTH = "lr_scheduler_kwargs.num_training_steps"


@pytest.mark.parametrize(
    ("steps", "length", "may"),
    [((500, 1000), (500, 1000), True), ((500, 1000), (500, 2000), False), ((500, 400), (500, 400), False),
     ((500, 500), (600, 500), False)],
    ids=["as long as the run", "longer than the run", "a shorter run", "no more steps"],
)  # fmt: skip
def test_a_schedule_as_long_as_the_run_follows_more_steps(steps, length, may):
    before, now = ({"num_train_steps": a, LENGTH: b} for a, b in zip(steps, length, strict=True))
    assert changes.may_change(LENGTH, before, now, ("logger.",)) == may
    assert changes.may_change("logger.log_dir", before, now, ("logger.",))
    assert not changes.may_change("seed", before, now, ("logger.",))
