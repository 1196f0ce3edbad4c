# SPDX-License-Identifier: Apache-2.0
"""The weights that training begins with."""

from math import sqrt

import torch
from torch import Tensor, nn

from atoms.radial import ScalarMLP
from common.random_numbers import seed_from
from common.weights import fill


def init_parameters(model: nn.Module, seed: int) -> None:
    """First weights by name and seed alone, also where each rank has a part only: of variance 1, as published."""
    tensors, bounds = dict(model.named_parameters()), {}
    for name, module in model.named_modules():
        if isinstance(module, ScalarMLP):
            bounds |= {f"{name}.weights.{i}": sqrt(3) for i in range(len(module.weights))}
        elif hasattr(module, "bound"):
            bounds[f"{name}.weight"] = module.bound

    def first_value(name: str) -> Tensor:
        value = torch.zeros(tensors[name].shape, dtype=torch.float64, device="cpu")
        if name.rpartition(".")[2] in ("added_scales", "added_shifts", "moved"):
            return value
        generator = torch.Generator("cpu").manual_seed(seed_from(seed, name))
        if (bound := bounds.get(name)) is not None:
            return value.uniform_(-bound, bound, generator=generator)
        return value.normal_(generator=generator)

    fill(tensors, first_value)
