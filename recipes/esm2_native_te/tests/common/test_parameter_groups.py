# SPDX-License-Identifier: Apache-2.0
"""Parts of a model that train in another way, or not at all: one curve under every strategy, resumed anywhere."""

import json
import shutil

import pytest
import torch

from common.contract.running import TRAINERS, curve, run_here, run_ranks
from common.safe_reading import read_metadata
from common.scheduler import adamw, freeze, linear_schedule
from common.step_folder import read_weights
from pretrained import open_step


GROUPS = (
    "adamw_kwargs.groups=[{names: ['esm.embeddings.*', 'esm.encoder.layer.0.*'], frozen: true}, "
    "{names: 'esm.encoder.layer.*', muon: true}, {names: 'lm_head.*', lr_factor: 3.0, weight_decay: 0.0}]"
)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)


def test_each_parameter_trains_as_the_first_group_that_names_it():
    model = Small()
    groups = [{"names": "body.*", "frozen": True}, {"names": ["*.bias"], "lr_factor": 10, "weight_decay": 0.0}]
    options = {"lr": 0.1, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.5, "groups": groups}
    freeze(model, **options)
    optimizer = adamw(model, **options)
    found = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [([model.head.weight], 0.1, 0.5), ([model.head.bias], 1.0, 0.0)]
    assert not any(p.requires_grad for p in model.body.parameters())
    schedule = linear_schedule(
        optimizer, num_warmup_steps=2, num_training_steps=100, decay_fraction=0.9, min_lr_fraction=0.1
    )
    assert schedule.get_last_lr() == [0.05] and [g["lr"] for g in optimizer.param_groups] == [0.05, 0.5]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"names": "tail.*", "frozen": True}], "no parameter is named tail.*; some names are body.weight, body.bias"),
        ([{"names": "*", "frozen": True}], "adamw_kwargs.groups freeze all parameters"),
    ],
)
def test_groups_that_cannot_be(groups, message):
    with pytest.raises(ValueError) as error:
        freeze(Small(), groups=groups)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[{frozen: true}]", "adamw_kwargs.groups[0].names is not set"),
        ("[{names: '*', rate: 2}]", "Unknown key adamw_kwargs.groups[0].rate"),
        ("[{names: '*.nothing'}]", "no parameter is named *.nothing"),
    ],
)
def test_they_are_refused_before_anything_is_built(groups, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, f"adamw_kwargs.groups={groups}")
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    return run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", "checkpoint.save_final_model=true")


@pytest.fixture(scope="module")
def reference(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    return run_here("train_ddp", path, *saved_to(path, finished))


def saved_to(path, finished, *more):
    return [
        GROUPS, f"init_from={finished / 'final_model'}", f"checkpoint.ckpt_dir={path}", "ema_decay=0.5",
        "checkpoint.save_every_n_steps=3", "checkpoint.trained_only=true", *more,
    ]  # fmt: skip


def test_what_is_frozen_stays_and_the_rest_moves(finished, reference):
    before, after = open_step(finished / "step_6")[1], open_step(reference / "step_6")[1]
    for name in before:
        still = name.startswith(("esm.embeddings.", "esm.encoder.layer.0.", "esm.contact_head."))
        assert torch.equal(before[name], after[name]) == still, name


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_every_strategy_gives_the_same_curve(trainer, finished, reference, tmp_path):
    run_ranks(trainer, 2, tmp_path, *saved_to(tmp_path, finished))
    assert curve(tmp_path) == pytest.approx(curve(reference), rel=1e-5)
    ours, theirs = (read_weights(path / "step_6") for path in (tmp_path, reference))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_megatron_fsdp_would_round_is_refused_by_name(tmp_path, capsys):
    saved = [f"checkpoint.ckpt_dir={tmp_path / 'ckpt'}", "precision=bf16", "num_train_steps=1"]
    with pytest.raises(SystemExit):
        run_here("train_mfsdp", tmp_path, GROUPS, *saved)
    assert "error: Megatron-FSDP rounds parameters that are frozen to BF16" in capsys.readouterr().err


def test_only_what_trains_is_saved_and_read_again_anywhere(finished, reference, tmp_path):
    names = {name.partition(".")[2] for name in read_metadata(reference / "step_6").state_dict_metadata}
    assert "lm_head.dense.weight" in names
    assert not [name for name in names if "embeddings." in name or "layer.0." in name]
    parts = tmp_path / "parts"
    run_here("train_ddp", parts, *saved_to(parts, finished), "num_train_steps=3")
    run_here("train_fsdp2", parts, *saved_to(parts, finished, "checkpoint.save_final_model=true"))
    assert curve(parts) == pytest.approx(curve(reference), rel=1e-5)
    ours, theirs = open_step(parts / "step_6")[1], open_step(reference / "step_6")[1]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_base_that_has_changed_is_refused(finished, reference, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(finished / "final_model", tmp_path / "base" / "final_model")
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: x + name.endswith("dense.bias") for name, x in weights.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    parts = shutil.copytree(reference, tmp_path / "parts")
    again = saved_to(parts, finished, f"init_from={base}", "checkpoint.allow_config_change=true", "num_train_steps=7")
    with pytest.raises(SystemExit):
        run_here("train_ddp", parts, *again)
    assert f"init_from={base} is not what the checkpoint was begun with" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["adamw_kwargs.groups=null", "checkpoint.trained_only=false"])
def test_what_a_checkpoint_leaves_out_cannot_train_later(finished, reference, tmp_path, capsys, change):
    parts = shutil.copytree(reference, tmp_path / "parts")
    more = ["checkpoint.trained_only=false", change, "checkpoint.allow_config_change=true", "num_train_steps=7"]
    with pytest.raises(SystemExit):
        run_here("train_ddp", parts, *saved_to(parts, finished, *more))
    assert "checkpoint.trained_only was true and is false" in capsys.readouterr().err


def test_groups_that_change_on_resume_take_effect(tmp_path):
    """What was frozen begins without a past; what is frozen now stays."""

    def train(num_steps, *more):
        allowed = "checkpoint.allow_config_change=true"
        run_here("train_ddp", tmp_path, f"checkpoint.ckpt_dir={tmp_path}", num_steps, allowed, *more)
        return dict(open_step(tmp_path / f"step_{num_steps[-1]}")[1])

    first = train("num_train_steps=3", GROUPS)
    second = train("num_train_steps=4", GROUPS.replace("layer.0.", "layer.1."))
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("layer.0." in name for name in moved) and not any("layer.1." in name for name in moved)
    run = json.loads((tmp_path / "step_4" / "run.json").read_text())
    assert run["config"]["adamw_kwargs"]["groups"][0]["names"][1] == "esm.encoder.layer.1.*"
    second = second["esm.encoder.layer.0.layernorm_mlp.fc2_weight"]
    change = (second - first["esm.encoder.layer.0.layernorm_mlp.fc2_weight"]).abs().max()
    assert 0 < change < 1e-3  # a step of AdamW that begins anew, not one of moments that are not there
