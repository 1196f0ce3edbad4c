# SPDX-License-Identifier: Apache-2.0
"""What the final model holds, and how training goes on from it; the contract opens it with plain transformers."""

import errno
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from common.contract.running import LAST, RECIPE, TRAINERS, run_here, run_ranks
from common.step_folder import read_weights
from convert import save_native
from dataset import ALPHABET
from modeling_esm2 import Esm2Config, Esm2ForMaskedLM


STEP = f"step_{LAST}"


def finished(tmp_path, *more):
    return [f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_final_model=true", *more]


@pytest.fixture
def run(straight):
    return straight("train_ddp")


def training_model(run):
    saved = json.loads((run / STEP / "run.json").read_text())
    model = Esm2ForMaskedLM(Esm2Config(**saved["model"]))
    model.load_state_dict(read_weights(run / STEP))
    return model.eval()


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
    assert f"{loss:.4f}" in card and f"{LAST} steps" in card and f"num_train_steps: {LAST}" in card
    assert "train.parquet" in card
    assert not list(run.glob(".*partial*"))


def exported_by(trainer, num_ranks, slow=False):
    return pytest.param(trainer, num_ranks, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("trainer", "num_ranks"),
    [
        exported_by("train_fsdp2", 2),
        exported_by("train_mfsdp", 1),
        exported_by("train_mfsdp", 2, slow=True),
    ],
)
def test_all_strategies_write_the_same_tensors(trainer, num_ranks, run, straight, tmp_path):
    if num_ranks == 1:
        path = straight(trainer)
    else:
        path = run_ranks(trainer, num_ranks, tmp_path, *finished(tmp_path), f"num_train_steps={LAST}")
    ours, theirs = (load_file(path / "final_model" / "model.safetensors") for path in (run, path))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_reference_is_exported_too(tmp_path):
    run_here("train_fsdp2", tmp_path, *finished(tmp_path, "model_tag=facebook/esm2_t6_8M_UR50D", "num_train_steps=1"))
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "final_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info


def refused(monkeypatch, capfd, script, *words):
    """What a command says before it ends with a user's mistake."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE / script), run_name="__main__")
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said


def test_mistakes_are_one_sentence(run, tmp_path, monkeypatch, capfd):
    for arguments, message in (
        ([str(run / STEP), str(run / "final_model")], "exists"),
        ([str(tmp_path), str(tmp_path / "out")], "no whole checkpoint"),
    ):
        assert message in refused(monkeypatch, capfd, "export.py", *arguments)


def first_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.fixture(scope="module")
def reference_loss(straight, tmp_path_factory):
    """Of Hugging Face's model that starts from the final model."""
    source = straight("train_ddp") / "final_model"
    path, tag = tmp_path_factory.mktemp("theirs"), "model_tag=facebook/esm2_t6_8M_UR50D"
    return first_loss(run_here("train_ddp", path, tag, f"init_from={source}", "num_train_steps=1"))


@pytest.mark.rotated
@pytest.mark.parametrize("kind", ["hf", "native"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_goes_on_from_pretrained_weights(trainer, kind, run, reference_loss, tmp_path):
    source = run / "final_model"
    if kind == "native":
        model = training_model(run)
        source = tmp_path / "native"
        save_native(model.state_dict(), model.config, source)
    first = first_loss(run_here(trainer, tmp_path / "ours", f"init_from={source}", "num_train_steps=1"))
    assert first == pytest.approx(reference_loss, rel=1e-5)
    assert first != pytest.approx(first_loss(run), rel=1e-3)


@pytest.mark.parametrize("command", [f"export.py {STEP} file/final", "convert.py --to-native final_model file/native"])
def test_a_folder_that_cannot_be_written_is_one_sentence(run, tmp_path, monkeypatch, capfd, command):
    (tmp_path / "file").touch()
    script, *words = command.split()
    words = [str(run / word) if (run / word).exists() else word for word in words]
    monkeypatch.chdir(tmp_path)
    said = refused(monkeypatch, capfd, script, *words)
    assert f"error: {words[-1]} cannot be written (" in said


def test_what_is_converted_is_there_as_a_whole_or_not_at_all(run, tmp_path, monkeypatch, capfd):
    words = ["--to-native", str(run / "final_model"), str(tmp_path / "native")]
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "copy", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        )
        said = refused(patch, capfd, "convert.py", *words)
        assert f"error: {words[-1]} cannot be written (No space left on device)" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["convert.py", *words])
    runpy.run_path(str(RECIPE / "convert.py"), run_name="__main__")
    said = capfd.readouterr().out
    assert said == f"{words[-1]} is written; open it: modeling_esm2.Esm2ForMaskedLM.from_pretrained({words[-1]!r})\n"
    before = {path.name: path.read_bytes() for path in (tmp_path / "native").iterdir()}
    assert f"error: {words[-1]} exists; move it away" in refused(monkeypatch, capfd, "convert.py", *words)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "native").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_the_tokenizer_reads_what_training_reads(run):
    """Lower case, gaps, stops and signs that are no residues."""
    ours = AutoTokenizer.from_pretrained(run / "final_model")
    signs = [*map(chr, range(1, 127)), "é", "Ω", "語"]
    random = np.random.default_rng(0)
    texts = ["MSKgeel", "A-C.D E\n", "MK*L**", "*", "", "".join(signs).replace("<", "")]
    texts += ["".join(random.choice(signs, 60)).replace("<", "") for _ in range(200)]
    for text in texts:
        assert ours(text)["input_ids"] == [0, *ALPHABET.tokenize(text.encode()), 2], text
    assert ours("mk<mask>l")["input_ids"] == [0, *ALPHABET.tokenize(b"MK"), 32, *ALPHABET.tokenize(b"L"), 2]


@pytest.mark.parametrize(("trained_at", "from_one_at", "length"), [(96, None, 96), (2048, None, 2048), (96, 510, 510)])
def test_its_lengths_are_the_trained_ones(run, tmp_path, trained_at, from_one_at, length):
    more = [f"dataset.max_seq_length={trained_at}", "num_train_steps=1", "validation.max_rows=2"]
    if from_one_at:
        source = shutil.copytree(run / "final_model", tmp_path / "source")
        config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": from_one_at + 2}
        (source / "config.json").write_text(json.dumps(config))
        more.append(f"init_from={source}")
    final = run_here("train_ddp", tmp_path, *finished(tmp_path, *more)) / "final_model"
    assert AutoTokenizer.from_pretrained(final).model_max_length == length
    assert json.loads((final / "config.json").read_text())["max_position_embeddings"] == length + 2
