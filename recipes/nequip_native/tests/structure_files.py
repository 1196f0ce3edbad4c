# SPDX-License-Identifier: Apache-2.0
"""Structures with labels by ASE's EMT, and files of them in all layouts."""

import io
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator


def labelled(number: int, seed: int = 0, repeat: tuple = (2, 2, 1), stress: bool = True) -> list[Atoms]:
    """Rattled alloys of Al, Ni and Cu, of several sizes."""
    random, found = np.random.default_rng(seed), []
    for i in range(number):
        atoms = bulk("Cu", a=3.8, cubic=True) * (*repeat[:2], repeat[2] + i % 2)
        atoms.numbers = random.choice([13, 28, 29], len(atoms))
        atoms.set_cell(atoms.cell.array * (1 + random.normal(0, 0.01, (3, 3))), scale_atoms=True)
        atoms.positions += random.normal(0, 0.1, atoms.positions.shape)
        found.append(with_labels(atoms, stress))
    return found


def with_labels(atoms: Atoms, stress: bool = True) -> Atoms:
    """The same with EMT's labels."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    results |= {"stress": atoms.get_stress()} if stress else {}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def write(frames: list[Atoms], path: Path) -> str:
    """A file of the kind that its name says, its path."""
    if path.suffix in (".db", ".aselmdb"):
        with ase.db.connect(path) as database:
            for atoms in frames:
                database.write(atoms)
    else:
        ase.io.write(path, frames)
    return str(path)


def arrays(frames: list[Atoms]) -> dict[str, np.ndarray]:
    """Of frames of the same atoms."""
    return {
        "numbers": frames[0].numbers, "positions": np.stack([a.positions for a in frames]),
        "energy": np.array([a.calc.results["energy"] for a in frames]),
        "forces": np.stack([a.calc.results["forces"] for a in frames]),
        "cell": np.stack([a.cell.array for a in frames]),
    }  # fmt: skip


def text(frames: list[Atoms]) -> str:
    """As extxyz."""
    file = io.StringIO()
    ase.io.write(file, frames, format="extxyz")
    return file.getvalue()


def model_in(folder: Path, seed: int, elements=("Al", "Ni", "Cu")) -> str:
    """A final model with first weights, its folder."""
    from atoms.calculator_file import write_potential
    from atoms.first_weights import init_parameters
    from build_model import KINDS

    config_class, model_class = KINDS["nequip"]
    config = config_class(
        elements=list(elements), cutoff=3.5, num_neighbors=20.0, energy_scales=[0.1] * len(elements),
        energy_shifts=[-1.0] * len(elements), num_layers=1, num_features=[6, 4], num_element_features=3,
        radial_width=8, dtype="float64",
    )  # fmt: skip
    model = model_class(config)
    init_parameters(model, seed)
    write_potential(folder, config, model_class, model.state_dict())
    return str(folder)
