# SPDX-License-Identifier: Apache-2.0
"""Neighbour lists by vesin, in any cell; in shapes, E is edges."""

from collections.abc import Mapping

import numpy as np
from vesin import NeighborList

from atoms.structures import NUM_ELEMENTS, NUMBERS, Structures


TIE = 0.01  # A: neighbours that are no further beyond the last of `max_neighbors` are as near as it


class Cutoffs:
    """Up to which distance, in A, two atoms are neighbours: `largest`, or less for the `pairs` that are named.

    `{"Li-S": 4.0}` holds for Li around S and S around Li, unless `S-Li` (centre first) is named as well. Raises
    ValueError for a pair or distance that cannot be.
    """

    def __init__(self, largest: float, pairs: Mapping[str, float] | None = None):
        if not largest > 0:
            raise ValueError(f"a cutoff of {largest} A must be above 0.")
        self.largest, self.pairs = float(largest), dict(sorted((pairs or {}).items()))
        self.by_number = np.full((NUM_ELEMENTS, NUM_ELEMENTS), self.largest)
        for turned in (True, False):  # what is named holds over what follows from the other direction
            for pair, distance in self.pairs.items():
                centre, _, neighbour = pair.partition("-")
                if centre not in NUMBERS or neighbour not in NUMBERS:
                    raise ValueError(f"a cutoff for {pair}: a pair is two symbols with a dash between, as Li-S.")
                if not 0 < distance <= self.largest:
                    raise ValueError(
                        f"a cutoff of {distance} A for {pair} must be above 0 and at most {self.largest}."
                    )
                a, b = NUMBERS[centre], NUMBERS[neighbour]
                self.by_number[(b, a) if turned else (a, b)] = distance
        self.symmetric = bool((self.by_number == self.by_number.T).all())

    def matrix(self, elements: list[str]) -> np.ndarray:
        """[T, T]: of each centre (row) and neighbour (column) of these elements."""
        numbers = [NUMBERS[symbol] for symbol in elements]
        return self.by_number[np.ix_(numbers, numbers)]

    @property
    def identity(self) -> tuple:
        """What tells it from others."""
        return self.largest, *self.pairs.items()


def as_cutoffs(cutoffs: "Cutoffs | float") -> Cutoffs:
    """A number is the same for all pairs."""
    return cutoffs if isinstance(cutoffs, Cutoffs) else Cutoffs(cutoffs)


def find(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoffs: Cutoffs,
         max_neighbors: int | None, quantities: str, half: bool = False) -> list[np.ndarray]:  # fmt: skip
    """Edges in no order: centre, neighbour, and what else `quantities` names as vesin does, d to leave some out.

    With `half`, one of the two directions of each pair.
    """
    pbc = np.asarray(pbc, dtype=bool)
    finder = NeighborList(cutoff=cutoffs.largest, full_list=not half, n_threads=1)
    periodic = pbc if pbc.any() and not pbc.all() else bool(pbc.all())
    points, box = (np.ascontiguousarray(array, dtype=np.float64) for array in (positions, cell))
    found = list(finder.compute(points=points, box=box, periodic=periodic, quantities=quantities))
    found[:2] = (array.astype(np.int64) for array in found[:2])
    if cutoffs.pairs:
        keep = found[quantities.index("d")] <= cutoffs.by_number[numbers[found[0]], numbers[found[1]]]
        found = [array[keep] for array in found]
    if max_neighbors is not None and len(found[0]):
        keep = nearest(found[0], found[quantities.index("d")], max_neighbors, len(numbers))
        found = [array[keep] for array in found]
    return found


def nearest(centres: np.ndarray, distances: np.ndarray, max_neighbors: int, num_atoms: int) -> np.ndarray:
    """Which edges stay where an atom keeps `max_neighbors`, ties included."""
    order = np.lexsort((distances, centres))
    counts = np.bincount(centres, minlength=num_atoms)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    limit = np.full(num_atoms, np.inf)
    many = counts > max_neighbors
    limit[many] = distances[order][starts[many] + max_neighbors - 1] + TIE
    return distances <= limit[centres]


def all_neighbours(
    structures: Structures, cutoffs: Cutoffs, max_neighbors: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Of structures laid end to end: `edges` [2, E] (centre, neighbour), sorted by centre, neighbour and shift,
    `shifts` [E, 3], and `reverse` [E], the place of each edge's other direction.

    An edge's vector is positions[neighbour] - positions[centre] + shift @ cell. Of more than `max_neighbors` an atom
    keeps the nearest, and with the last of them all that are within 0.01 A as near: a choice among equals would
    depend on the order of atoms and on rotations. A pair can lose one of its directions so, or where cutoffs differ
    by direction; `reverse` is None then.
    """
    half = max_neighbors is None and cutoffs.symmetric
    quantities = "ijSd" if cutoffs.pairs or max_neighbors else "ijS"
    parts = []
    for i in range(len(structures)):
        atoms = structures.atoms_of(i)
        centres, others, shifts, *_ = find(structures.numbers[atoms], structures.positions[atoms], structures.cell[i],
                                           structures.pbc[i], cutoffs, max_neighbors, quantities, half)  # fmt: skip
        parts.append((centres + atoms.start, others + atoms.start, shifts))
    centres, others, shifts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not half:
        order = np.argsort(edge_keys(centres, others, shifts))
        return np.stack([centres[order], others[order]]), shifts[order], None
    edges = np.concatenate([[centres, others], [others, centres]], axis=1)
    shifts, number = np.concatenate([shifts, -shifts]), len(shifts)
    order = np.argsort(edge_keys(*edges, shifts))
    place = np.empty_like(order)
    place[order] = np.arange(2 * number)
    reverse = np.concatenate([place[number:], place[:number]])[order]
    return edges.take(order, 1), shifts.take(order, 0), reverse  # indexing takes four times as long


def edge_keys(centres: np.ndarray, others: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """A number for each edge, which sorts by centre, neighbour and shift: faster than four keys."""
    number, reach = max(int(ends.max(initial=0)) for ends in (centres, others)) + 1, int(np.abs(shifts).max(initial=0))
    keys = centres * number + others
    for axis in range(3):
        keys = keys * (2 * reach + 1) + shifts[:, axis] + reach
    return keys


def lengths_once(
    edges: np.ndarray, shifts: np.ndarray, reverse: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Edges of which none is another's reverse, and for each of all edges the place of itself or its reverse therein.

    One whose reverse is not there stands for itself.
    """
    place = np.arange(edges.shape[1])
    if reverse is None:
        forth, back = edge_keys(*edges, shifts), edge_keys(*edges[::-1], -shifts)
        order = np.argsort(forth)
        near = order[np.minimum(np.searchsorted(forth, back, sorter=order), max(len(forth) - 1, 0))]
        reverse = np.where(forth[near] == back, near, place)
    own = np.minimum(place, reverse)
    is_first = own == place
    return np.flatnonzero(is_first), (np.cumsum(is_first) - 1)[own]
