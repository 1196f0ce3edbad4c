# SPDX-License-Identifier: Apache-2.0
"""A potential as one program, `.pt2`, that opens without our code: energy, forces, stress of one structure.

`write_program` makes one that torch opens anywhere, `write_package` a compiled one as `nequip-compile` makes it.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from atoms.potential import Potential, volume


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


def program_of(function, arguments: tuple[Tensor, ...], shapes, wrapper: type[nn.Module]) -> ExportedProgram:
    """`function` of tensors, with the sizes that `shapes` leaves open."""
    function(*arguments)  # tables are made outside of the trace
    graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    return torch.export.export(wrapper(graph), arguments, dynamic_shapes=shapes)


def write_program(model: Potential, path: Path) -> None:
    """Write `path`; what it returns is energy [], forces [A, 3], stress [3, 3] and the energy of each atom [A]."""
    model = model.eval().requires_grad_(False)

    def one(positions, types, cell, edges, shifts):
        structure = torch.zeros_like(types)
        found = model(positions, types, cell.unsqueeze(0), edges, shifts, structure)
        return found.energies[0], found.forces.detach(), found.stress[0].detach(), found.atomic_energies

    atoms, edges = Dim("atoms", min=2), Dim("edges", min=2)
    shapes = ({0: atoms}, {0: atoms}, None, {1: edges}, {0: edges})
    arguments = example(7, len(model.config.elements))
    program = program_of(one, arguments, dict(zip(INPUTS, shapes, strict=True)), OneStructure)
    torch.export.save(program, path)


# ---- as `nequip-compile --mode aotinductor` of nequip 0.19 compiles its models


class InOrder(nn.Module):
    """Any number of tensors."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, *tensors: Tensor):
        return self.program(*tensors)


TAKEN = ("pos", "edge_index", "atom_types", "cell", "edge_cell_shift")  # a pair_allegro has images instead of the cell
RETURNED = {
    "lammps": ("atomic_energy", "forces", "virial"), "ase": ("atomic_energy", "total_energy", "forces", "stress"),
}  # fmt: skip


def write_package(model: Potential, path: Path, use: str, device: str = "cpu") -> None:
    """Compile `path`, *.nequip.pt2, for this kind of machine and release of torch, and for `use`, lammps or ase.

    It takes and returns what nequip's own packages do, in float64: atomic_energy [A, 1], total_energy [1, 1],
    forces [A, 3], stress and virial [1, 3, 3], the virial being -dE/d(strain).
    """
    model = model.to(device).eval().requires_grad_(False)
    config, returned = model.config, RETURNED[use]
    taken = TAKEN[:3] if use == "lammps" and config.model_type == "allegro" else TAKEN

    def periodic(positions, edges, types, cell, shifts):
        structure = torch.zeros_like(types)
        unit = torch.eye(3, dtype=torch.float64, device=types.device).unsqueeze(0)  # its volume is 1
        away = positions.new_zeros(edges.shape[1], 3) if cell is None else shifts @ cell[0]
        found = model(positions, types, unit, edges, away, structure)
        every = {
            "atomic_energy": found.atomic_energies.unsqueeze(1), "total_energy": found.energies.unsqueeze(1),
            "forces": found.forces, "virial": -found.stress,
        }  # fmt: skip
        if "stress" in returned:
            every["stress"] = found.stress / volume(cell).view(-1, 1, 1)
        return [every[name].detach() for name in returned]

    def with_images(positions, edges, types):
        return periodic(positions, edges, types, None, None)

    positions, types, cell, edges, shifts = (x.to(device) for x in example(7, len(config.elements)))
    arguments = (positions, edges, types, cell.unsqueeze(0), shifts)[: len(taken)]
    num_atoms, num_edges = Dim("atoms", min=2), Dim("edges", min=2)
    shapes = ({0: num_atoms}, {1: num_edges}, {0: num_atoms}, None, {0: num_edges})[: len(taken)]
    program = program_of(periodic if taken == TAKEN else with_images, arguments, (shapes,), InOrder)
    metadata = {
        "r_max": str(config.cutoff), "type_names": " ".join(config.elements), "num_types": str(len(config.elements)),
        "model_dtype": config.dtype, "allow_tf32": "0", "nequip_aoti_inputs": " ".join(taken),
        "nequip_aoti_outputs": " ".join(returned),
    }  # fmt: skip
    if config.pair_cutoffs is not None:
        metadata["per_edge_type_cutoff"] = " ".join(str(x) for row in config.pair_cutoffs for x in row)
    configs = {"aot_inductor.metadata": metadata}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch's own
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
