# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of layers: what it computes, and one curve under the strategies, stopped or not.

Under Megatron-FSDP it is tested in the recipe for ESM-2.
"""

import shutil

import pytest
import torch

from common.contract.running import assert_same_weights, curve, run_here, run_ranks, saving_to
from common.muon import newton_schulz
from common.scheduler import adamw, freeze


MUON = ["adamw_kwargs.groups=[{names: 'layers.*', muon: true}]", "precision=fp64", "ema_decay=0.99"]
OPTIONS = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.5}


def test_singular_values_become_about_1_and_vectors_stay():
    torch.manual_seed(0)
    for shape in ((5, 9), (9, 5), (7, 7)):
        u, s, v = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
        found = u.T @ newton_schulz(u @ torch.diag(s) @ v) @ v.T
        assert (found - torch.diag(found.diag())).abs().max() < 1e-12
        assert found.diag().min() > 0.6 and found.diag().max() < 1.25


def test_matrices_move_as_by_torchs_muon_and_the_rest_as_by_adamw():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    other.load_state_dict(model.state_dict())
    ours = adamw(model, groups=[{"names": "*", "muon": True, "lr_factor": 2.0}], **OPTIONS)
    same = {"lr": 0.2, "weight_decay": 0.5}
    theirs = [
        torch.optim.Muon([other.weight], adjust_lr_fn="match_rms_adamw", **same),
        torch.optim.AdamW([other.bias], betas=(0.9, 0.99), **same),
    ]
    for _ in range(3):
        x = torch.randn(8, 6)
        for one in (model, other):
            one(x).square().sum().backward()
        for optimizer in (ours, *theirs):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.bias, other.bias, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.weight, other.weight, rtol=0, atol=1e-2)  # theirs is rounded to BF16
    assert ours.state[model.weight].keys() == {"momentum", "step"} and "exp_avg" in ours.state[model.bias]


def test_where_there_is_no_matrix():
    with pytest.raises(ValueError, match="muon moves matrices, and none is left"):
        freeze(torch.nn.Linear(2, 2), groups=[{"names": "*bias", "muon": True}])


def test_one_curve_on_split_matrices_and_after_a_stop(tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    run_here("train_ddp", whole, *MUON, *saving_to(whole, 6))
    run_ranks("train_fsdp2", 2, split, *MUON, "num_train_steps=6")
    assert curve(split) == pytest.approx(curve(whole), rel=1e-9)
    first = curve(run_here("train_ddp", tmp_path / "adamw", *MUON[1:], "num_train_steps=6"))
    assert first != pytest.approx(curve(whole), rel=1e-3)
    steps = sorted(int(path.name[5:]) for path in whole.glob("step_*"))
    again = tmp_path / "again"
    shutil.copytree(whole / f"step_{steps[-2]}", again / f"step_{steps[-2]}")
    shutil.copy(whole / "metrics.jsonl", again)
    assert curve(run_here("train_ddp", again, *MUON, *saving_to(again, 6))) == curve(whole)
    assert_same_weights(again / "step_6", whole / "step_6")
