# SPDX-License-Identifier: Apache-2.0
"""Weights to start from that nearly fit: one short sentence, or what fits of them."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModel, EsmForMaskedLM

from common.config import notes_on_continuing
from common.contract.running import RECIPE, metrics, run_here
from modeling_esm2 import Esm2Config
from pretrained import FAMILY, open_pretrained, open_step, shapes
from tokens.starting_weights import empty_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", "checkpoint.save_final_model=true", "num_train_steps=1")
    return path


def encoder(run, path):
    AutoModel.from_pretrained(run / "final_model", add_pooling_layer=True).save_pretrained(path)


def resized(run, path, size=40):
    model = EsmForMaskedLM.from_pretrained(run / "final_model")
    torch.manual_seed(0)
    model.resize_token_embeddings(size)
    model.save_pretrained(path)


def other_size(run, path):
    shutil.copytree(run / "final_model", path)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "layer.1." not in name}
    kept["esm.contact_head.regression.weight"] = kept["esm.contact_head.regression.weight"][:, :4].contiguous()
    save_file(kept, path / "model.safetensors", {"format": "pt"})


def without_names(run, path):
    shutil.copytree(run / "final_model", path)
    weights = load_file(path / "model.safetensors")
    save_file({name: x for name, x in weights.items() if "layer.0." not in name}, path / "model.safetensors")


NEARLY = {
    "encoder": (encoder, ["missing lm_head.bias, lm_head.dense.bias"]),
    "resized": (resized, ["it has vocab_size=40, and the model vocab_size=33"]),
    "other size": (other_size, ["it has num_hidden_layers=1, and the model num_hidden_layers=2"]),
    "without names": (without_names, ["missing esm.encoder.layer.0.", " and 11 more"]),
}


@pytest.mark.parametrize("kind", NEARLY)
def test_what_does_not_fit_is_one_short_sentence(run, tmp_path, capfd, kind):
    make, parts = NEARLY[kind]
    make(run, tmp_path / "source")
    capfd.readouterr()
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path / "log", f"init_from={tmp_path / 'source'}")
    sentence = capfd.readouterr().err.splitlines()[-1]
    for part in ["error: init_from=", "init_from_partial=true takes what fits", *parts]:
        assert part in sentence, sentence
    assert len(sentence.replace(str(tmp_path), "")) < 420 and sentence.count(",") < 14


@pytest.mark.parametrize(
    ("kind", "new", "left_out"),
    [
        ("encoder", ["lm_head.bias"], ["esm.pooler.dense.bias", "esm.pooler.dense.weight"]),
        ("resized", [], []),
        (
            "other size",
            ["esm.contact_head.regression.weight", "esm.encoder.layer.1."],
            ["esm.contact_head.regression"],
        ),
    ],
)
def test_a_partial_start_takes_what_fits_and_says_the_rest(run, tmp_path, kind, new, left_out):
    NEARLY[kind][0](run, tmp_path / "source")
    shape, whole = open_step(run / "step_1")
    weights, note = open_pretrained(str(tmp_path / "source"), shape, partial=True, seed=3)
    said_new, said_left = note.partition("new, from the seed: ")[2].split("; left out: ")
    assert all(name in said_new for name in new) and all(name in said_left for name in left_out), note
    for name, size in shapes(shape).items():
        first = empty_model(FAMILY, shape).initial_value(name, size, 3)
        is_new = name.startswith(tuple(prefix.removesuffix("bias") for prefix in new))
        assert torch.equal(weights[name], first if is_new else whole[name]), name
    if kind == "resized":
        assert "Of its 40 tokens the first 33 are taken" in note


def test_nothing_fits_a_model_of_another_width(run):
    shape = Esm2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    with pytest.raises(ValueError, match="it has hidden_size=48, and the model hidden_size=64"):
        open_pretrained(str(run / "final_model"), shape, partial=True)


@pytest.mark.parametrize("trainer", ["train_ddp", "train_fsdp2"])
def test_a_partial_start_trains(run, tmp_path, capsys, trainer):
    encoder(run, tmp_path / "source")
    more = [f"init_from={tmp_path / 'source'}", "init_from_partial=true", "num_train_steps=1"]
    run_here(trainer, tmp_path / "own", *more)
    assert "tensors are taken; new, from the seed: lm_head.bias" in capsys.readouterr().err
    run_here(trainer, tmp_path / "hf", *more, "model_tag=facebook/esm2_t6_8M_UR50D")
    ours, theirs = (metrics(tmp_path / name, "train", "loss") for name in ("own", "hf"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_checkpoint_is_a_start_too(run, tmp_path):
    losses = [
        metrics(run_here("train_ddp", tmp_path / str(i), f"init_from={source}", "num_train_steps=1"), "train", "loss")
        for i, source in enumerate((run, run / "step_1", run / "final_model"))
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_continuing_with_what_is_meant_for_a_start_is_told(run, tmp_path, capsys):
    start = [f"init_from={run / 'final_model'}", "num_train_steps=1"]
    run_here("train_ddp", tmp_path / "a", *start)
    said = capsys.readouterr().err
    assert "adamw_kwargs.lr=0.0004 is a rate for training from scratch" in said and "is the bundled sample" in said
    shutil.copy(RECIPE / "data" / "train.parquet", tmp_path / "own.parquet")
    own = f"dataset.load_dataset_kwargs.data_files={tmp_path / 'own.parquet'}"
    run_here("train_ddp", tmp_path / "b", *start, own, "adamw_kwargs.lr=1e-5")
    said = capsys.readouterr().err
    assert "from scratch" not in said and "bundled" not in said


def test_a_bundled_sample_among_several_sources_is_told():
    mix = {"a": {"load_dataset_kwargs": {"data_files": str(RECIPE / "data" / "train.parquet")}}, "b": {"weight": 2}}
    config = {"init_from": "m", "adamw_kwargs": {"lr": 1e-5}, "dataset": {"load_dataset_kwargs": {}, "mix": mix}}
    (note,) = notes_on_continuing(OmegaConf.create(config))
    assert note.startswith("dataset.mix.a.load_dataset_kwargs.data_files=") and "bundled sample" in note
