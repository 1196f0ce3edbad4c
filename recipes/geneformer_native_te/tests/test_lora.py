# SPDX-License-Identifier: Apache-2.0
"""LoRA: what trains and what stays, one curve under every strategy, and adapters as peft reads and writes them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from common import RECIPE
from common.contract.running import TRAINERS, curve, metrics, run_here, run_ranks
from common.safe_reading import read_metadata
from common.step_folder import read_weights
from convert_geneformer import convert, read_config, save_adapter
from convert_geneformer import read_weights as read_folder
from evaluate import main as evaluate
from modeling_geneformer import GeneformerConfig, model_for
from pretrained import open_model
from tokens.lora import MAPS, read_adapter


GOLDEN = RECIPE / "tests" / "golden_adapters"  # by ci/golden_adapters.py, with peft itself
CELL = torch.tensor([[2, 17, 300, 41, 399, 8, 130, 77, 3]])
LORA = ("lora.r=3", "lora.target_modules=[query,value,dense]", "lora.lora_dropout=0.1", "adamw_kwargs.lr=1e-2")
KINDS = ("B cell", "T cell", "cardiomyocyte", "endothelial cell", "fibroblast", "monocyte")
CELLS = ("model_kwargs.task=cells", "dataset.label_column=cell_type")


def saved_to(folder, base, *options):
    start = (
        f"model_tag={base}",
        f"init_from={base}",
        f"checkpoint.ckpt_dir={folder}",
        "validation.every_n_steps=null",
    )
    return *start, "checkpoint.save_every_n_steps=3", *LORA, *CELLS, *options


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return run_here("train_ddp", folder, *saved_to(folder, base, "checkpoint.save_final_model=true"))


def trained(step_folder):
    """The model with its adapters, as it was trained."""
    model = model_for(GeneformerConfig(**json.loads((step_folder / "run.json").read_text())["model"]))
    model.load_state_dict(read_weights(step_folder))
    return model.eval()


def with_adapter_by_hand(base, adapter, kind):
    """What peft does with an adapter, on plain `transformers`."""
    config, weights = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    weights = {name.removeprefix("base_model.model."): x for name, x in weights.items()}
    size = {"num_labels": len(weights["classifier.bias"])} if "classifier.bias" in weights else {}
    model = kind.from_pretrained(base, **size)
    targets = {n.removesuffix(".weight") for n, _ in model.named_parameters() if n.endswith(".weight")
               and any(f".{n}".endswith(f".{end}.weight") for end in config["target_modules"])}  # fmt: skip
    adapted = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}
    assert adapted == targets and config["r"] == 3
    state = model.state_dict()
    for name in adapted:
        a, b = (weights.pop(f"{name}.lora_{kind}.weight") for kind in "AB")
        state[f"{name}.weight"] += config["lora_alpha"] / config["r"] * b @ a
    assert {name.split(".")[-2] for name in weights} <= {"dense", *(config["modules_to_save"] or ())}
    assert not weights.keys() - state.keys()
    model.load_state_dict(state | weights)
    return model.eval()


def test_what_is_there_stays_and_little_else_is_saved(base, reference):
    start, end = open_model(str(base))[1], read_weights(reference / "step_6")
    adapters = {name for name in end if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 5 and all(end[name].any() for name in adapters)
    left = {name for name in end.keys() - adapters if not name.startswith(("pooler.", "classifier."))}
    assert all(torch.equal(start[name], end[name]) for name in left)
    saved = (name for name in read_metadata(reference / "step_6").state_dict_metadata if name.startswith("optimizer."))
    moments = {name.removeprefix("optimizer.state.").rpartition(".")[0] for name in saved}
    assert moments == end.keys() - left
    run = json.loads((reference / "run.json").read_text())
    assert run["num_trained"] == sum(end[name].numel() for name in moments) < run["num_parameters"] / 5


def test_it_begins_as_the_model_that_is_there(base, tmp_path):
    for r in (0, 3):
        options = (f"lora.r={r}", "lora.lora_dropout=0", "num_train_steps=1")
        run_here("train_ddp", tmp_path / str(r), *saved_to(tmp_path / str(r), base, *options))
    assert metrics(tmp_path / "3", "train", "loss") == metrics(tmp_path / "0", "train", "loss")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_strategy_gives_one_curve_and_saves_what_trains(trainer, base, reference, tmp_path):
    run_ranks(trainer, 2, tmp_path, *saved_to(tmp_path, base, "checkpoint.trained_only=true"))
    assert curve(tmp_path) == pytest.approx(curve(reference), rel=2e-5)
    ours, theirs = read_weights(tmp_path / "step_6"), read_weights(reference / "step_6")
    assert ours.keys() == {n for n in theirs if not n.startswith("geneformer.") or ".lora_" in n}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_it_resumes_to_the_bit(base, reference, tmp_path):
    parts = saved_to(tmp_path, base, "checkpoint.trained_only=true")
    run_here("train_ddp", tmp_path, *parts, "num_train_steps=3")
    run_here("train_ddp", tmp_path, *parts)
    whole = read_weights(reference / "step_6")
    assert all(torch.equal(x, whole[name]) for name, x in read_weights(tmp_path / "step_6").items())
    ours, theirs = (
        open_model(str(folder / "step_6"))[1] for folder in (tmp_path, reference)
    )  # with what was left out
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_final_model_and_its_adapter_are_the_model_that_trained(base, reference, capfd, tmp_path, monkeypatch):
    kind = transformers.AutoModelForSequenceClassification
    expected = trained(reference / "step_6")(CELL).logits[:, 0]
    merged, info = kind.from_pretrained(reference / "final_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.testing.assert_close(merged.eval()(CELL).logits, expected, rtol=0, atol=1e-5)
    adapter = reference / "final_model" / "adapter"
    by_hand = with_adapter_by_hand(base, adapter, kind)
    torch.testing.assert_close(by_hand(CELL).logits, expected, rtol=0, atol=1e-5)
    assert 'PeftModel.from_pretrained(base, "adapter")' in (reference / "final_model" / "README.md").read_text()
    convert(adapter, tmp_path / "one", "hf")  # and back
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "one", reference / "final_model")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    capfd.readouterr()
    evaluate([str(reference)])
    found = json.loads(capfd.readouterr().out)
    assert found["loss"] == pytest.approx(metrics(reference, "validation", "loss")[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("task", "kind", "head"),
    [
        ("genes", "TokenClassification", "classifier"),
        ("length", "MaskedLM", "regression_head"),
        ("masked_lm", "MaskedLM", None),
    ],
)
def test_other_tasks(task, kind, head, base, gene_classes, tmp_path):
    options = [
        f"model_kwargs.task={task}",
        f"dataset.gene_classes={gene_classes if head == 'classifier' else 'null'}",
    ]
    more = ("num_train_steps=2", "dataset.label_column=null", "checkpoint.save_final_model=true")
    run_here("train_fsdp2", tmp_path, *saved_to(tmp_path, base, *options, *more))
    start, end = open_model(str(base))[1], read_weights(tmp_path / "step_2")
    moved = {name for name in end if name not in start or not torch.equal(start[name], end[name])}
    assert {name for name in moved if ".lora_" not in name} == {name for name in end if head and name.startswith(head)}
    kind = getattr(transformers, f"AutoModelFor{kind}")
    expected = trained(tmp_path / "step_2")(CELL).logits
    by_hand = with_adapter_by_hand(base, tmp_path / "final_model" / "adapter", kind)
    for model in (kind.from_pretrained(tmp_path / "final_model").eval(), by_hand):
        torch.testing.assert_close(model(CELL).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cells", "genes_pre_norm", "masked_lm"])
def test_an_adapter_of_peft_is_read_and_written_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN / name)  # where its base is base
    adapter = GOLDEN / name / "adapter"
    config, kind = read_config(adapter)
    model = model_for(config)
    model.load_state_dict(dict(read_folder(adapter, config, kind)))
    logits = model.eval()(torch.tensor([[2, 17, 30, 4, 28, 8, 13, 7, 3]])).logits
    logits = logits[:, 0] if config.task == "cells" else logits
    torch.testing.assert_close(logits, torch.tensor(json.loads(Path("logits.json").read_text())), rtol=0, atol=1e-5)
    given = json.loads((adapter / "adapter_config.json").read_text())
    qkv = "self_attention.layernorm_qkv" if config.norm == "pre" else "self_attention.qkv"
    _, ours, heads = read_adapter(adapter, "geneformer", qkv)
    names = {"pooler" if "pooler" in n else "classifier": None for n in heads}
    native = {n.replace("bert.pooler.dense", "pooler"): x for n, x in heads.items()} | ours
    parts = {n.split(".matmul.")[1].partition(".")[0] for n in ours}
    config.lora = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": [p for p in MAPS if p in parts]}
    save_adapter(native, config, "base", tmp_path / "again")
    theirs, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert theirs.keys() == again.keys() and all(torch.equal(theirs[n], again[n]) for n in theirs)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    for key in ("peft_type", "task_type", "r", "lora_alpha", "bias", "base_model_name_or_path", "inference_mode"):
        assert written[key] == given[key], key
    assert sorted(written["target_modules"]) == given["target_modules"]
    assert {*(written["modules_to_save"] or ())} == {*names}


def test_what_is_more_than_lora_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN / "cells")
    folder = shutil.copytree("adapter", tmp_path / "adapter")
    given = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (
        ({"use_dora": True}, "has use_dora=True, and False alone is read"),
        ({"peft_type": "IA3"}, "peft_type='IA3', and 'LORA' alone"),
        ({"base_model_name_or_path": str(tmp_path)}, "config.json: No such file or directory"),
        (
            {"base_model_name_or_path": "/nowhere"},
            "is an adapter for base_model_name_or_path=/nowhere: /nowhere is no",
        ),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(given | change))
        with pytest.raises(ValueError, match=words):
            read_config(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("init_from=null",), "lora.r=3 trains beside weights that are there: give init_from, or lora.r=0"),
        (("init_from_partial=true",), "lora.r=3 needs weights that fit as a whole"),
        (("lora.r=49",), "lora.r=49 must be at most 48, the width of attention.self.query"),
        (("lora.target_modules=[queries]",), "no linear layer is named queries; there are query, key, value"),
        (("lora.target_modules=[]",), "lora.target_modules is empty"),
        (("lora.rank=3",), "Unknown key lora.rank"),
        (("lora.r=-1",), "lora.r=-1 must be"),
        ((f"init_from={GOLDEN / 'cells' / 'adapter'}",), "is an adapter too; convert it and its base to one model"),
    ],
)  # fmt: skip
def test_mistakes_end_with_a_sentence(options, words, base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *saved_to(tmp_path / "ckpt", base, *options))
    assert words in capsys.readouterr().err


def test_a_resumed_run_keeps_its_rank(base, reference, tmp_path, capsys):
    again = shutil.copytree(reference, tmp_path / "again")
    options = (
        "lora.r=4",
        "checkpoint.allow_config_change=true",
        "num_train_steps=7",
        "checkpoint.save_final_model=false",
    )
    with pytest.raises(SystemExit):
        run_here("train_ddp", again, *saved_to(again, base, *options))
    assert "holds another model: lora was" in capsys.readouterr().err


def test_training_goes_on_from_an_adapter_as_from_the_model_that_it_makes_of_its_base(base, reference, tmp_path):
    adapter, start = (
        reference / "final_model" / "adapter",
        ("lora.r=0", "num_train_steps=1", "checkpoint.ckpt_dir=null"),
    )
    start = (*start, "checkpoint.save_every_n_steps=null", f"model_kwargs.classes=[{','.join(KINDS)}]")
    for source, folder in ((adapter, tmp_path / "a"), (reference / "final_model", tmp_path / "b")):
        run_here("train_ddp", folder, *saved_to(folder, source, *start))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
