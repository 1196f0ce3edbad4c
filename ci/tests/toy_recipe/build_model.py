# SPDX-License-Identifier: Apache-2.0
"""A conservative pair potential: a small network of the distance; forces by the derivative inside the forward pass."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from common.batch import Batch
from common.distributed import Distributed
from common.weights import fill, named_tensors, random_normal


class Output(NamedTuple):
    """Loss, its parts, and the errors by which a validation goes."""

    loss: Tensor
    parts: dict[str, Tensor]
    energy_errors: Tensor
    force_errors: Tensor


class PairPotential(nn.Module):
    """Energy (eV) as a sum over pairs."""

    def __init__(self, width: int):
        super().__init__()
        self.pair = nn.Sequential(
            nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        self.double()

    def forward(self, positions: Tensor, forces: Tensor, energy: Tensor, edges: Tensor, structure: Tensor,
                counts: Mapping[str, int], energy_weight: float = 1.0,
                force_weight: float = 1.0) -> Output:  # fmt: skip
        """Squared errors, each divided by its own count of the whole step."""
        assert positions.dtype == torch.float64, "inputs must not be cast"
        positions = positions.detach().requires_grad_()
        distance = (positions[edges[0]] - positions[edges[1]]).norm(dim=-1, keepdim=True)
        of_atoms = torch.zeros_like(positions[:, 0]).index_add(0, edges[0], self.pair(distance).squeeze(-1) / 2)
        found = torch.zeros_like(energy).index_add(0, structure, of_atoms)
        (gradient,) = torch.autograd.grad(found.sum(), positions, create_graph=self.training)
        energy_errors, force_errors = found - energy, -gradient - forces
        parts = {
            "energy_loss": energy_weight * energy_errors.square().sum() / counts["structures"],
            "force_loss": force_weight * force_errors.square().sum() / counts["force_components"],
        }
        return Output(sum(parts.values()), parts, energy_errors, force_errors)


def model_config(*, width: PositiveInt = 8) -> dict:
    """The section `model_kwargs`."""
    return {"width": width}


def build_model(shape: dict, distributed: Distributed) -> PairPotential:
    """Without storage."""
    with torch.device("meta"):
        return PairPotential(shape["width"])


def sharded_parts(model: nn.Module) -> list[nn.Module]:
    """The whole: the derivative inside the forward pass needs all parameters at once."""
    return [model]


def materialize(model: nn.Module, shape: dict, seed: int, device: torch.device) -> None:
    """Storage, and first weights from the seed."""
    model.to_empty(device=device)
    tensors = named_tensors(model)
    fill(tensors, lambda name: random_normal(tensors[name].shape, 0.5, seed, name).double())


def facts(shape: dict, saved: dict | None = None) -> dict:
    """Raises ValueError for another width than that of a checkpoint."""
    if saved and saved != shape:
        raise ValueError(f"width was {saved['width']} and is {shape['width']}; give model_kwargs.width of that size")
    return shape


def harmless_keys(config: Mapping) -> tuple[str, ...]:
    """None of its own."""
    return ()


def training_flops(shape: dict, batch: Batch) -> float:
    """Three passes over each pair, and as many again for the derivative."""
    return 6.0 * 2 * (2 * shape["width"] + shape["width"] ** 2) * batch.inputs["edges"].shape[1]
