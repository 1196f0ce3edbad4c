# SPDX-License-Identifier: Apache-2.0
"""The terms of a potential's loss, each over its own labels in the whole step; one that is NaN is no label."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor


Kind = Literal["mse", "mae", "huber"]
ForcesKind = Literal["mse", "mae", "huber", "stratified_huber"]
COUNTS = {"energy": "energies", "forces": "force_components", "stress": "stress_components"}


def huber(error: Tensor, delta: float | Tensor) -> Tensor:
    """Half the square up to `delta`, which may be infinite, and straight on from there."""
    size = error.abs()
    near = size.clamp(max=delta)
    return near * (size - 0.5 * near)


@dataclass(frozen=True)
class Losses:
    """What `loss_terms` was given; weights are relative."""

    weights: dict[str, float]
    kinds: dict[str, str]
    deltas: dict[str, float]
    per_atom_energy: bool
    strata: dict[float, float]
    element_weights: Tensor | None

    def term(self, name: str, error: Tensor, label: Tensor) -> Tensor:
        """Of each component."""
        kind = self.kinds[name]
        if kind == "mse":
            return error.square()
        if kind == "mae":
            return error.abs()
        if kind == "huber":
            return huber(error, self.deltas[name])
        norm = label.norm(dim=-1, keepdim=True)
        delta = torch.full_like(norm, math.inf)
        for bound, value in sorted(self.strata.items()):
            delta = torch.where(norm >= bound, value, delta)
        return huber(error, delta)

    def __call__(self, found: dict[str, Tensor], labels: Mapping[str, Tensor | None], types: Tensor, sizes: Tensor,
                 counts: Mapping[str, int], weights: Mapping[str, Tensor | float]) -> dict[str, Tensor]:  # fmt: skip
        """Each term, weighted, by `energy_loss`, `forces_loss`, `stress_loss`; `sizes` are atoms of structures.

        `weights` (`energy_weight`, ...) take the place of those of the configuration; all are normalised to sum 1.
        """
        current = {name: weights.get(f"{name}_weight", weight) for name, weight in self.weights.items()}
        total, parts = sum(current.values()) or 1.0, {}
        for name, weight in current.items():
            label = labels[name]
            if label is None:
                continue
            known = torch.isfinite(label)
            label = torch.where(known, label, 0.0)
            error = torch.where(known, found[name] - label, 0.0)
            if name == "energy" and self.per_atom_energy:
                error = error / sizes
            term = self.term(name, error, label)
            if name == "forces" and self.element_weights is not None:
                term = term * self.element_weights.to(types.device)[types].unsqueeze(1)
            parts[f"{name}_loss"] = weight / total * term.sum() / max(counts[COUNTS[name]], 1)
        return parts


def loss_terms(
    elements: list[str],
    *,
    energy_weight: NonNegativeFloat = 1.0,
    forces_weight: NonNegativeFloat = 1.0,
    stress_weight: NonNegativeFloat = 0.0,
    energy_loss: Kind = "mse",
    forces_loss: ForcesKind = "mse",
    stress_loss: Kind = "mse",
    energy_delta: PositiveFloat = 0.01,
    forces_delta: PositiveFloat = 0.01,
    stress_delta: PositiveFloat = 0.01,
    per_atom_energy: bool = True,
    forces_strata: dict[NonNegativeFloat, PositiveFloat] | None = None,
    element_forces_weights: dict[str, NonNegativeFloat] | None = None,
) -> Losses:
    """The section `loss_kwargs`. Deltas are in eV (per atom), eV/A and eV/A^3.

    `forces_strata` gives the delta by the least norm of the reference force from which it holds; below the first bound
    the loss is half the square. Raises ValueError for weights that are all 0, and elements that the model has not.
    """
    weights = {"energy": energy_weight, "forces": forces_weight, "stress": stress_weight}
    if not sum(weights.values()):
        raise ValueError("loss_kwargs: energy_weight, forces_weight and stress_weight are all 0; one must be above.")
    if (forces_loss == "stratified_huber") != bool(forces_strata):
        raise ValueError(
            f"loss_kwargs.forces_loss={forces_loss} and forces_strata={forces_strata}: stratified_huber needs strata, "
            "as {0.0: 0.01, 10.0: 0.1}, and nothing else takes them."
        )
    strata = {float(bound): float(delta) for bound, delta in (forces_strata or {}).items()}
    of_elements = None
    if element_forces_weights:
        if unknown := [element for element in element_forces_weights if element not in elements]:
            raise ValueError(
                f"loss_kwargs.element_forces_weights.{unknown[0]}: the model's elements are {', '.join(elements)}."
            )
        of_elements = torch.tensor([float(element_forces_weights.get(e, 1.0)) for e in elements], dtype=torch.float64)
    return Losses(
        weights, {"energy": energy_loss, "forces": forces_loss, "stress": stress_loss},
        {"energy": energy_delta, "forces": forces_delta, "stress": stress_delta}, per_atom_energy, strata, of_elements,
    )  # fmt: skip
