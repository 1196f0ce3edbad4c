# SPDX-License-Identifier: Apache-2.0
"""A YAML of nequip-train becomes one that trains here; nothing of it is lost without a word."""

import sys
from unittest.mock import patch

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import train_ddp
from common.config import launch
from convert_config import Conversion, as_yaml, read


NEQUIP = """
run: [train, test]
reach: 4.5
species: [Al, Ni]
data:
  _target_: nequip.data.datamodule.ASEDataModule
  seed: 1
  split_dataset: {file_path: mine.xyz, train: 0.8, val: 0.1, test: 0.1}
  key_mapping: {REF_energy: total_energy, REF_forces: forces}
  transforms:
    - _target_: nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper
      chemical_species_to_atom_type_map: "${list_to_identity_dict:${species}}"
    - {_target_: nequip.data.transforms.NeighborListTransform, r_max: "${reach}"}
    - {_target_: nequip.data.transforms.StressSignFlipTransform}
  train_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 5, num_workers: 2, shuffle: true}
  val_dataloader: {_target_: torch.utils.data.DataLoader, batch_size: 10}
  stats_manager: {_target_: nequip.data.CommonDataStatisticsManager, type_names: "${species}"}
trainer:
  _target_: lightning.Trainer
  max_epochs: 100
  max_time: 03:00:00:00
  log_every_n_steps: 20
  gradient_clip_val: 7.0
  logger:
    _target_: lightning.pytorch.loggers.wandb.WandbLogger
    project: alloys
    save_dir: "${hydra:runtime.output_dir}"
  callbacks:
    - {_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val0_epoch/weighted_sum}
    - {_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val0_epoch/weighted_sum}
    - _target_: nequip.train.callbacks.LinearLossCoefficientScheduler
      final_coeffs: {total_energy: 5.0, forces: 1.0}
      start_epoch: 10
      transition_epochs: 20
    - {_target_: mine.Callback}
training_module:
  _target_: nequip.train.EMALightningModule
  ema_decay: 0.99
  loss: {_target_: nequip.train.EnergyForceLoss, per_atom_energy: true, coeffs: {total_energy: 1.0, forces: 3.0}}
  val_metrics: {_target_: nequip.train.EnergyForceMetrics, coeffs: {forces_mae: 1.0}}
  optimizer: {_target_: torch.optim.Adam, lr: 0.01, amsgrad: true}
  lr_scheduler:
    scheduler:
      _target_: torch.optim.lr_scheduler.ReduceLROnPlateau
      factor: 0.6
      patience: 5
      threshold: 0.2
      min_lr: 1.0e-6
    monitor: val0_epoch/weighted_sum
    interval: epoch
    frequency: 1
  model:
    _target_: nequip.model.NequIPGNNModel
    compile_mode: compile
    seed: 456
    model_dtype: float64
    type_names: "${species}"
    r_max: "${reach}"
    per_edge_type_cutoff: {Al: {Ni: 3.0}}
    num_layers: 3
    l_max: 2
    parity: false
    num_features: 16
    radial_mlp_depth: 2
    radial_mlp_width: "${int_mul:${training_module.model.num_features},2}"
    readout_mlp_hidden_layers_depth: 2
    avg_num_neighbors: "${training_data_stats:num_neighbors_mean}"
    per_type_energy_scales: "${training_data_stats:forces_rms}"
    per_type_energy_shifts: {Al: -1.0, Ni: -2.0}
    pair_potential: {_target_: nequip.nn.pair_potential.ZBL, units: metal, chemical_species: "${species}"}
    something_new: 3
global_options: {allow_tf32: false}
"""
ALLEGRO = """
data:
  _target_: nequip.data.datamodule.sGDML_CCSD_DataModule
  dataset: aspirin
  train_dataloader_kwargs: {batch_size: 1}
trainer: {max_steps: 500}
training_module:
  _target_: nequip.train.NequIPLightningModule
  loss:
    _target_: nequip.train.MetricsManager
    metrics:
      - {field: forces, coeff: 2, metric: {_target_: nequip.train.HuberLoss, delta: 0.05}}
      - {field: {_target_: nequip.data.PerAtomModifier, field: total_energy}, coeff: 1,
         metric: {_target_: nequip.train.MeanAbsoluteError}}
  optimizer: {_target_: torch.optim.AdamW, lr: 0.002}
  model:
    _target_: allegro.model.AllegroModel
    type_names: [C, H, O]
    r_max: 5.0
    l_max: 2
    num_layers: 2
    num_scalar_features: 32
    num_tensor_features: 8
    radial_chemical_embed: {_target_: allegro.nn.TwoBodyBesselScalarEmbed, num_bessels: 6}
    allegro_mlp_hidden_layers_width: 48
    scalar_embed_mlp_hidden_layers_depth: 2
    tp_path_channel_coupling: false
    avg_num_neighbors: 12.5
"""


def conversion(text, folder, num_structures=None):
    (folder / "theirs.yaml").write_text(text)
    return Conversion(read(folder / "theirs.yaml"), num_structures)


def composed(found, folder):
    """What the trainer gets of it, after all checks."""
    (folder / "mine.yaml").write_text(as_yaml(found, folder / "theirs.yaml", "mine"))
    kept = []
    GlobalHydra.instance().clear()
    words = ["train_ddp.py", "--config-name", str(folder / "mine.yaml")]
    with patch.object(sys, "argv", words), patch.object(train_ddp, "train", lambda config, ranks: kept.append(config)):
        launch(train_ddp.main)
    return OmegaConf.to_container(kept[0], resolve=True)


def test_nequip(tmp_path):
    found = conversion(NEQUIP, tmp_path, 400)
    config = composed(found, tmp_path)
    model, loss = config["model_kwargs"], config["loss_kwargs"]
    assert (config["model_tag"], config["precision"], config["seed"], config["ema_decay"]) == (
        "nequip_S",
        "fp64",
        456,
        0.99,
    )
    assert (model["num_features"], model["num_layers"], model["parity"], model["cutoff"]) == (
        [16, 16, 16],
        3,
        False,
        4.5,
    )
    assert (model["radial_depth"], model["radial_width"], model["zbl"]) == (2, 32, "metal")
    assert model["readout_depth"] == 2
    assert model["pair_cutoffs"] == {"Al-Ni": 3.0, "Al-Al": 4.5, "Ni-Al": 4.5, "Ni-Ni": 4.5}
    assert (
        model["energy_shifts"] == {"Al": -1.0, "Ni": -2.0} and model["num_neighbors"] is model["energy_scales"] is None
    )
    assert config["num_train_steps"] == 400 * 100 / 5 and config["validation"]["every_n_steps"] == 80
    assert (loss["energy_weight"], loss["forces_weight"], loss["stress_weight"]) == (1.0, 3.0, 0.0)
    assert config["loss_schedules"]["energy_weight"] == {
        "kind": "linear", "start": 1.0, "end": 5.0, "first": 10, "last": 30, "by": "epoch"
    }  # fmt: skip
    data, rate = config["dataset"], config["lr_scheduler_kwargs"]
    assert data["load_dataset_kwargs"]["split"] == "train[:80%]" and data["micro_batch_size"] == 5
    assert config["validation"]["load_dataset_kwargs"]["split"] == "train[80%:90%]"
    assert data["label_keys"] == {"energy": "REF_energy", "forces": "REF_forces"} and data["units"] == {
        "stress": "-eV/Ang^3"
    }
    assert (rate["kind"], rate["factor"], rate["patience"], rate["min_lr_fraction"]) == (
        "plateau",
        0.6,
        5,
        pytest.approx(1e-4),
    )
    assert config["max_grad_norm"] == 7.0 and config["wandb_init_args"]["project"] == "alloys"
    assert config["checkpoint"]["keep_best"] == "forces_mae" and config["use_torch_compile"] is True
    named = found.notes
    for key in (
        "run", "data.seed", "trainer.max_time", "training_module.optimizer.amsgrad",
        "training_module.model.something_new",
        "training_module.lr_scheduler.scheduler.threshold", "trainer.callbacks.0",
        "trainer.callbacks.3", "data.split_dataset.train", "reach", "species",
    ):  # fmt: skip
        assert key in named, key
    assert "Not taken over" in (tmp_path / "mine.yaml").read_text()


def test_allegro(tmp_path):
    found = conversion(ALLEGRO, tmp_path)
    found.ours["dataset.load_dataset_kwargs.data_files"] = "aspirin.npz"
    config = composed(found, tmp_path)
    model, loss = config["model_kwargs"], config["loss_kwargs"]
    assert (model["num_scalars"], model["num_tensors"], model["mlp_width"], model["num_bessels"]) == (32, 8, 48, 6)
    assert (model["energy_scales"], model["energy_shifts"]) == (1.0, 0.0)  # theirs has none of the two
    assert (model["l_max"], model["num_neighbors"], config["num_train_steps"]) == (2, 12.5, 500)
    assert (model["num_layers"], model["coupled_paths"], model["embedding_depth"]) == (2, False, 2)
    assert (loss["forces_loss"], loss["forces_delta"], loss["energy_loss"]) == ("huber", 0.05, "mae")
    assert (loss["forces_weight"], loss["energy_weight"], config["ema_decay"]) == (2.0, 1.0, None)
    assert config["adamw_kwargs"]["weight_decay"] == 0.01 and config["lr_scheduler_kwargs"]["min_lr_fraction"] == 1.0
    assert {"data._target_", "data.dataset"} <= {*found.notes}
    found = conversion(ALLEGRO.replace("    num_tensor_features: 8\n", ""), tmp_path)
    assert found.ours["model_kwargs.num_tensors"] == 16  # as theirs, and not as allegro_S


def test_what_begins_from_a_model(tmp_path):
    theirs = yaml.safe_load(NEQUIP)
    theirs["training_module"]["model"] = {
        "_target_": "nequip.model.modify",
        "modifiers": [
            {"modifier": "modify_PerTypeScaleShift", "shifts": {"Al": -3.5}, "shifts_trainable": True,
             "scales": "${training_data_stats:per_type_forces_rms}"},
            {"modifier": "enable_OpenEquivariance"},
        ],
        "model": {"_target_": "nequip.model.ModelFromPackage", "package_path": "old.nequip.zip"},
    }  # fmt: skip
    found = conversion(yaml.safe_dump(theirs), tmp_path)
    model = {key.partition(".")[2]: value for key, value in found.ours.items() if key.startswith("model_kwargs.")}
    assert found.ours["init_from"] == found.ours["model_tag"] == "old.nequip.zip"
    assert model == {"cutoff": None, "energy_shifts": {"Al": -3.5}, "train_shifts": True}
    assert {f"training_module.model.model{key}" for key in (": enable_OpenEquivariance", ".scales")} <= {*found.notes}


def test_muon(tmp_path):
    theirs = yaml.safe_load(NEQUIP)
    theirs["training_module"]["optimizer"] = {
        "_target_": "nequip.train.MuonWithAuxAdam",
        "param_groups": {
            "_target_": "nequip.model.MuonParamGroups",
            "muon": {"lr": 0.01, "weight_decay": 1e-5}, "adam": {"lr": 0.02, "betas": [0.9, 0.95]},
        },
    }  # fmt: skip
    found = conversion(yaml.safe_dump(theirs), tmp_path)
    assert found.ours["adamw_kwargs.groups"] == [{"names": "layers.*", "muon": True, "weight_decay": 1e-5}]
    assert (found.ours["adamw_kwargs.lr"], found.ours["adamw_kwargs.betas"]) == (0.02, [0.9, 0.95])
    assert "training_module.optimizer.param_groups.muon.lr" in found.notes


def test_every_key_is_taken_or_named(tmp_path):
    """Each value of the file, by turns changed to one that nobody knows."""
    theirs = yaml.safe_load(NEQUIP)
    theirs["trainer"]["unheard"] = theirs["data"]["unheard"] = theirs["training_module"]["loss"]["unheard"] = 1
    found = conversion(yaml.safe_dump(theirs), tmp_path)
    assert {"trainer.unheard", "data.unheard", "training_module.loss.unheard"} <= {*found.notes}
    assert found.ours["num_train_steps"] == "???" and "set num_train_steps" in found.notes["trainer.max_epochs"]


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "cannot be read"), ("a: 1", "has no section training_module"),
    ("a: ${unheard:1}", "unheard.*; write the value in its place"),
])  # fmt: skip
def test_other_files_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        conversion(text, tmp_path)
