# SPDX-License-Identifier: Apache-2.0
"""What we save, plain transformers loads, with the same logits."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common.contract.running import RECIPE, TRAINERS, run_here, run_ranks
from common.step_folder import read_weights
from convert import save_native
from modeling_esm2 import Esm2Config, Esm2ForMaskedLM


GFP = "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTT"
# Run in a process that cannot import anything of ours.
OPEN = """
import sys, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2].replace("K", "<mask>"), return_tensors="pt")
model, info = AutoModelForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
AutoModel.from_pretrained(sys.argv[1])
assert not any(name in sys.modules for name in ("modeling_esm2", "common", "tokens", "convert", "transformer_engine"))
torch.save((dict(inputs), model.eval()(**inputs).logits.detach()), sys.argv[3])
"""


def finished(tmp_path, *more):
    return [f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_final_model=true", *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return run_here("train_ddp", path, *finished(path))


def training_model(run):
    saved = json.loads((run / "step_6" / "run.json").read_text())
    model = Esm2ForMaskedLM(Esm2Config(**saved["model"]))
    model.load_state_dict(read_weights(run / "step_6"))
    return model.eval()


@torch.no_grad()
def test_plain_transformers_gives_the_training_models_logits(run, tmp_path):
    command = [sys.executable, "-I", "-c", OPEN, str(run / "final_model"), GFP, str(tmp_path / "logits.pt")]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    inputs, logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(training_model(run)(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    assert (inputs["input_ids"] == 32).sum() == GFP.count("K")


def test_the_folder_is_whole(run):
    config = json.loads((run / "final_model" / "config.json").read_text())
    assert config["architectures"] == ["EsmForMaskedLM"] and config["model_type"] == "esm"
    assert "auto_map" not in config
    assert len(AutoTokenizer.from_pretrained(run / "final_model")) == 33
    card = (run / "final_model" / "README.md").read_text()
    loss = next(
        json.loads(line)["loss"]
        for line in reversed((run / "metrics.jsonl").read_text().splitlines())
        if json.loads(line)["kind"] == "validation"
    )
    assert f"{loss:.4f}" in card and "6 steps" in card and "num_train_steps: 6" in card and "train.parquet" in card
    assert not list(run.glob(".*partial*"))


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_all_strategies_write_the_same_tensors(trainer, run, tmp_path):
    run_ranks(trainer, 2, tmp_path, *finished(tmp_path))
    ours, theirs = (load_file(path / "final_model" / "model.safetensors") for path in (run, tmp_path))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_reference_is_exported_too(tmp_path):
    run_here("train_fsdp2", tmp_path, *finished(tmp_path, "model_tag=facebook/esm2_t6_8M_UR50D"))
    command = [sys.executable, "-I", "-c", OPEN, str(tmp_path / "final_model"), GFP, str(tmp_path / "logits.pt")]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)


def test_offline_export_equals_the_one_at_the_end(run, tmp_path):
    command = [sys.executable, "export.py", str(run / "step_6"), str(tmp_path / "exported")]
    subprocess.run(command, cwd=RECIPE, check=True, timeout=120)
    ours, theirs = (load_file(path / "model.safetensors") for path in (run / "final_model", tmp_path / "exported"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_mistakes_are_one_sentence(run, tmp_path):
    for arguments, message in (
        ([str(run / "step_6"), str(run / "final_model")], "exists"),
        ([str(tmp_path), str(tmp_path / "out")], "no whole checkpoint"),
    ):
        done = subprocess.run([sys.executable, "export.py", *arguments], cwd=RECIPE, capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.rotated
@pytest.mark.parametrize("kind", ["hf", "native"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_goes_on_from_pretrained_weights(trainer, kind, run, tmp_path):
    source = run / "final_model"
    if kind == "native":
        model = training_model(run)
        source = tmp_path / "native"
        save_native(model.state_dict(), model.config, source)
    started = run_here(trainer, tmp_path / "ours", f"init_from={source}", "num_train_steps=1")
    theirs = run_here("train_ddp", tmp_path / "theirs", "model_tag=facebook/esm2_t6_8M_UR50D", f"init_from={source}",
                      "num_train_steps=1")  # fmt: skip
    first, reference = (
        json.loads((p / "metrics.jsonl").read_text().splitlines()[0])["loss"] for p in (started, theirs)
    )
    fresh = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first == pytest.approx(reference, rel=1e-5)
    assert first != pytest.approx(fresh, rel=1e-3)


@pytest.mark.parametrize("command", ["export.py step_6 file/final", "convert.py --to-native final_model file"])
def test_a_folder_that_cannot_be_written_is_one_sentence(run, tmp_path, monkeypatch, capfd, command):
    (tmp_path / "file").touch()
    script, *words = command.split()
    words = [str(run / word) if (run / word).exists() else word for word in words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE / script), run_name="__main__")
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"error: {words[-1]} cannot be written (" in said
