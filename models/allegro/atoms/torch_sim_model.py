# SPDX-License-Identifier: Apache-2.0
"""A potential as a model of torch-sim, which runs many structures at once. Needs torch-sim-atomistic (Python 3.12).

import torch_sim
from torch_sim_model import TorchSimModel

torch_sim.optimize(system=[atoms, more_atoms], model=TorchSimModel(), optimizer=torch_sim.Optimizer.fire)
"""

from pathlib import Path

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch_sim.models.interface import ModelInterface
from torch_sim.neighbors import torchsim_nl

from atoms.ase_calculator import open_model


class TorchSimModel(ModelInterface):
    """Energies in eV, forces in eV/A, stress in eV/A^3; `folder` is by default where this file is.

    Positions and cells are float64. Stress is 0 where no direction is periodic, or a lattice vector is missing.
    """

    def __init__(self, folder: str | Path | None = None, device: str = "cpu"):
        super().__init__()
        self._device, self._dtype = torch.device(device), torch.float64
        self._compute_forces = self._compute_stress = True
        self.model = open_model(folder, device)
        elements = self.model.config.elements
        self.types = torch.full((119,), -1, device=device)
        self.types[[atomic_numbers[element] for element in elements]] = torch.arange(len(elements), device=device)

    def forward(self, state, **kwargs) -> dict[str, torch.Tensor]:
        """Of a `SimState`. Raises ValueError for an element that the potential does not know."""
        cutoff, known, types = self.model.config.cutoff, self.model.config.elements, self.types[state.atomic_numbers]
        if (types < 0).any():
            unknown = chemical_symbols[state.atomic_numbers[types < 0][0]]
            raise ValueError(f"There is {unknown} among the atoms, and the potential knows {', '.join(known)}.")
        positions, cell = state.positions.double(), state.row_vector_cell.double().contiguous()
        edges, _, shifts = torchsim_nl(positions, cell, state.pbc, cutoff, state.system_idx)
        # Beyond a pair's own, shorter cutoff an edge counts as nothing.
        found = self.model(positions, types, cell, edges.long(), shifts.double(), state.system_idx)
        stress = found.stress * state.pbc.any()
        every = {"energy": found.energies, "forces": found.forces, "stress": stress}
        return {name: value.detach().to(state.positions.dtype) for name, value in every.items()}
