# SPDX-License-Identifier: Apache-2.0
"""An ASE calculator for a folder with `config.json` and `model.safetensors`: energy, forces, stress of a potential."""

import json
from pathlib import Path

import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from vesin import NeighborList

from atoms.potential import Potential, read_config


# By the kind of model, classes of its configuration and of itself; who brings a model adds it.
POTENTIALS: dict[str, tuple[type, type]] = {}
TYPES = {"F32": torch.float32, "F64": torch.float64}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name; the format is a length, a header in JSON and the numbers."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: torch.frombuffer(content, dtype=TYPES[entry["dtype"]], offset=start + entry["data_offsets"][0],
                               count=max(torch.Size(entry["shape"]).numel(), 0)).view(entry["shape"]).clone()
        for name, entry in header.items() if name != "__metadata__"
    }  # fmt: skip


def graph(
    atoms, elements: list[str], cutoff: float, pair_cutoffs: list[list[float]] | None
) -> dict[str, torch.Tensor]:
    """What the model takes, of ASE's atoms.

    Raises ValueError for an element that it does not know, and for positions or a cell that cannot be.
    """
    number_of = {element: i for i, element in enumerate(elements)}
    symbols = atoms.get_chemical_symbols()
    if unknown := sorted(set(symbols) - set(elements)):
        raise ValueError(f"There is {unknown[0]} among the atoms, and the potential knows {', '.join(elements)}.")
    types = np.array([number_of[symbol] for symbol in symbols], dtype=np.int64)
    positions, pbc = np.array(atoms.positions, dtype=np.float64), np.array(atoms.pbc, dtype=bool)
    cell = np.array(atoms.cell.array) if pbc.any() else np.zeros((3, 3))  # no volume, no stress
    if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        raise ValueError("A position or the cell is infinite or not a number.")
    if np.linalg.matrix_rank(cell[pbc]) < pbc.sum():
        raise ValueError("The atoms are periodic along a direction without a lattice vector of its own (pbc, cell).")
    finder = NeighborList(cutoff=cutoff, full_list=True)
    centre, neighbor, shift, distance = finder.compute(points=positions, box=cell, periodic=pbc, quantities="ijSd")
    centre, neighbor = centre.astype(np.int64), neighbor.astype(np.int64)
    if pair_cutoffs is not None:
        keep = distance <= np.array(pair_cutoffs)[types[centre], types[neighbor]]
        centre, neighbor, shift = centre[keep], neighbor[keep], shift[keep]
    order = np.lexsort((neighbor, centre))
    arrays = {
        "positions": positions, "types": types, "cell": cell[None],
        "edges": np.stack([centre[order], neighbor[order]]), "shifts": shift[order].astype(np.float64),
        "structure": np.zeros(len(types), dtype=np.int64),
    }  # fmt: skip
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def open_model(folder: str | Path | None, device: str) -> Potential:
    """The model of a folder, by default of that where this file is."""
    folder = Path(folder) if folder else Path(__file__).parent
    try:
        values = json.loads((folder / "config.json").read_text())
        weights, kind = read_safetensors(folder / "model.safetensors"), values["model_type"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: its config.json or model.safetensors is damaged ({error}).") from error
    if kind not in POTENTIALS:
        raise ValueError(f"{folder} has another kind of model, {kind}; its own calculator.py opens it.")
    config_class, model_class = POTENTIALS[kind]
    model = model_class(read_config(config_class, values))
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


class PotentialCalculator(Calculator):
    """Energies in eV, forces in eV/A, stress in eV/A^3; `folder` is by default where this file is.

    Stress is of atoms that are periodic along some direction and have three lattice vectors.
    """

    implemented_properties = ("energy", "free_energy", "energies", "forces", "stress")

    def __init__(self, folder: str | Path | None = None, device: str = "cpu", **kwargs):
        super().__init__(**kwargs)
        self.model, self.device = open_model(folder, device), torch.device(device)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        config = self.model.config
        inputs = graph(self.atoms, config.elements, config.cutoff, config.pair_cutoffs)
        found = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
        energy = float(found.energies)
        if not np.isfinite(energy):
            raise ValueError("The energy is not a number; look for atoms in the same place.")
        self.results = {
            "energy": energy, "free_energy": energy, "energies": found.atomic_energies.cpu().numpy(),
            "forces": found.forces.detach().cpu().numpy(),
        }  # fmt: skip
        if self.atoms.pbc.any() and self.atoms.cell.rank == 3:
            self.results["stress"] = full_3x3_to_voigt_6_stress(found.stress[0].detach().cpu().numpy())
        elif "stress" in properties:
            raise PropertyNotImplementedError("Atoms have a stress if they are periodic, with three lattice vectors.")


class CommitteeCalculator(Calculator):
    """Means of several models, and how much they differ: `results` has `energy_std` and `forces_std` [A], in eV and A.

    An atom's standard deviation is the root of its components' variances. The folders hold one kind of model.
    """

    implemented_properties = PotentialCalculator.implemented_properties

    def __init__(self, folders: list[str | Path], device: str = "cpu", **kwargs):
        super().__init__(**kwargs)
        if len(folders) < 2:
            raise ValueError("A committee has at least two models.")
        self.members = [PotentialCalculator(folder, device) for folder in folders]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        for member in self.members:
            member.calculate(self.atoms, properties, system_changes)
        found = {name: np.stack([member.results[name] for member in self.members]) for name in self.members[0].results}
        self.results = {name: values.mean(0) for name, values in found.items()}
        self.results |= {name: float(self.results[name]) for name in ("energy", "free_energy")}
        self.results["energy_std"] = float(found["energy"].std(ddof=1))
        self.results["forces_std"] = np.sqrt(found["forces"].var(0, ddof=1).sum(1))
