# SPDX-License-Identifier: Apache-2.0
"""What the configuration and the data make of a model together, and what its final model can do."""

import json
import re

import numpy as np
import pytest
import torch
from ase.io import read
from hydra import compose, initialize_config_dir
from structure_files import labelled, write

from atoms.final_model import calculator
from build_model import SIZES, model_config
from common import RECIPE
from common.contract.running import assert_same_weights, curve, metrics, run_here, run_ranks
from common.step_folder import complete_steps


STATISTICS = {"num_neighbors_mean": 21.0, "forces_rms": 0.7, "per_element_energy": [-1.0, -2.0]}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_made_of_measured_numbers(name):
    shape = model_config(name, "fp32", cutoff=4.0).on(["Li", "S"], STATISTICS)
    assert (shape.num_neighbors, shape.energy_scales, shape.energy_shifts) == (21.0, [0.7, 0.7], [-1.0, -2.0])
    assert shape.dtype == "float32" and shape.pair_cutoffs is None


@pytest.mark.parametrize("name", SIZES)
def test_ones_own_structures_take_any_size_as_it_is(name):
    with initialize_config_dir(str(RECIPE / "hydra_config"), version_base=None):
        config = compose("my_structures", [f"model_tag={name}"])
    assert SIZES[name].items() <= model_config(name, "fp32", **config.model_kwargs).options.items()


def test_what_is_given_holds_over_what_is_measured():
    given = {"num_neighbors": {"Li": 5.0, "S": 9.0}, "energy_scales": 2.0, "energy_shifts": {"S": 4.0, "Li": 3.0}}
    shape = model_config("allegro_S", "fp64", cutoff=4.0, pair_cutoffs={"Li-S": 3.0}, **given).on(
        ["Li", "S"], STATISTICS
    )
    assert (shape.num_neighbors, shape.energy_scales, shape.energy_shifts) == ([5.0, 9.0], [2.0, 2.0], [3.0, 4.0])
    assert shape.pair_cutoffs == [[4.0, 3.0], [3.0, 4.0]] and shape.dtype == "float64"


@pytest.mark.parametrize(
    ("tag", "options", "words"),
    [
        ("nequip_S", {"num_features": 8 * [1]}, "must be channels for l = 0, 1, ..., up to 6"),
        ("nequip_S", {"energy_shifts": {"Nl": 1.0}}, "model_kwargs.energy_shifts: Nl is no symbol of an element"),
        ("allegro_S", {"num_scalars": 7}, "num_scalars=7 must be even"),
        ("allegro_S", {"radial_features": 5}, "radial_features=5 must be even"),
        (
            "nequip_XS",
            {"coupled_paths": False, "mlp_depth": 2},
            "give model_kwargs.coupled_paths=null model_kwargs.mlp",
        ),
        ("allegro_S", {"num_splines": 8}, "model_kwargs.num_splines=8 needs radial=spline"),
        ("allegro_S", {"radial": "spline", "cutoff_power": 4.0}, "model_kwargs.cutoff_power=4.0 needs radial=bessel"),
    ],
)
def test_models_that_cannot_be(tag, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        model_config(tag, "fp32", **options)
    assert model_config("allegro_S", "fp32", num_scalars=7, radial="spline").options["num_scalars"] == 7


def test_allegro_learns_and_its_calculator_has_forces_that_fit_its_energy(tmp_path):
    small = ["model_tag=allegro_S", "model_kwargs.num_features=null", "model_kwargs.num_element_features=null",
             "model_kwargs.radial_width=null", "model_kwargs.num_scalars=8", "model_kwargs.num_tensors=4",
             "model_kwargs.mlp_width=12", "num_train_steps=40", "validation.every_n_steps=40",
             "adamw_kwargs.lr=0.03", "lr_scheduler_kwargs.num_training_steps=100", "precision=fp32",
             f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_final_model=true", "ema_decay=0.9"]  # fmt: skip
    losses = metrics(run_here("train_ddp", tmp_path, *small), "train", "loss")
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert json.loads((tmp_path / "final_model" / "config.json").read_text())["model_type"] == "allegro"
    atoms, h = read(RECIPE / "data" / "validation.extxyz", "0"), 1e-3
    atoms.calc = calculator(tmp_path / "final_model")
    forces, energies = atoms.get_forces(), []
    for step in (h, -h):
        moved = atoms.copy()
        moved.positions[3, 1] += step
        moved.calc = atoms.calc
        energies.append(moved.get_potential_energy())
    assert forces[3, 1] == pytest.approx(-(energies[0] - energies[1]) / (2 * h), rel=2e-2, abs=2e-3)  # FP32
    assert np.abs(forces.sum(0)).max() < 1e-4
    gold = read(RECIPE / "data" / "validation.extxyz", "0")
    gold.set_chemical_symbols(["Au"] * len(gold))
    gold.calc = atoms.calc
    with pytest.raises(ValueError, match="There is Au among the atoms"):
        gold.get_potential_energy()


def test_scheduled_weights_reach_the_loss(tmp_path):
    schedule = "loss_schedules={forces_weight: {kind: linear, start: 0.0, end: 4.0, first: 1, last: 3}}"
    found = metrics(run_here("train_ddp", tmp_path, schedule, "num_train_steps=3"), "train", "forces_loss")
    assert found[0] == 0 < found[1]


def test_a_weight_without_labels_is_said(tmp_path, capfd):
    file = write(labelled(8, stress=False), tmp_path / "mine.extxyz")
    data = [f"dataset.load_dataset_kwargs.data_files={file}", "dataset.load_dataset_kwargs.split=train"]
    run_here("train_ddp", tmp_path, *data, "validation.load_dataset_kwargs=null", "num_train_steps=1")
    said = capfd.readouterr().err
    assert "no structure has stress [stress], so loss_kwargs.stress_weight=5.0 has no effect; name what" in said
    assert "no structure has forces" not in said


def test_elements_have_their_own_weights_of_forces():
    from atoms.losses import loss_terms

    losses = loss_terms(["H", "O"], element_forces_weights={"O": 3.0}, energy_weight=0.0)
    forces = torch.ones(4, 3, dtype=torch.float64)
    types = torch.tensor([0, 1, 0, 0])
    labels = {"energy": None, "forces": torch.zeros_like(forces), "stress": None}
    part = losses({"forces": forces}, labels, types, torch.tensor([4]), {"force_components": 12}, {})["forces_loss"]
    assert float(part) == pytest.approx((3 * 3 + 9) / 12)


@pytest.fixture(scope="module")
def in_float64(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("one"), "precision=fp64"))


@pytest.mark.parametrize("trainer", ["train_ddp", "train_fsdp2"])
def test_one_curve_to_nine_digits_in_float64(trainer, in_float64, tmp_path):
    run_ranks(trainer, 2, tmp_path, "precision=fp64", "dataset.num_workers=1")
    assert curve(tmp_path) == pytest.approx(in_float64, rel=1e-9)


AVERAGED = [
    "ema_decay=0.5", "checkpoint.keep_best=forces_mae", "checkpoint.max_to_keep=1", "validation.every_n_steps=1",
    "num_train_steps=4", "adamw_kwargs.lr=0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("averaged")
    return run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", *AVERAGED)


@pytest.mark.parametrize("trainer", ["train_fsdp2", "train_mfsdp"])
def test_averaged_weights_and_the_best_of_them_on_two_ranks(trainer, averaged, tmp_path):
    """The average is validated and kept, and is the same whatever the weights are split by."""
    run_ranks(trainer, 2, tmp_path, f"checkpoint.ckpt_dir={tmp_path}", *AVERAGED)
    errors = metrics(averaged, "validation", "forces_mae")
    assert metrics(tmp_path, "validation", "forces_mae") == pytest.approx(errors, rel=1e-4)
    best = errors.index(min(errors)) + 1
    assert complete_steps(tmp_path) == complete_steps(averaged) == sorted({best, 4})
    for step in complete_steps(tmp_path):
        assert_same_weights(tmp_path / f"step_{step}", averaged / f"step_{step}", rtol=1e-3, atol=1e-5)


def test_float64_is_more_than_megatron_has(tmp_path, capfd):
    with pytest.raises(SystemExit):
        run_here("train_mfsdp", tmp_path, "precision=fp64", "dataset.load_dataset_kwargs.data_files=not_read.xyz")
    assert "precision=fp64: train_mfsdp.py has FP32 at most" in capfd.readouterr().err


def test_another_precision_is_another_model(tmp_path, capfd):
    kept = f"checkpoint.ckpt_dir={tmp_path}"
    run_here("train_ddp", tmp_path, kept, "num_train_steps=1")
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, kept, "num_train_steps=2", "precision=fp64")
    assert "dtype was float32 and is float64; give precision=fp32, or take another folder" in capfd.readouterr().err


def test_validations_do_not_move_the_trajectory(tmp_path):
    """To the bit, also under DDP with several micro-batches on a rank, whose forces need gradients in a validation."""
    found = []
    for every in ("1", "null"):
        run_ranks("train_ddp", 2, tmp_path / every, "num_train_steps=3", f"validation.every_n_steps={every}")
        found.append([metrics(tmp_path / every, "train", key) for key in ("loss", "grad_norm", "forces_loss")])
    assert found[0] == found[1]
