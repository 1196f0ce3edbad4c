# SPDX-License-Identifier: Apache-2.0
"""A conservative potential: energies of atoms, and forces and stress as their derivative by the edges' vectors.

Signs and units are ASE's: eV, eV/A, stress = dE/dstrain / V in eV/A^3. Vectors, sums and labels are float64.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atoms.elements import SYMBOLS
from atoms.tensor_product import TORCH, Products, sum_at_centre
from atoms.zbl import zbl_energy


@dataclass(kw_only=True)
class PotentialConfig:
    """What every potential has: all of it is in `run.json` and in the final model's `config.json`.

    `cutoff` in A; `pair_cutoffs` [centre][neighbour], at most that; `num_neighbors` their mean, of all atoms or each
    element; an atom's energy is scale times what the network says plus shift, in eV, by element.
    """

    elements: list[str]
    cutoff: float
    pair_cutoffs: list[list[float]] | None = None
    num_neighbors: float | list[float]
    energy_scales: list[float]
    energy_shifts: list[float]
    train_scales: bool = False
    train_shifts: bool = False
    zbl: str | None = None
    dtype: str = "float32"

    def to_dict(self) -> dict:
        """For JSON."""
        return {"model_type": type(self).model_type, **asdict(self)}

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float64": torch.float64}[self.dtype]


def read_config(config_class: type[PotentialConfig], values: dict) -> PotentialConfig:
    """What `config.json` says of the model."""
    known = {field.name for field in fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in known})


class Output(NamedTuple):
    """eV, eV/A, eV/A^3; `loss` and its `parts` where there are labels and counts."""

    loss: Tensor | None
    parts: dict[str, Tensor] | None
    energies: Tensor
    forces: Tensor
    stress: Tensor
    atomic_energies: Tensor


def volume(cell: Tensor) -> Tensor:
    """Of cells [S, 3, 3] in A^3: [S]."""
    return torch.linalg.cross(cell[:, 0], cell[:, 1]).mul(cell[:, 2]).sum(1).abs()


class Graph(NamedTuple):
    """What layers see of a batch: unit vectors [E, 3] in float64, sorted edges, and how to go over them.

    `x` are distances over the cutoff, in float64: one for each edge, or `row` [E] says which is an edge's.
    """

    directions: Tensor
    x: Tensor
    row: Tensor | None
    types: Tensor
    edges: Tensor
    products: Products


class Potential(nn.Module):
    """What NequIP and Allegro share; a subclass has `network(graph)`, a number for each atom [A]."""

    def __init__(self, config: PotentialConfig):
        super().__init__()
        self.config, self.losses = config, None
        self.kernels, self.compiled = TORCH, None  # how, not what: kernels and a compiled `derive`
        number = len(config.elements)
        for name in ("scales", "shifts"):
            trained = getattr(config, f"train_{name}")
            # What training adds to the configuration's number, so that all parameters have one type.
            added = nn.Parameter(torch.zeros(number, dtype=config.torch_dtype)) if trained else None
            self.register_parameter(f"added_{name}", added)

    def network(self, graph: Graph) -> Tensor:
        raise NotImplementedError

    def constant(self, values: list, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers of the configuration beside a tensor."""
        return torch.tensor(values, dtype=dtype, device=like.device)

    def neighbor_norm(self, types: Tensor) -> Tensor | float:
        """1 / sqrt(mean number of neighbours), of all or of each atom [A, 1, 1]."""
        number = self.config.num_neighbors
        if not isinstance(number, list):
            return 1 / sqrt(number)
        return self.constant([1 / sqrt(n) for n in number], types, self.config.torch_dtype)[types].view(-1, 1, 1)

    def atomic_energies(self, vectors: Tensor, edges: Tensor, types: Tensor, once: Tensor | None = None,
                        row: Tensor | None = None) -> Tensor:  # fmt: skip
        """Energy of each atom, by the vectors from centres to neighbours [E, 3]; `once` and `row` as in `forward`."""
        config = self.config
        distance = vectors.square().sum(1).sqrt()
        centre, neighbor = types[edges[0]], types[edges[1]]
        if config.pair_cutoffs is None:
            x = distance * (1 / config.cutoff)
        else:
            reciprocal = self.constant(config.pair_cutoffs, vectors).reciprocal()
            x = distance * reciprocal[centre, neighbor]
        lengths = x if once is None else x.index_select(0, once)
        graph = Graph(vectors / distance.unsqueeze(1), lengths, row, types, edges, self.kernels)
        scales, shifts = self.constant(config.energy_scales, vectors), self.constant(config.energy_shifts, vectors)
        if self.added_scales is not None:
            scales = scales + self.added_scales.double()
        if self.added_shifts is not None:
            shifts = shifts + self.added_shifts.double()
        energies = self.network(graph).double() * scales[types] + shifts[types]
        if config.zbl:
            z = self.constant([float(SYMBOLS.index(element)) for element in config.elements], vectors)
            pair = zbl_energy(distance, x, z[centre], z[neighbor], config.zbl)
            energies = energies + sum_at_centre(pair, edges[0], types.shape[0])
        return energies

    def forward(
        self,
        positions: Tensor,
        types: Tensor,
        cell: Tensor,
        edges: Tensor,
        shifts: Tensor,
        structure: Tensor,
        once: Tensor | None = None,
        row: Tensor | None = None,
        energy: Tensor | None = None,
        forces: Tensor | None = None,
        stress: Tensor | None = None,
        counts: Mapping[str, int] | None = None,
        **weights: float,
    ) -> Output:
        """Of structures laid end to end.

        `positions` [A, 3] and `cell` [S, 3, 3] in float64, `types` [A] as indices into the elements, `edges` [2, E]
        with centres in order first, `shifts` [E, 3] whole cells that the neighbour is away, `structure` [A]. Where an
        edge and its reverse are to share what depends on distance alone, `once` are edges whose lengths differ and
        `row` [E] says which of them is as long. Labels are NaN where there are none. `counts` are the labels of the
        whole step; `weights` as `losses` takes them.
        """
        derive = self.compiled if self.compiled and self.training else self.derive
        energies, on_atoms, found_stress, atomic = derive(positions, types, cell, edges, shifts, structure, once, row)
        loss = parts = None
        if counts is not None and self.losses is not None:
            found = {"energy": energies, "forces": on_atoms, "stress": found_stress}
            labels = {"energy": energy, "forces": forces, "stress": stress}
            sizes = torch.bincount(structure, minlength=cell.shape[0])
            parts = self.losses(found, labels, types, sizes, counts, weights)
            loss = sum(parts.values())
        return Output(loss, parts, energies, on_atoms, found_stress, atomic)

    def derive(
        self,
        positions: Tensor,
        types: Tensor,
        cell: Tensor,
        edges: Tensor,
        shifts: Tensor,
        structure: Tensor,
        once: Tensor | None,
        row: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Energies of structures, forces, stress, and energies of atoms."""
        num_structures = cell.shape[0]
        of_edge = structure[edges[0]]
        vectors = positions[edges[1]] - positions[edges[0]] + torch.bmm(shifts.unsqueeze(1), cell[of_edge]).squeeze(1)
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_()
            atomic = self.atomic_energies(vectors, edges, types, once, row)
            (gradient,) = torch.autograd.grad(atomic.sum(), vectors, create_graph=self.training)
        if not self.training:
            atomic = atomic.detach()
        energies = sum_at_centre(atomic, structure, num_structures)
        num_atoms = types.shape[0]
        on_atoms = sum_at_centre(gradient, edges[0], num_atoms) - sum_at_centre(gradient, edges[1], num_atoms)
        virial = sum_at_centre(vectors.detach().unsqueeze(2) * gradient.unsqueeze(1), of_edge, num_structures)
        size = volume(cell).view(-1, 1, 1)
        virial = 0.5 * (virial + virial.transpose(1, 2))
        found_stress = torch.where(size > 0, virial / torch.where(size > 0, size, 1.0), 0.0)
        return energies, on_atoms, found_stress, atomic
