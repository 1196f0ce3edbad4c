# SPDX-License-Identifier: Apache-2.0
"""Errors and parity plots of a potential on files; ranks that repeat a micro-batch add nothing to the plot."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks_in_threads import on_ranks
from structure_files import labelled, write

import evaluate
import metrics
from build_model import open_potential
from common.contract.running import run_here
from dataset import open_validation


class Off(torch.nn.Module):
    """Labels that are wrong by known amounts."""

    def forward(self, positions, types, cell, edges, shifts, structure, once, row, energy, forces, stress, counts):
        energies = energy + 0.5 * torch.bincount(structure)
        return SimpleNamespace(energies=energies, forces=forces + 0.1 * types[:, None], stress=stress - 0.02)


def test_errors_and_parity(tmp_path, monkeypatch):
    drawn, elements = [], ["Al", "Ni", "Cu"]
    monkeypatch.setattr(metrics, "parity_plot", lambda *given: drawn.append(given))
    frames = labelled(7)
    numbers = np.concatenate([atoms.numbers for atoms in frames])
    data = {"path": "structures", "data_files": write(frames, tmp_path / "a.extxyz"), "split": "train"}

    def measured(rank):
        validator = open_validation(rank, 4.0, elements, load_dataset_kwargs=data, atom_micro_batch_size=60)
        validator.metrics = metrics.Recorded(validator.metrics)
        found = validator.run(Off(), torch.enable_grad)
        validator.metrics.report(rank, found, "some/where/model", tmp_path / "report")
        assert any("written:" in line for line in rank.said) or not rank.is_main
        return found

    for found in on_ranks(2, measured):
        assert abs(found["energy_per_atom_mae"] - 0.5) < 1e-7 and abs(found["stress_max"] - 0.02) < 1e-7
        assert abs(found["forces_mae"] - (0.1 * (numbers == 28) + 0.2 * (numbers == 29)).mean()) < 1e-7
        assert found["num_structures"] == 7
    assert json.loads((tmp_path / "report" / "errors.json").read_text()) == found
    _, both, _, groups, title = drawn[0]
    assert title == "where/model on 7 structures"
    assert (
        both["forces"][0].shape == groups["forces"].shape == (3 * len(numbers),)
        and len(both["energy_per_atom"][0]) == 7
    )
    assert np.allclose((both["forces"][1] - both["forces"][0])[groups["forces"] == "Cu"], 0.2)


def test_a_file_is_read_whole(tmp_path, capfd):
    """Also where the run kept a part of its own file for validation, and where a model has no run beside it."""
    run, file = tmp_path / "run", write(labelled(7), tmp_path / "test.extxyz")
    words = [f"checkpoint.ckpt_dir={run}", "checkpoint.save_final_model=true", "num_train_steps=1"]
    start = tmp_path / "start"
    run_here("train_ddp", start, f"checkpoint.ckpt_dir={start}", "num_train_steps=1")
    words += [f"model_tag={start}", f"init_from={start}", "validation.load_dataset_kwargs.split='train[50%:]'"]
    run_here("train_ddp", run, *words)
    shutil.rmtree(start)
    alone = shutil.copytree(run / "final_model", tmp_path / "alone")
    found = []
    for model in (run, run / "final_model", alone):
        capfd.readouterr()
        evaluate.main([str(model), f"validation.load_dataset_kwargs.data_files={file}", "--out", str(tmp_path / "o")])
        found.append(json.loads(capfd.readouterr().out))
        assert (tmp_path / "o" / "parity.png").exists() and found[-1]["num_structures"] == 7
        assert json.loads((tmp_path / "o" / "errors.json").read_text()).items() <= found[-1].items()
        shutil.rmtree(tmp_path / "o")
    for content in (b"", (alone / "model.safetensors").read_bytes()[:-100]):
        (alone / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"alone cannot be used: "):
            open_potential(alone)
    assert found[0]["forces_rmse"] == pytest.approx(found[1]["forces_rmse"]) == pytest.approx(found[2]["forces_rmse"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "validation.load_dataset_kwargs.data_files=x.xyz"], "nowhere is no run with checkpoints"),
        (["nowhere"], "validation.load_dataset_kwargs.data_files is not set"),
        (["nowhere", "test.extxyz"], "one model, and then key=value"),
    ],
)
def test_mistakes_are_one_sentence(words, message, capfd):
    with pytest.raises(SystemExit) as stopped, evaluate.command():
        evaluate.main(words)
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and message in said and "Traceback" not in said
