# SPDX-License-Identifier: Apache-2.0
"""What the tests of common/contract/ know of this recipe. They load it by its path, also where nothing of ours can be
imported, so at the top it imports nothing of the recipe."""

import json
from pathlib import Path


# The smallest run that has everything. Odd widths, so that shards are uneven; stress on some frames only.
# The rate of the machine is given: to measure it takes each process half a second.
TINY = [
    "model_kwargs.num_features=[5,3]", "model_kwargs.num_element_features=3", "model_kwargs.radial_width=7",
    "model_kwargs.cutoff=3.2", "dataset.load_dataset_kwargs.split='train[:24]'", "dataset.atom_micro_batch_size=40",
    "micro_batches_per_step=4", "num_train_steps=6", "logger.frequency=1", "validation.max_rows=7",
    "validation.every_n_steps=3", "lr_scheduler_kwargs.num_warmup_steps=2",
    "lr_scheduler_kwargs.num_training_steps=20", "ema_decay=null", "logger.peak_tflops=1",
]  # fmt: skip
# What metrics.jsonl has that the trajectory decides, by kind of line.
CURVE = {
    "train": ["loss", "energy_loss", "forces_loss", "stress_loss", "grad_norm", "learning_rate", "num_atoms"],
    "validation": ["energy_mae", "forces_mae", "forces_max", "stress_rmse"],
}
# What configs leave open that others build on.
OPEN_CONFIGS = {
    "defaults": [
        "model_tag=nequip_S", "num_train_steps=200", "dataset.load_dataset_kwargs.data_files=x.extxyz",
        "dataset.micro_batch_size=2",
    ],
    "finetune": [
        "init_from=null", "model_tag=nequip_S", "model_kwargs.cutoff=5.0",
        "dataset.load_dataset_kwargs.data_files=x.extxyz",
    ],
    "my_structures": ["dataset.load_dataset_kwargs.data_files=x.extxyz"],
}  # fmt: skip
# What ranks and workers of tests need not import again.
PRELOAD = ["datasets", "ase.io", "vesin"]
# This recipe's own mistakes, and words of the sentence that each ends with.
BAD_INPUTS = [
    (["model_tag=nequip_XXL"], ["model_tag=nequip_XXL must be one of", "nequip_S", "allegro_L"]),
    (["model_kwargs.l_max=2"], ["model_kwargs.l_max=2: model_tag=nequip_S has no l_max"]),
    (["model_kwargs.elements=[Al,Ni]"], ["there is Cu in the data", "Al, Ni"]),
    (["model_kwargs.pair_cutoffs={Al-Xx: 3.0}"], ["model_kwargs.pair_cutoffs", "Al-Xx"]),
    (["model_kwargs.energy_shifts={Al: -1.0}"], ["model_kwargs.energy_shifts has no number for Ni"]),
    (["loss_kwargs.energy_weight=0", "loss_kwargs.forces_weight=0", "loss_kwargs.stress_weight=0"], ["are all 0"]),
    (["loss_kwargs.forces_loss=stratified_huber"], ["stratified_huber needs strata"]),
    (["loss_kwargs.forces_loss=stratified_huber", "loss_kwargs.forces_strata={1.0: -0.1}"],
     ["loss_kwargs.forces_strata.1.0=-0.1"]),
    (["loss_schedules={energy_weight: {kind: step, values: [1, 0], at: [4]}}", "loss_kwargs.forces_weight=0",
      "loss_kwargs.stress_weight=0"], ["loss_schedules: all weights of the loss are 0 at step 4"]),
    (["model_kwargs.elements=[Al,Ni,Cu,Al]"], ["model_kwargs.elements lists Al twice"]),
    (["model_kwargs.num_neighbors={Al: -3, Ni: 9, Cu: 9}"], ["model_kwargs.num_neighbors", "above 0"]),
    (["lr_scheduler_kwargs.min_lr_fraction=2"], ["lr_scheduler_kwargs.min_lr_fraction=2", "at most 1"]),
    (["loss_schedules={force_weight: {kind: constant, value: 1}}"], ["loss_schedules.force_weight is no weight"]),
    (["dataset.load_dataset_kwargs.data_files=none.extxyz"], ["none.extxyz"]),
    (["precision=bf16"], ["precision=bf16", "fp64"]),
]  # fmt: skip


def structures() -> list:
    """Validation structures of the sample, one of each kind of cell."""
    from ase.io import read

    return read(Path(__file__).parents[1] / "data" / "validation.extxyz", ":6")


def open_final_model(folder: Path):
    """Energies and forces by the calculator in the folder, which imports nothing of ours."""
    import importlib.util
    import sys

    import numpy as np
    import torch

    spec = importlib.util.spec_from_file_location("final_calculator", folder / "calculator.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["final_calculator"] = module
    sys.dont_write_bytecode = True  # the folder stays as it is
    spec.loader.exec_module(module)
    found = []
    for atoms in structures():
        atoms.calc = module.PotentialCalculator()
        found.append(np.append(atoms.get_forces().ravel(), atoms.get_potential_energy()))
    return torch.from_numpy(np.concatenate(found))


def open_checkpoint(step_folder: Path):
    """The same by the model that was trained."""
    import torch

    from atoms.ase_calculator import graph
    from atoms.potential import read_config
    from build_model import KINDS
    from common.step_folder import read_weights

    values = json.loads((step_folder / "run.json").read_text())["model"]
    config_class, model_class = KINDS[values["model_type"]]
    model = model_class(read_config(config_class, values))
    model.load_state_dict(read_weights(step_folder))
    found = []
    for atoms in structures():
        config = model.config
        output = model.eval()(**graph(atoms, config.elements, config.cutoff, config.pair_cutoffs))
        found.append(torch.cat([output.forces.flatten(), output.energies]).detach())
    return torch.cat(found)


def write_examples(folder: Path) -> None:
    """A user's own files, as commands in READMEs and docs name them."""
    from ase.io import read, write

    for name, some in {"my_structures": ":60", "new": "60:80", "test": "80:90", "structure": "90"}.items():
        write(folder / f"{name}.xyz", read(folder / "data" / "train.extxyz", some))
