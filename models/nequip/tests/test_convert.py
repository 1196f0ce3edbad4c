# SPDX-License-Identifier: Apache-2.0
"""Weights of the package to ours and back, and what is refused."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from golden import COMMON, set_waves
from make_golden import CASES, ODD

from convert_nequip import config_from_nequip, native_to_nequip, nequip_arguments, nequip_to_native
from modeling_nequip import NequIP, NequIPConfig


def made(options: dict) -> tuple[NequIPConfig, dict, dict]:
    config = NequIPConfig(**COMMON | options)
    model = NequIP(config)
    set_waves(model)
    return config, dict(model.state_dict()), native_to_nequip(model.state_dict(), config)


@pytest.mark.parametrize("name", [name for name in CASES if "_X" not in name])
def test_there_and_back(name):
    config, weights, theirs = made(CASES[name])
    found = config_from_nequip(nequip_arguments(config), theirs)
    back = nequip_to_native(theirs, found)
    for key, value in weights.items():
        if key.startswith("added_"):  # now in the configuration
            assert not back[key].any()
            now = getattr(found, f"energy_{key[6:]}")
            assert now == pytest.approx((torch.tensor(getattr(config, f"energy_{key[6:]}")) + value).tolist())
        else:
            torch.testing.assert_close(back[key], value, rtol=1e-15, atol=1e-15)
    same = {"pair_cutoffs", "energy_scales", "energy_shifts", "readout_width"}  # up to rounding, or a default
    assert {k: v for k, v in found.to_dict().items() if k not in same} == {
        k: v for k, v in config.to_dict().items() if k not in same
    }


def test_what_does_not_fit_is_refused():
    config, _, theirs = made(ODD)
    arguments = nequip_arguments(config)
    for change, words in (
        ({"convnet_resnet": True}, "convnet_resnet=True, which we have nothing for"),
        ({"avg_num_neighbors": "${training_data_stats:num_neighbors_mean}"}, "is no number yet"),
        ({"num_features": [6, 4]}, "must be 3 numbers"),
        ({"type_names": ["H", "C", "O1"]}, "O1 is no symbol of an element"),
        ({"readout_mlp_nonlinearity": "gelu", "readout_mlp_hidden_layers_depth": 1}, "must be silu"),
        ({"pair_potential": {"_target_": "nequip.nn.pair_potential.LennardJones"}}, "is not ZBL"),
        (
            {"pair_potential": {"_target_": "nequip.nn.ZBL", "polynomial_cutoff_p": 8.0}},
            "polynomial_cutoff_p=8.0 must be 6",
        ),
    ):
        with pytest.raises(ValueError, match=words.replace("$", r"\$").replace("{", r"\{")):
            config_from_nequip(arguments | change, theirs)
    with pytest.raises(ValueError, match="are 0 models of nequip"):
        nequip_to_native({"weight": torch.zeros(1)}, config)
    wider = NequIPConfig(**COMMON | ODD | {"num_element_features": 7})
    with pytest.raises(ValueError, match="do not fit"):
        nequip_to_native(native_to_nequip(made(ODD)[1], config), wider)


def run(monkeypatch, capsys, *words) -> tuple[int, str]:
    """The command's exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["convert_nequip.py", *map(str, words)])
    try:
        runpy.run_path(str(Path(__file__).parents[1] / "convert_nequip.py"), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, "".join(capsys.readouterr())


def test_the_command_writes_a_whole_model_or_says_why_not(monkeypatch, capsys, tmp_path):
    config, weights, theirs = made(ODD)
    torch.save({"model": nequip_arguments(config), "state_dict": theirs}, tmp_path / "theirs.pt")
    code, said = run(monkeypatch, capsys, "--to-native", tmp_path / "theirs.pt", tmp_path / "ours")
    assert code == 0 and said.startswith(f"{tmp_path / 'ours'} is written; open it: calculator.py in it")
    code, said = run(monkeypatch, capsys, "--to-nequip", tmp_path / "ours", tmp_path / "back.pt")
    assert code == 0 and said.startswith(f"{tmp_path / 'back.pt'} is written; open it")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    again = nequip_to_native(back["state_dict"], config_from_nequip(back["model"], back["state_dict"]))
    for name, value in weights.items():
        if not name.startswith("added_"):
            torch.testing.assert_close(again[name], value, rtol=1e-15, atol=1e-15)
    other = nequip_arguments(config) | {"_target_": "allegro.model.AllegroModel"}
    torch.save({"model": other, "state_dict": theirs}, tmp_path / "allegro.pt")
    before = sorted(tmp_path.iterdir())
    for words, sentence in (
        (("--to-native", tmp_path / "theirs.pt", tmp_path / "ours"), "exists; move it away"),
        (("--to-nequip", tmp_path / "ours", tmp_path / "back.pt"), "exists; move it away"),
        (("--to-native", tmp_path / "none.ckpt", tmp_path / "new"), "none.ckpt: No such file"),
        (("--to-native", tmp_path / "ours" / "config.json", tmp_path / "new"), "is no checkpoint of tensors"),
        (("--to-native", tmp_path / "allegro.pt", tmp_path / "new"), "is a model of allegro; use convert_allegro.py"),
        (("--to-nequip", tmp_path, tmp_path / "new.pt"), "config.json: No such file"),
    ):
        code, said = run(monkeypatch, capsys, *words)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and sentence in said
    assert sorted(tmp_path.iterdir()) == before
