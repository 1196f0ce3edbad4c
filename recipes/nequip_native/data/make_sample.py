# SPDX-License-Identifier: Apache-2.0
"""Write `train.extxyz` and `validation.extxyz`: alloys of Al, Ni and Cu, labelled by ASE's effective-medium theory.

python data/make_sample.py
"""

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.cluster import Octahedron


SEED = 42
PARTS = {"train": 320, "validation": 64}
ELEMENTS = ("Al", "Ni", "Cu")
# Lattice constants of fcc Al, Ni and Cu under EMT, A; an alloy's is their mean.
LATTICE = {"Al": 3.99, "Ni": 3.49, "Cu": 3.59}
KINDS = {"bulk": 0.7, "surface": 0.2, "cluster": 0.1}  # the share of each
STRAIN = 0.03  # standard deviation of the strain's components in a crystal
RATTLES = (0.02, 0.14)  # A: of how far atoms are moved, from a cold to a hot structure
DIGITS = 5  # of positions and cells in the files, A


def shape(random: np.random.Generator, kind: str, a: float) -> Atoms:
    """A crystal of 16 or 32 atoms, one of these with a vacancy, a slab, or a cluster."""
    if kind == "bulk":
        atoms = bulk("Cu", a=a, cubic=True) * ((2, 2, 1), (2, 2, 2), (2, 2, 2))[random.integers(3)]
        if random.random() < 0.3:
            del atoms[int(random.integers(len(atoms)))]
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + random.normal(0, STRAIN, (3, 3))), scale_atoms=True)
    elif kind == "surface":
        atoms = fcc111("Cu", (2, 2, int(random.integers(3, 6))), a=a, vacuum=6.0, periodic=False)
        atoms.pbc = (True, True, False)
    else:
        atoms = Octahedron("Cu", int(random.integers(3, 5)), cutoff=1, latticeconstant=a)
        atoms = Atoms(atoms.symbols, atoms.positions)
    return atoms


def draw(random: np.random.Generator) -> Atoms:
    """A structure with energy, forces and, where it is a crystal, stress."""
    kind = random.choice(list(KINDS), p=list(KINDS.values()))
    shares = random.dirichlet(np.ones(len(ELEMENTS)))
    atoms = shape(random, kind, float(np.dot(shares, list(LATTICE.values()))))
    atoms.symbols[:] = random.choice(ELEMENTS, len(atoms), p=shares)
    atoms.positions += random.normal(0, random.uniform(*RATTLES), atoms.positions.shape)
    atoms.positions = atoms.positions.round(DIGITS)
    atoms.cell[:] = atoms.cell.array.round(DIGITS)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if kind == "bulk":
        results["stress"] = atoms.get_stress()
    atoms = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["config_type"] = str(kind)
    return atoms


def make_sample(seed: int) -> dict[str, list[Atoms]]:
    """All structures of both parts."""
    random = np.random.default_rng(seed)
    return {part: [draw(random) for _ in range(number)] for part, number in PARTS.items()}


def describe(frames: list[Atoms]) -> str:
    """One line of statistics."""
    forces = np.concatenate([atoms.calc.results["forces"] for atoms in frames])
    sizes = [len(atoms) for atoms in frames]
    stress = [atoms.calc.results["stress"] for atoms in frames if "stress" in atoms.calc.results]
    return (
        f"{len(frames)} structures, {sum(sizes)} atoms ({min(sizes)} to {max(sizes)} each), RMS force "
        f"{np.sqrt((forces**2).mean()):.3f} eV/A, {len(stress)} with stress, RMS "
        f"{np.sqrt(np.square(stress).mean()):.4f} eV/A^3"
    )


def main() -> None:
    """Write both files and print their statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    for part, frames in make_sample(args.seed).items():
        ase.io.write(args.out / f"{part}.extxyz", frames, format="extxyz")
        print(f"{part}: {describe(frames)}")


if __name__ == "__main__":
    main()
