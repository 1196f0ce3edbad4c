# SPDX-License-Identifier: Apache-2.0
"""Evaluation without training, on other data and of models without a run; the rest is in the contract."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

import evaluate
from common.contract.running import RECIPE, TINY, metrics, run_here
from common.redaction import redacted


NAMES = ("loss", "perplexity", "accuracy", "num_labels")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    more = ["checkpoint.save_final_model=true", "ema_decay=0.6", "num_train_steps=4", "layer_backend=torch"]
    return run_here("train_fsdp2", path, f"checkpoint.ckpt_dir={path}", *more)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "other.parquet"
    pq.write_table(pq.read_table(RECIPE / "data" / "train.parquet").slice(100, 9), path)
    return f"validation.load_dataset_kwargs.data_files={path}"


def trained(run):
    return {name: metrics(run, "validation", name)[-1] for name in NAMES}


def measured(capfd, *words):
    capfd.readouterr()
    evaluate.main([str(word) for word in words])
    found = json.loads(capfd.readouterr().out)
    assert found.pop("model")
    return found


def same(found, expected):
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_is_found_by_its_log_too(run, capfd, tmp_path):
    shutil.copy(run / "config.yaml", tmp_path)
    same(measured(capfd, tmp_path), trained(run))


def test_a_finished_run_validates_on_other_data_as_evaluate_does(run, other, capfd, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    words = [f"checkpoint.ckpt_dir={again}", "ema_decay=0.6", "num_train_steps=4", "layer_backend=torch"]
    words += ["checkpoint.save_final_model=true"]
    run_here("train_ddp", again, *words)
    assert trained(again) == trained(run) and len(metrics(again, "validation", "loss")) == 2  # as it was: none is made
    run_here("train_ddp", again, *words, other)
    assert (
        len(metrics(again, "validation", "loss")) == 3 and trained(again)["num_labels"] != trained(run)["num_labels"]
    )
    same(measured(capfd, run, other), trained(again))


def test_a_model_without_its_run(run, other, capfd, tmp_path):
    model = shutil.copytree(run / "final_model", tmp_path / "model")
    tiny = [word for word in TINY if word.startswith(("dataset.", "validation.", "precision"))]
    same(measured(capfd, model, "--config-name", "L0_sanity", *tiny, "layer_backend=torch"), trained(run))
    found = measured(capfd, model, other, "validation.load_dataset_kwargs.path=parquet", "layer_backend=torch")
    assert found["num_labels"] > 100 and 2.5 < found["loss"] < 4


def test_what_was_written_down_without_its_secret_is_asked_for(run, other, capfd):
    source, config = evaluate.find_run(str(run))
    secret = {"path": "parquet", "data_files": ["https://user:PLANTED@host/x.parquet", "s3://open/y.parquet"]}
    config["validation"]["load_dataset_kwargs"] |= redacted(secret | {"token": "PLANTED"})
    config["dataset"]["load_dataset_kwargs"] |= redacted(secret)  # which nobody reads now
    with pytest.raises(SystemExit):
        evaluate.check_config(evaluate.read_settings(source, config, "defaults", []))
    key = "validation.load_dataset_kwargs.data_files"
    assert f"error: {key}=['https://***@host/x.parquet', 's3://open/y.parquet']: *** stands" in capfd.readouterr().err
    evaluate.check_config(evaluate.read_settings(source, config, "defaults", [other]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody/nothing", "validation.load_dataset_kwargs.path=fasta"], "nobody/nothing"),
        (["MODEL"], "validation.load_dataset_kwargs.path is not set"),
        (["RUN", "validation.max_row=3"], "Unknown key validation.max_row: did you mean validation.max_rows?"),
        (["seed=1"], "one model, and then key=value"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, capfd, words, message):
    model = shutil.copytree(run / "final_model", tmp_path / "model")
    words = [{"MODEL": str(model), "RUN": str(run)}.get(word, word) for word in words]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped, evaluate.command():
        evaluate.main(words)
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and message in said and "Traceback" not in said
