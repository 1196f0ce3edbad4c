# SPDX-License-Identifier: Apache-2.0
"""Errors of energies and forces."""

import math

import torch

from common.batch import Batch


UNIT = "atoms"
LOSS_NAME = "Energy and force loss, eV^2"
BETTER = {"energy_mae": min, "force_rmse": min}


def batch_sums(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Forces are a derivative, so gradients are on, in a validation too."""
    output = model(**batch.inputs, counts={"structures": 1, "force_components": 1})
    return {
        "energy": output.energy_errors.abs().sum(), "force": output.force_errors.square().sum(),
        "structures": output.energy_errors.new_tensor(len(output.energy_errors)),
        "components": output.force_errors.new_tensor(output.force_errors.numel()),
    }  # fmt: skip


def summary(sums: dict[str, float]) -> dict:
    """Mean absolute error of the energy (eV), root mean square of the forces' (eV/A)."""
    return {
        "energy_mae": sums["energy"] / sums["structures"],
        "force_rmse": math.sqrt(sums["force"] / sums["components"]),
        "num_structures": int(sums["structures"]),
    }
