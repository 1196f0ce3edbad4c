# SPDX-License-Identifier: Apache-2.0
"""Every shipped configuration composes, says what its keys mean, and trains to the final model."""

import ast
import gzip
import importlib
import inspect
import json
import re
import sqlite3
import sys
import textwrap
from dataclasses import is_dataclass
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForMaskedLM, AutoTokenizer

import train_ddp
from build_model import model_config
from common.config import keyword_only, launch
from common.contract.running import LAST, RECIPE, TRAINERS, metrics, run_here
from common.step_folder import read_weights
from convert import save_native
from keys import SECTIONS, top_level
from modeling_esm2 import Esm2Config


FOLDER = RECIPE / "hydra_config"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DATA = f"dataset.load_dataset_kwargs.data_files={RECIPE}/data/train.parquet"
# What the two configs leave open that others build on.
OPEN = {
    "defaults": ["model_tag=esm2_t4_1M", "num_train_steps=2", "dataset.load_dataset_kwargs.path=parquet", DATA],
    "uniref": ["model_tag=esm2_t4_1M"],
}


def composed(name: str) -> dict:
    """The configuration that a trainer gets, after it has been checked."""
    found = []

    def keep(config: DictConfig, distributed) -> None:
        found.append(OmegaConf.to_container(config, resolve=True))

    GlobalHydra.instance().clear()
    arguments = ["train_ddp.py", *OPEN.get(name, ()), "--config-name", name]
    with patch.object(sys, "argv", arguments), patch.object(train_ddp, "train", keep):
        launch(train_ddp.main)
    return found[0]


# ---- the keys


def defaults() -> dict:
    config = OmegaConf.to_container(OmegaConf.load(FOLDER / "defaults.yaml"))
    return {key: value for key, value in config.items() if key not in ("defaults", "hydra")}


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_the_keys_are_those_of_the_callable(section):
    given = defaults()[section] if section else {k: v for k, v in defaults().items() if k not in SECTIONS}
    assert given.keys() == keyword_only(SECTIONS[section] if section else top_level).keys()


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "validation"])
def test_the_defaults_are_those_of_the_callable(section):
    for key, argument in keyword_only(SECTIONS[section]).items():
        if argument.default is not argument.empty:
            theirs = list(argument.default) if isinstance(argument.default, tuple) else argument.default
            assert defaults()[section][key] == theirs or (section, key) == ("logger", "log_dir"), key


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "model_kwargs"])
def test_every_argument_is_read(section):
    callable_ = SECTIONS[section]
    if is_dataclass(callable_):  # what it holds is read where it is used, as an attribute
        tree = ast.parse(Path(inspect.getfile(callable_)).read_text())
        assert keyword_only(callable_).keys() <= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        return
    source = textwrap.dedent(inspect.getsource(callable_.__init__ if isinstance(callable_, type) else callable_))
    read = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert keyword_only(callable_).keys() <= read


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_key_outside_sections_is_read(trainer):
    files = (f"{trainer}.py", "build_model.py", "common/config.py", "common/perf_logger.py", "tokens/low_precision.py",
             "tokens/starting_weights.py")  # fmt: skip
    text = "".join((RECIPE / file).read_text() for file in files)
    for key in keyword_only(top_level):
        assert f"config.{key}" in text or f'config.get("{key}"' in text, key


# ---- the published runs


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "lr", "warmup"),
    [
        ("L1_8M", 6, 320, 20, 4e-4, 2000),
        ("L1_35M", 12, 480, 20, 4e-4, 2000),
        ("L1_150M", 30, 640, 20, 4e-4, 2000),
        ("L1_650M", 33, 1280, 20, 4e-4, 2000),
        ("L1_3B", 36, 2560, 40, 4e-4, 20000),
        ("L1_15B", 48, 5120, 40, 1.6e-4, 20000),
    ],
)
def test_published_values(name, layers, width, heads, lr, warmup):
    config = composed(name)
    size = model_config(config["model_tag"], "torch", **config["model_kwargs"])
    assert config["model_tag"].startswith(f"esm2_t{layers}_{name[3:]}")
    assert (size.num_hidden_layers, size.hidden_size, size.num_attention_heads) == (layers, width, heads)
    assert size.intermediate_size == 4 * width and size.token_dropout
    assert config["adamw_kwargs"] == {
        "lr": lr, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01, "fused": True, "groups": None,
    }  # fmt: skip
    assert config["lr_scheduler_kwargs"] == {
        "num_warmup_steps": warmup, "num_training_steps": 500_000, "decay_fraction": 0.9, "min_lr_fraction": 0.1,
    }  # fmt: skip
    data = config["dataset"]
    assert config["micro_batches_per_step"] * data["token_micro_batch_size"] == 2**21
    assert (data["max_seq_length"], data["mlm_probability"]) == (1024, 0.15)
    assert (config["num_train_steps"], config["max_grad_norm"]) == (500_000, 1.0)
    assert config["use_sequence_packing"] and config["precision"] == "auto" and not config["init_from"]


# ---- two steps, to the end


def proteins() -> list[str]:
    return pq.read_table(RECIPE / "data" / "train.parquet")["sequence"].to_pylist()[:120]


def write_fasta(folder: Path, name: str) -> list[str]:
    text = "".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(proteins()))
    opener = gzip.open if name.endswith(".gz") else open
    with opener(folder / name, "wt") as file:
        file.write(text)
    return [f"dataset.load_dataset_kwargs.data_files={folder / name}"]


def write_clusters(folder: Path) -> list[str]:
    ids = [f"p{i}" for i in range(120)]
    for part in ("train", "validation"):
        with sqlite3.connect(folder / f"{part}.db") as database:
            database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
            database.executemany("INSERT INTO protein VALUES (?, ?)", zip(ids, proteins(), strict=True))
    members = [ids[i : i + 3] for i in range(0, 120, 3)]
    pq.write_table(pa.table({"ur50_id": ids[::3], "ur90_id": members}), folder / "train_clusters.parquet")
    pq.write_table(pa.table({"ur50_id": ids[::3]}), folder / "valid_clusters.parquet")
    return []  # where the config looks for them


def point_to_data(name: str, data: str, folder: Path) -> list[str]:
    if data == "clusters":
        return write_clusters(folder)
    if data.startswith("mine"):
        return write_fasta(folder, data)
    parquet = {"path": "parquet", "data_files": f"{RECIPE}/data/train.parquet", "split": "train"}
    has_validation = composed(name)["validation"]["load_dataset_kwargs"] is not None
    overrides = [f"dataset.load_dataset_kwargs.{key}={value}" for key, value in parquet.items()]
    if has_validation:
        overrides += [f"++validation.load_dataset_kwargs.{key}={value}" for key, value in parquet.items()]
    return overrides


ALIKE = ("L1_35M", "L1_150M", "L1_650M", "L1_3B", "L1_15B")  # but for numbers, which `test_published_values` has


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(name, "sample", marks=[pytest.mark.slow] if name in ALIKE else [])
        for name in NAMES
        if name not in ("my_proteins", "continue", "uniref_clusters")
    ]
    + [
        ("continue", "mine.fasta"),
        ("my_proteins", "mine.fasta"),
        ("my_proteins", "mine.fasta.gz"),
        ("uniref_clusters", "clusters"),
    ],
)
def test_two_steps_to_the_final_model(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed(name)
    overrides = [*OPEN.get(name, ()), *point_to_data(name, data, tmp_path), "num_train_steps=2"]
    overrides += ["checkpoint.ckpt_dir=run", "checkpoint.save_final_model=true"]
    overrides += ["init_from=null"] if name == "continue" else []  # the hub is not asked here
    overrides += [f"use_sequence_packing={config['use_sequence_packing']}"]  # as the config has it, not as other tests
    if config["dataset"]["token_micro_batch_size"]:
        overrides += ["dataset.micro_batch_size=null", "dataset.token_micro_batch_size=256"]
    path = run_here("train_fsdp2", Path("run"), *overrides, "--config-name", name)
    assert metrics(path, "train", "step") == [1, 2]
    assert metrics(path, "validation", "step") == ([2] if config["validation"]["load_dataset_kwargs"] else [])
    model, info = AutoModelForMaskedLM.from_pretrained(path / "final_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = AutoTokenizer.from_pretrained(path / "final_model")("MKV<mask>", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_continuing_is_careful():
    """What the guides ask for: published weights, a small rate with a warm-up, checkpoints, own data."""
    config, scratch = composed("continue"), composed("my_proteins")
    assert config["init_from"] == "facebook/esm2_t6_8M_UR50D" and config["model_tag"] == "esm2_t6_8M_UR50D"
    assert config["adamw_kwargs"]["lr"] <= 1e-5 < scratch["adamw_kwargs"]["lr"]
    assert 0 < config["lr_scheduler_kwargs"]["num_warmup_steps"] < config["num_train_steps"]
    assert config["checkpoint"]["ckpt_dir"] == config["logger"]["log_dir"] == "continued"
    assert config["dataset"]["load_dataset_kwargs"]["data_files"] is None
    assert config["checkpoint"]["keep_best"] == "loss" and config["checkpoint"]["save_every_n_steps"]


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_a_folder_gives_the_size(kind, straight, tmp_path):
    first = straight("train_ddp")
    folder, step = first / "final_model", first / f"step_{LAST}"
    if kind == "native":
        saved, folder = json.loads((step / "run.json").read_text()), tmp_path / "native"
        save_native(read_weights(step), Esm2Config(**saved["model"]), folder)
    sizes = [f"model_kwargs.{key}=null" for key in
             ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")]  # fmt: skip
    second = run_here("train_ddp", tmp_path / "second", "num_train_steps=1", f"model_tag={folder}", *sizes)
    counts = [json.loads((run / "run.json").read_text())["num_parameters"] for run in (first, second)]
    assert counts[0] == counts[1]
    assert metrics(first, "train", "loss")[:1] == metrics(second, "train", "loss")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_help_explains_every_key(trainer, capsys):
    with patch.object(sys, "argv", [f"{trainer}.py", "--help"]):
        launch(importlib.import_module(trainer).main)
    message = capsys.readouterr().out
    assert "torchrun --nproc_per_node=8" in message and "L1_650M" in message
    lines = [line for line in message.partition("# ---- model")[2].splitlines() if re.match(r" *\w+:", line)]
    known = OmegaConf.to_container(OmegaConf.load(FOLDER / "defaults.yaml"))
    known = {key: value for key, value in known.items() if key not in ("defaults", "hydra")}
    for key, value in known.items():
        for name in (key, *(value if isinstance(value, dict) else ())):
            (explained, *_) = [line for line in lines if line.strip().startswith(f"{name}:")]
            assert len(explained.partition("#")[2].strip()) > 5, explained
