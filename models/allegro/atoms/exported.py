# SPDX-License-Identifier: Apache-2.0
"""A potential as one program, `.pt2`, that torch opens without our code: energy, forces, stress of one structure."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from atoms.potential import Potential


INPUTS = ("positions", "types", "cell", "edges", "shifts")


class OneStructure(nn.Module):
    """positions [A, 3], cell [3, 3] and shifts [E, 3] in float64, types [A], edges [2, E] sorted by centre."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, positions: Tensor, types: Tensor, cell: Tensor, edges: Tensor, shifts: Tensor):
        return self.program(positions, types, cell, edges, shifts)


def example(number: int, num_types: int) -> tuple[Tensor, ...]:
    """A few atoms in a row, each with its neighbours on both sides."""
    positions = torch.zeros(number, 3, dtype=torch.float64)
    positions[:, 0] = torch.arange(number) * 1.7
    positions[:, 1] = torch.arange(number) % 3 * 0.4
    centre = torch.cat([torch.arange(number - 1), torch.arange(1, number)])
    neighbor = torch.cat([torch.arange(1, number), torch.arange(number - 1)])
    order = torch.argsort(centre, stable=True)
    edges = torch.stack([centre[order], neighbor[order]])
    shifts = torch.zeros(edges.shape[1], 3, dtype=torch.float64)
    return positions, torch.arange(number) % num_types, 50 * torch.eye(3, dtype=torch.float64), edges, shifts


def write_program(model: Potential, path: Path) -> None:
    """Write `path`; what it returns is energy [], forces [A, 3], stress [3, 3] and the energy of each atom [A]."""
    model = model.eval().requires_grad_(False)

    def one(positions, types, cell, edges, shifts):
        structure = torch.zeros_like(types)
        found = model(positions, types, cell.unsqueeze(0), edges, shifts, structure)
        return found.energies[0], found.forces.detach(), found.stress[0].detach(), found.atomic_energies

    arguments = example(7, len(model.config.elements))
    one(*arguments)  # tables are made outside of the trace
    traced = make_fx(one, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    atoms, edges = Dim("atoms", min=2), Dim("edges", min=2)
    shapes = ({0: atoms}, {0: atoms}, None, {1: edges}, {0: edges})
    program = torch.export.export(
        OneStructure(traced), arguments, dynamic_shapes=dict(zip(INPUTS, shapes, strict=True))
    )
    torch.export.save(program, path)
