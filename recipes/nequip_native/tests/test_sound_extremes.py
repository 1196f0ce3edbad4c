# SPDX-License-Identifier: Apache-2.0
"""Sound frames unlike most of a set are not refused: dimers, walls, slabs, symmetric crystals, relaxed minima."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from looked_at import changed, dynamics, look, names, relabel
from structure_files import labelled, with_labels

from atoms.checks import check
from atoms.findings import findings
from atoms.neighbours import Cutoffs
from atoms.pair_fit import independent
from atoms.structures import row, structures_of, table_of


def dimers(symbols, distances):
    """One for each distance in A."""
    pairs = [Atoms(symbols, positions=[[0, 0, 0], [distance, 0, 0]]) for distance in distances]
    return [with_labels(pair, stress=False) for pair in pairs]


def total(frames):
    """With an energy for each atom, since EMT's is about zero in a bulk metal."""
    return [relabel(a, energy=a.calc.results["energy"] - 3.5 * len(a)) for a in frames]


def bad(frames, tmp_path, distributed, cutoff=5.0):
    return [finding.name for finding in findings(look(frames, tmp_path, distributed, cutoff)) if finding.bad]


def slabs(random):
    """With more and less vacuum, which divides the same stress by another volume."""
    found = []
    for vacuum in random.uniform(4, 12, 30):
        slab = fcc111("Cu", (2, 2, 3), vacuum=vacuum)
        slab.info, slab.pbc = {}, True
        slab.set_cell(slab.cell.array * [[1.03], [1.03], [1]], scale_atoms=True)
        slab.positions += random.normal(0, 0.002, slab.positions.shape)
        found.append(with_labels(slab))
    return found


def small_molecules(stretch=(0.85, 0.95, 1.0, 1.1, 1.3)):
    found = []
    for name in ("CO", "N2", "H2", "O2", "NO", "CO2", "H2O", "NH3", "CH4", "C2H2", "C2H4", "C2H6", "CH3OH"):
        for factor in stretch:
            atoms = molecule(name)
            atoms.positions *= factor
            found.append(with_labels(atoms, stress=False))
    return found


def relaxed(random):
    """Crystals whose forces are tiny, as after a relaxation, without a symmetry."""
    found = []
    for _ in range(10):
        crystal = bulk("Cu", cubic=True) * (2, 2, 2)
        crystal.positions += random.normal(0, 5e-4, crystal.positions.shape)
        found.append(with_labels(crystal))
    return found


SETS = {
    "dimers": lambda r: [*labelled(40), *dimers("Cu2", [2.2, 3.5]), *dimers("AlNi", [1.8])],
    "dissociation": lambda r: dimers("Cu2", np.linspace(2.3, 4.9, 60)),
    "far": lambda r: [*labelled(20), *dimers("Cu2", [4, 6, 8]), *(with_labels(Atoms(x), False) for x in ("Cu", "Al"))],
    "walls": lambda r: [*dynamics(), *dimers("Cu2", [0.6, 0.8, 1.0, 1.2, 1.4])],
    "molecules": lambda r: small_molecules(),
    "slabs": slabs,
    "relaxed": lambda r: [*dynamics(), *relaxed(r)],
    "half_relaxed": lambda r: [*dynamics(12), *relaxed(r)],
}


@pytest.mark.parametrize("name", SETS)
def test_sound_frames_are_not_refused(name, tmp_path, distributed):
    assert not bad(total(SETS[name](np.random.default_rng(0))), tmp_path, distributed)


def test_formation_energies_beside_dimers(tmp_path, distributed):
    frames = [*labelled(40), *dimers("Cu2", np.linspace(1.8, 4, 5)), *dimers("AlNi", np.linspace(1.8, 4, 5))]
    assert not bad(frames, tmp_path, distributed)


def test_walls_do_not_hide_a_unit(tmp_path, distributed):
    frames = [*dynamics(), *dimers("Cu2", [0.6, 0.8])]
    frames = changed(total(frames), [3], energy=1 / 27.2114, forces=1 / 51.42)
    found = names(look(frames, tmp_path, distributed))
    assert found["other_strength"].rows.tolist() == [3]


def test_few_turned_atoms_are_odd(tmp_path, distributed):
    frames = [with_labels(a, stress=False) for a in small_molecules((1.0,))[6:] for _ in range(6)]
    random = np.random.default_rng(0)
    for i, atoms in enumerate(frames):
        atoms.positions += random.normal(0, 0.05, atoms.positions.shape)
        frames[i] = with_labels(atoms, stress=False)
    found = names(look(changed(total(frames), [13], forces=-1), tmp_path, distributed))  # of methane
    assert not found["mixed_up_forces"].bad and found["mixed_up_forces"].rows.tolist() == [13]


def test_stress_is_not_asked_with_vacuum(distributed, tmp_path):
    found = look([*dynamics(4), *slabs(np.random.default_rng(0))[:4]], tmp_path, distributed)
    assert np.isfinite(found.column("shear_agreement")).tolist() == [True] * 4 + [False] * 4
    slab = structures_of(found.rows.with_format("arrow")[4:5])
    height, thickness = slab.cell[0, 2, 2], np.ptp(slab.positions[:, 2])
    assert check(slab, Cutoffs(4.0)).gap[0] == pytest.approx(height - thickness)


def test_forces_that_say_something_of_their_own():
    forces = {
        "dimer": [[1, 0, 0], [-1, 0, 0]], "symmetric": [[1, 0, 0], [0, 1, 0], [-1, -1e-3, 0], [0, -1, 0]],
        "three": [[1, 0, 0], [-0.5, 0, 0], [-0.25, 0, 0]], "none": None, "zero": [[0, 0, 0]],
    }  # fmt: skip
    rows = [row(np.ones(len(f or [0])), np.zeros((len(f or [0]), 3)), forces=f) for f in forces.values()]
    assert independent(structures_of(table_of(rows))).tolist() == [1, 1, 3, 1, 1]
