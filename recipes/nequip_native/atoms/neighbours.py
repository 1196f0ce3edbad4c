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


def neighbours(
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    cutoffs: Cutoffs,
    max_neighbors: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`edges` [2, E] (centre, neighbour), sorted by centre, neighbour and shift, and `shifts` [E, 3].

    An edge's vector is positions[neighbour] - positions[centre] + shift @ cell. Of more than `max_neighbors` an atom
    keeps the nearest, and with the last of them all that are within 0.01 A as near: a choice among equals would
    depend on the order of atoms and on rotations. A pair can lose one of its directions so.
    """
    quantities = "ijSd" if cutoffs.pairs or max_neighbors else "ijS"
    centres, others, shifts, *_ = find(numbers, positions, cell, pbc, cutoffs, max_neighbors, quantities)
    # One number for each edge sorts faster than four.
    reach = int(np.abs(shifts).max(initial=0))
    key = centres * len(numbers) + others
    for axis in range(3):
        key = key * (2 * reach + 1) + shifts[:, axis] + reach
    order = np.argsort(key)
    return np.stack([centres[order], others[order]]), shifts[order]


def find(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoffs: Cutoffs,
         max_neighbors: int | None, quantities: str) -> list[np.ndarray]:  # fmt: skip
    """Edges in no order: centre, neighbour, and what else `quantities` names as vesin does, d to leave some out."""
    pbc = np.asarray(pbc, dtype=bool)
    finder = NeighborList(cutoff=cutoffs.largest, full_list=True, n_threads=1)
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of many structures laid end to end: `edges` [2, E], `shifts` [E, 3], and how many edges each structure has."""
    found = []
    for i in range(len(structures)):
        atoms = structures.atoms_of(i)
        edges, shifts = neighbours(structures.numbers[atoms], structures.positions[atoms], structures.cell[i],
                                   structures.pbc[i], cutoffs, max_neighbors)  # fmt: skip
        found.append((edges + atoms.start, shifts))
    edges = np.concatenate([edges for edges, _ in found], axis=1)
    return edges, np.concatenate([shifts for _, shifts in found]), np.array([edges.shape[1] for edges, _ in found])


def lengths_once(edges: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges of which none is another's reverse, and for each of all edges the place of itself or its reverse therein.

    One whose reverse is not there stands for itself.
    """
    number, reach = int(edges.max(initial=0)) + 1, int(np.abs(shifts).max(initial=0))

    def key(centres: np.ndarray, others: np.ndarray, away: np.ndarray) -> np.ndarray:
        found = centres * number + others
        for axis in range(3):
            found = found * (2 * reach + 1) + away[:, axis] + reach
        return found

    forth, back = key(edges[0], edges[1], shifts), key(edges[1], edges[0], -shifts)
    place, order, turned = np.arange(len(forth)), np.argsort(forth, kind="stable"), np.argsort(back)
    if np.array_equal(forth[order], back[turned]):
        reverse = np.empty_like(place)
        reverse[turned] = order
    else:  # some reverses are missing
        reverse = order[np.minimum(np.searchsorted(forth, back, sorter=order), len(forth) - 1)]
    own = np.minimum(place, np.where(forth[reverse] == back, reverse, place))
    is_first = own == place
    return np.flatnonzero(is_first), (np.cumsum(is_first) - 1)[own]
