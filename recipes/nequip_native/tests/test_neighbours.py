# SPDX-License-Identifier: Apache-2.0
"""Neighbour lists are those of ASE and matscipy in all kinds of cells, and do not depend on how a structure lies."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import primitive_neighbor_list

from atoms.neighbours import TIE, Cutoffs, all_neighbours, lengths_once
from atoms.structures import row, structures_of, table_of


def random_atoms(cell, num_atoms, pbc, seed, symbols="LiSP"):
    random = np.random.default_rng(seed)
    numbers = random.choice([3, 15, 16], num_atoms)
    # Some atoms lie outside of the cell, as MD without wrapping leaves them.
    return Atoms(numbers=numbers, scaled_positions=random.random((num_atoms, 3)), cell=cell, pbc=pbc), random


CELLS = {
    "cube": (np.eye(3) * 6, 8), "one atom": (np.eye(3) * 2.5, 1),
    "skewed": ([[4, 0, 0], [3.5, 3, 0], [-3, 2.5, 3.5]], 5),
    "thin": ([[1.9, 0, 0], [0, 12, 0], [0, 0, 7]], 4), "flat": ([[9, 0, 0], [0, 9, 0], [0.3, 0.2, 1.7]], 6),
    "needle": ([[30, 0, 0], [29, 3, 0], [0, 0, 3]], 7), "left-handed": ([[0, 5, 0], [5, 0, 0], [0, 0, 5]], 6),
    "turned": ([[2, 3, 4], [-4, 1, 2], [1, -5, 3]], 6),
}  # fmt: skip
PERIODIC = [(True, True, True), (True, True, False), (False, True, False), (True, False, True), (False, False, False)]


def neighbours(numbers, positions, cell, pbc, cutoffs, max_neighbors=None):
    structures = structures_of(table_of([row(numbers, positions, cell, pbc)]))
    return all_neighbours(structures, cutoffs, max_neighbors)[:2]


def as_set(edges, shifts):
    return sorted(map(tuple, np.column_stack([edges.T, shifts]).astype(int).tolist()))


@pytest.mark.parametrize("pbc", PERIODIC, ids=lambda pbc: "".join("TF"[not p] for p in pbc))
@pytest.mark.parametrize("name", CELLS)
def test_as_ase_and_matscipy_find_them(name, pbc):
    matscipy = pytest.importorskip("matscipy.neighbours")
    cell, num_atoms = CELLS[name]
    for seed in range(3):
        atoms, random = random_atoms(np.array(cell, dtype=float), num_atoms, pbc, seed)
        atoms.positions += random.integers(-2, 3, (num_atoms, 3)) @ atoms.cell.array * np.array(seed > 0)
        edges, shifts = neighbours(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, Cutoffs(4.5))
        vectors = atoms.positions[edges[1]] - atoms.positions[edges[0]] + shifts @ atoms.cell.array
        for i, j, found in (
            primitive_neighbor_list("ijS", atoms.pbc, atoms.cell.array, atoms.positions, 4.5),
            matscipy.neighbour_list("ijS", atoms, 4.5),
        ):
            assert as_set(edges, shifts) == as_set(np.stack([i, j]), found)
        distances = np.linalg.norm(vectors, axis=1)
        assert len(distances) == 0 or (distances.min() > 0 and distances.max() <= 4.5)
        order = list(map(tuple, np.column_stack([edges.T, shifts]).astype(int).tolist()))
        assert order == sorted(order)


def test_a_molecule_without_a_cell():
    atoms = molecule("C6H6")
    edges, shifts = neighbours(atoms.numbers, atoms.positions, np.zeros((3, 3)), atoms.pbc, Cutoffs(1.5))
    assert edges.shape == (2, 2 * 12)  # six bonds C-C and six C-H
    assert not shifts.any()


def test_a_surface_without_a_vector_across():
    atoms = bulk("Cu", cubic=True)
    cell = atoms.cell.array.copy()
    cell[2] = 0
    edges, shifts = neighbours(atoms.numbers, atoms.positions, cell, [True, True, False], Cutoffs(3.0))
    i, j, found = primitive_neighbor_list("ijS", [True, True, False], atoms.cell.array, atoms.positions, 3.0)
    assert as_set(edges, shifts) == as_set(np.stack([i, j]), found)


@pytest.mark.parametrize("pairs", [{}, {"Li-S": 3.0}])
def test_reverses(pairs):
    """One search for both directions gives the edges of two, and knows which is whose reverse."""
    rows = []
    for seed, (cell, num_atoms) in enumerate(CELLS.values()):
        atoms, _ = random_atoms(np.array(cell, dtype=float), num_atoms, PERIODIC[seed % 5], seed)
        rows.append(row(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc))
    structures, cutoffs = structures_of(table_of(rows)), Cutoffs(4.0, pairs)
    edges, shifts, reverse = all_neighbours(structures, cutoffs)
    np.testing.assert_array_equal(edges[:, reverse], edges[::-1])
    np.testing.assert_array_equal(shifts[reverse], -shifts)
    every, all_shifts, none = all_neighbours(structures, cutoffs, 10_000)
    assert none is None
    np.testing.assert_array_equal(edges, every)
    np.testing.assert_array_equal(shifts, all_shifts)
    for found, expected in zip(lengths_once(edges, shifts, reverse), lengths_once(edges, shifts), strict=True):
        np.testing.assert_array_equal(found, expected)
    once, places = lengths_once(edges, shifts, reverse)
    assert len(once) * 2 == len(places) == len(reverse) > 300


def test_cutoffs_of_pairs():
    atoms, _ = random_atoms(np.eye(3) * 8, 30, True, 0)
    cutoffs = Cutoffs(4.0, {"Li-S": 3.0, "S-Li": 2.0, "P-P": 1.5})
    edges, shifts = neighbours(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, cutoffs)
    found = as_set(edges, shifts)
    every, all_shifts = neighbours(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, Cutoffs(4.0))
    vectors = atoms.positions[every[1]] - atoms.positions[every[0]] + all_shifts @ atoms.cell.array
    limit = {(3, 16): 3.0, (16, 3): 2.0, (15, 15): 1.5}
    kinds = zip(atoms.numbers[every[0]].tolist(), atoms.numbers[every[1]].tolist(), strict=True)
    keep = np.linalg.norm(vectors, axis=1) <= [limit.get(kind, 4.0) for kind in kinds]
    assert found == as_set(every[:, keep], all_shifts[keep])
    assert len(found) < every.shape[1]
    assert Cutoffs(4.0, {"Li-S": 3.0}).matrix(["S", "Li"]).tolist() == [[4.0, 3.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("pairs", "words"), [({"Li": 3.0}, "two symbols"), ({"Li-Xx": 3.0}, "two symbols"), ({"Li-S": 5.0}, "at most 4.0")]
)
def test_cutoffs_that_cannot_be(pairs, words):
    with pytest.raises(ValueError, match=words):
        Cutoffs(4.0, pairs)


def test_few_neighbours_and_ties():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    a = np.sqrt(2) / 2 * 3.61
    for most, expected in ((12, 12), (5, 12), (13, 18), (100, 42)):  # shells of 12, 6 and 24
        edges, _ = neighbours(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, Cutoffs(a * 1.75), most)
        assert set(np.bincount(edges[0])) == {expected}
    # Neither the order of the atoms nor a rotation moves the choice.
    atoms, random = random_atoms(np.eye(3) * 7, 20, True, 3)
    edges, shifts = neighbours(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, Cutoffs(4.0), 6)
    order, turn = random.permutation(20), np.linalg.qr(random.normal(size=(3, 3)))[0]
    again, moved = neighbours(
        atoms.numbers[order], atoms.positions[order] @ turn, atoms.cell.array @ turn, atoms.pbc, Cutoffs(4.0), 6
    )
    assert as_set(order[again], moved) == as_set(edges, shifts)
    counts = np.bincount(edges[0], minlength=20)
    assert counts.min() >= 6 and TIE < 0.1
