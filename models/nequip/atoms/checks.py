# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with structures and their labels: of each frame by itself here, of all of them in findings.py.

In shapes, S is structures, A atoms, E edges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from ase.data import covalent_radii

from atoms.neighbours import Cutoffs, find
from atoms.structures import NUM_ELEMENTS, SYMBOLS, Structures


CLOSE = 0.5  # A
DENSE = 1.0  # A^3 an atom; a proton and its share of a metal under pressure take more
OVERLAP = 0.6  # of the sum of two covalent radii
FEWEST_BONDS = 6  # of a frame, to judge its forces by
NET_FORCE, NET_SHARE = 0.005, 0.1  # eV/A an atom, and of the length of all forces: what DFT leaves over is below
RADII = np.nan_to_num(covalent_radii, nan=1.5)


@dataclass(frozen=True)
class Kind:
    """Something that can be wrong with a frame: `bad` cannot be trained on, what is not is worth a look."""

    bad: bool
    key: str  # of the frame, or of the configuration
    text: str  # with `value`
    remedy: str


KINDS = {
    "no_labels": Kind(True, "energy, forces", "has neither an energy nor forces",
                      "name what the file calls them: +dataset.label_keys.energy=... and "
                      "+dataset.label_keys.forces=..."),
    "not_finite": Kind(True, "energy, forces, stress", "has a label that is infinite or NaN",
                       "take the frame out; its calculation failed"),
    "no_geometry": Kind(True, "positions, cell", "has a position or lattice vector that is infinite or NaN",
                        "take the frame out"),
    "close_atoms": Kind(True, "positions", "has atoms {value:.2f} A apart",
                        "take the frame out, or set +dataset.units.length=... if the file is not in A"),
    "fractional": Kind(True, "positions", "has fractional coordinates for Cartesian ones: all lie between 0 and 1",
                       "multiply them by the cell: atoms.set_scaled_positions(atoms.positions)"),
    "dense": Kind(True, "cell", "has {value:.2g} A^3 of its cell for each atom",
                  "give the cell in A, or set +dataset.units.length=..."),
    "pbc_without_cell": Kind(True, "pbc", "is periodic along a direction that has no lattice vector",
                             "set pbc to F there, or give the cell"),
    "no_neighbours": Kind(True, "positions", "has no two atoms within the cutoff of {value:g} A",
                          "use a larger cutoff, or take the frame out"),
    "lonely_atom": Kind(False, "positions", "has {value:.0f} atoms without a neighbour within the cutoff",
                        "use a larger cutoff, unless they are meant to be alone"),
    "cell_without_pbc": Kind(False, "pbc", "has a cell full of atoms ({value:.0f} A^3 each), and is not periodic",
                             "set pbc to T T T where it is a crystal or liquid"),
    "left_handed": Kind(False, "cell", "has a left-handed cell (determinant {value:.1f} A^3)",
                        "swap two lattice vectors; some codes then give stress with the wrong sign"),
    "net_force": Kind(False, "forces", "has forces that do not sum to zero: {value:.2f} eV/A an atom are left",
                      "look for forces set to zero by constraints, a mixed-up order of atoms, or an outer field"),
    "overlap": Kind(False, "positions", "has two atoms at {value:.2f} of the sum of their covalent radii",
                    "look at it; this is a bond no material has"),
    "duplicate": Kind(False, "positions", "has the same atoms, cell and positions as a frame before it",
                      "take one of them out"),
    "energy_outlier": Kind(False, "energy", "has an energy {value:+.2f} eV an atom from what its elements have",
                           "look for another functional, an unfinished calculation, or another unit"),
    "force_outlier": Kind(False, "forces", "has a force of {value:.1f} eV/A",
                          "take it out, unless such forces are wanted"),
    "turned_forces": Kind(False, "forces", "has forces whose sign is that of no other frame: the correlation with "
                          "what its bonds should do is {value:.2f}",
                          "look where the frame is from; it has gradients perhaps"),
}  # fmt: skip
BITS = {name: np.uint32(1 << i) for i, name in enumerate(KINDS)}
NEVER = BITS["no_geometry"] | BITS["pbc_without_cell"]  # have no neighbours that could be found
LABELS = ("energy", "forces", "stress")  # what a frame can lack, by bits in this order
BAD = np.uint32(sum(int(BITS[name]) for name, kind in KINDS.items() if kind.bad))


@dataclass
class Checked:
    """Of some structures: neighbours, and what is odd. `values` has an entry for each kind that was found."""

    edges: np.ndarray  # [2, E]
    vectors: np.ndarray  # [E, 3]
    distances: np.ndarray  # [E]
    num_edges: np.ndarray  # [S]
    flags: np.ndarray  # [S]
    values: dict[str, np.ndarray]  # [S]
    volume: np.ndarray  # [S]


def check(structures: Structures, cutoffs: Cutoffs, max_neighbors: int | None = None) -> Checked:
    """Look at each structure by itself."""
    size, owner = len(structures), structures.structure
    num_atoms = structures.num_atoms
    flags, values = np.zeros(size, np.uint32), {}

    def found(name: str, where: np.ndarray, value: np.ndarray | float = 0.0) -> None:
        if where.any():
            flags[where] |= BITS[name]
            values[name] = np.broadcast_to(value, size)

    def any_of(atoms: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=atoms, minlength=size) > 0

    volume = np.abs(np.linalg.det(structures.cell))
    lengths = np.linalg.norm(structures.cell, axis=-1)
    sound = ~any_of(~np.isfinite(structures.positions).all(-1)) & np.isfinite(structures.cell).all((1, 2))
    half = np.isfinite(structures.forces).any(-1) != np.isfinite(structures.forces).all(-1)
    bad_stress = np.isfinite(structures.stress).any((1, 2)) != np.isfinite(structures.stress).all((1, 2))
    has_forces, lacks_forces = (
        any_of(np.isfinite(structures.forces).all(-1)),
        any_of(np.isnan(structures.forces).all(-1)),
    )
    infinite = (
        np.isinf(structures.energy)
        | any_of(np.isinf(structures.forces).any(-1))
        | np.isinf(structures.stress).any((1, 2))
    )
    found("no_geometry", ~sound)
    found("not_finite", any_of(half) | bad_stress | infinite | (has_forces & lacks_forces))
    found("no_labels", ~np.isfinite(structures.energy) & ~has_forces)

    periodic, solid = structures.pbc.any(1), structures.pbc.all(1)
    without = (structures.pbc & (lengths < 1e-6)).any(1) | (solid & (volume < 1e-6))
    found("pbc_without_cell", without)
    per_atom = volume / np.maximum(num_atoms, 1)
    dense = solid & ~without & (per_atom < DENSE)
    found("dense", dense, per_atom)
    found("left_handed", solid & (np.linalg.det(structures.cell) < -1e-6), np.linalg.det(structures.cell))
    filled = ~periodic & (volume > 1e-6) & (np.isfinite(structures.stress).all((1, 2)) | (per_atom < 40))
    found("cell_without_pbc", filled & (num_atoms > 1), per_atom)

    findable = sound & ~without & ~dense & (num_atoms > 0)
    edges, vectors, distances, num_edges = _edges(structures, findable, cutoffs, max_neighbors)
    nearest, closest = np.full(size, np.inf), np.full(size, np.inf)
    if len(distances):
        of_edge = owner[edges[0]]
        np.minimum.at(nearest, of_edge, distances)
        bond = RADII[structures.numbers[edges[0]]] + RADII[structures.numbers[edges[1]]]
        np.minimum.at(closest, of_edge, distances / bond)
    inside = ~any_of(((structures.positions < -0.01) | (structures.positions > 1.01)).any(-1))
    fractional = inside & periodic & (lengths.max(1) > 2) & (num_atoms > 1) & (closest < OVERLAP)
    found("fractional", fractional)
    found("close_atoms", (nearest < CLOSE) & ~fractional, nearest)
    found("overlap", (closest < OVERLAP) & (nearest >= CLOSE) & ~fractional, closest)
    alone = findable & (num_edges == 0) & (num_atoms > 1)
    found("no_neighbours", alone, cutoffs.largest)
    lonely = np.bincount(edges[0], minlength=len(owner)) == 0
    number = np.bincount(owner, weights=lonely, minlength=size)
    found("lonely_atom", findable & ~alone & (number > 0) & (num_atoms > 1), number)

    net = np.stack([np.bincount(owner, weights=structures.forces[:, k], minlength=size) for k in range(3)], 1)
    net, every = np.linalg.norm(net, axis=1), np.sqrt(np.bincount(owner, (structures.forces**2).sum(-1), size))
    per_atom = net / np.maximum(num_atoms, 1)
    found("net_force", (net > NET_SHARE * every) & (per_atom > NET_FORCE) & (num_atoms > 1), per_atom)
    return Checked(edges, vectors, distances, num_edges, flags, values, volume)


def _edges(
    structures: Structures, findable: np.ndarray, cutoffs: Cutoffs, max_neighbors: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the structures that have a cell to find them in: edges, vectors, distances, and how many each has."""
    some = np.flatnonzero(findable)
    num_edges = np.zeros(len(structures), np.int64)
    if len(some) == 0:
        return np.zeros((2, 0), np.int64), np.zeros((0, 3)), np.zeros(0), num_edges
    found = []
    for i in some:
        atoms = structures.atoms_of(i)
        centres, others, distances, vectors = find(
            structures.numbers[atoms], structures.positions[atoms], structures.cell[i], structures.pbc[i], cutoffs,
            max_neighbors, "ijdD",
        )  # fmt: skip
        num_edges[i] = len(centres)
        found.append((centres + atoms.start, others + atoms.start, distances, vectors))
    centres, others, distances, vectors = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return np.stack([centres, others]), vectors, distances, num_edges


def fingerprints(structures: Structures) -> np.ndarray:
    """A number for each structure that only a copy shares: atoms, cell, positions to 1e-4 A from any origin."""
    first = structures.positions[np.minimum(structures.starts[:-1], max(len(structures.positions) - 1, 0))]
    with np.errstate(invalid="ignore"):
        moved = np.nan_to_num(structures.positions - first[structures.structure], posinf=0.0, neginf=0.0)
    places = np.column_stack([np.rint(moved * 1e4).astype(np.int64), structures.numbers.astype(np.int64)])
    cells = np.rint(np.nan_to_num(structures.cell, posinf=0.0, neginf=0.0).reshape(-1, 9) * 1e4).astype(np.int64)
    found = np.zeros(len(structures), np.uint64)
    for i in range(len(structures)):
        content = places[structures.atoms_of(i)].tobytes() + cells[i].tobytes()
        found[i] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
    return found


# ---- what all frames together tell


@dataclass
class Bonds:
    """Each atom's nearest neighbour: the pair of elements, the distance d, and how strongly the two push apart, p.

    Pairs that are too near push: within a kind of pair p (eV/A) falls with d, and rises where forces have the wrong
    sign.
    """

    pairs: np.ndarray  # the different ones
    pair: np.ndarray  # of each bond
    d: np.ndarray
    p: np.ndarray
    structure: np.ndarray

    def sums(self) -> dict[int, np.ndarray]:
        """By pair of elements: n, and sums of d, p, d^2, d p, p^2."""
        d, p = self.d, self.p
        weights = (np.ones_like(d), d, p, d * d, d * p, p * p)
        table = np.stack([np.bincount(self.pair, w, len(self.pairs)) for w in weights], 1)
        return dict(zip(self.pairs.tolist(), table, strict=True))

    def agreement(self, num_structures: int) -> np.ndarray:
        """[S]: how the pushes of a structure go with those of a line through all, from -1 to 1; NaN for few bonds."""
        n, d, p, dd, dp, _ = np.array(list(self.sums().values())).reshape(-1, 6).T
        slope = (dp - d * p / n) / np.maximum(dd - d * d / n, 1e-12)
        expected = (p / n)[self.pair] + slope[self.pair] * (self.d - (d / n)[self.pair])

        def of(weights: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(self.structure, weights, num_structures)

        with np.errstate(invalid="ignore", divide="ignore"):
            found = of(self.p * expected) / np.sqrt(of(self.p**2) * of(expected**2))
        return np.where(of() < FEWEST_BONDS, np.nan, found)


def nearest_bonds(structures: Structures, checked: Checked) -> Bonds:
    """Of the structures that have forces, and are not bad."""
    if not len(checked.distances):
        return Bonds(*(np.zeros(0, t) for t in (np.int64, np.int64, float, float, np.int64)))
    nearest = np.full(len(structures.numbers), np.inf)
    np.minimum.at(nearest, checked.edges[0], checked.distances)
    ties = np.flatnonzero(checked.distances == nearest[checked.edges[0]])
    # Of several that are as near the one in the direction of the largest x, y, z: not the first, which nobody rules.
    ties = ties[np.lexsort((*checked.vectors[ties].T, checked.edges[0][ties]))]
    first = ties[np.flatnonzero(np.diff(checked.edges[0][ties], append=-1))]
    centre, other = checked.edges[:, first]
    d = checked.distances[first]
    apart = structures.forces[centre] - structures.forces[other]
    p = -0.5 * np.einsum("ei,ei->e", apart, checked.vectors[first]) / np.maximum(d, 1e-9)
    a, b = np.sort(np.stack([structures.numbers[centre], structures.numbers[other]]).astype(np.int64), axis=0)
    fine = np.isfinite(p) & (d > CLOSE) & ((checked.flags[structures.structure[centre]] & BAD) == 0)
    pairs, place = np.unique((a * NUM_ELEMENTS + b)[fine], return_inverse=True)
    return Bonds(pairs, place, d[fine], p[fine], structures.structure[centre][fine])


def lacks(structures: Structures) -> np.ndarray:
    """[S]: which of `LABELS` a structure lacks, a bit each."""
    without = np.bincount(structures.structure, ~np.isfinite(structures.forces).all(-1), len(structures)) > 0
    stress = ~np.isfinite(structures.stress).all((1, 2))
    return (~np.isfinite(structures.energy) + 2 * without + 4 * stress).astype(np.uint8)


def bond_ratios(structures: Structures, checked: Checked) -> np.ndarray:
    """Counts [200] of each atom's nearest neighbour by distance over the sum of covalent radii, in steps of 0.02."""
    if not len(checked.distances):
        return np.zeros(200)
    ratio = checked.distances / (
        RADII[structures.numbers[checked.edges[0]]] + RADII[structures.numbers[checked.edges[1]]]
    )
    nearest = np.full(len(structures.numbers), np.inf)
    np.minimum.at(nearest, checked.edges[0], ratio)
    return np.histogram(nearest[np.isfinite(nearest)], bins=200, range=(0, 4))[0].astype(np.float64)


def work(structures: Structures, checked: Checked) -> Iterator[tuple[bool, float, float, float]]:
    """Of neighbouring frames that are nearly the same: whether the cell differs, and the energies, in eV.

    The change of energy, the work of the forces on the way, and the work of the stress: the first is the sum of the
    others where units and signs are right, and the steps short (trapezoidal rule).
    """
    for i in range(len(structures) - 1):
        one, two = structures.atoms_of(i), structures.atoms_of(i + 1)
        if (
            not np.array_equal(structures.numbers[one], structures.numbers[two])
            or (checked.flags[i : i + 2] & BAD).any()
        ):
            continue
        strain, straining = np.zeros((3, 3)), False
        if structures.pbc[i].all() and structures.pbc[i + 1].all():
            inverse = np.linalg.inv(structures.cell[i])
            strain = inverse @ structures.cell[i + 1] - np.eye(3)
            straining = bool(np.abs(strain).max() > 1e-6)
            step = (structures.positions[two] @ np.linalg.inv(structures.cell[i + 1])) - structures.positions[
                one
            ] @ inverse
            step = (step - np.rint(step)) @ (structures.cell[i] + structures.cell[i + 1]) / 2
        else:
            step = structures.positions[two] - structures.positions[one]
        if np.abs(step).max() > 0.3 or np.abs(strain).max() > 0.05 or not (np.abs(step).max() > 1e-4 or straining):
            continue
        forces = (structures.forces[one] + structures.forces[two]) / 2
        stress = (structures.stress[i] + structures.stress[i + 1]) / 2
        of_stress = np.sum(stress * strain) * (checked.volume[i] + checked.volume[i + 1]) / 2 if straining else 0.0
        found = (structures.energy[i + 1] - structures.energy[i], -float(np.sum(forces * step)), float(of_stress))
        if np.isfinite(found[:2]).all():
            yield straining, *found


def composition(numbers: np.ndarray) -> str:
    """As Li22P3S58 says it."""
    found, counts = np.unique(numbers, return_counts=True)
    return "".join(f"{SYMBOLS[n]}{'' if c == 1 else c}" for n, c in zip(found, counts, strict=True))
