# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with structures and their labels: of each frame by itself here, of all of them in findings.py.

In shapes, S is structures, A atoms, E edges.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from ase.data import covalent_radii

from atoms.neighbours import Cutoffs, find
from atoms.structures import NUM_ELEMENTS, SYMBOLS, Structures


CLOSE = 0.5  # A
DENSE = 1.0  # A^3 per atom; a proton and its share of a metal under pressure take more
OVERLAP, FAR = 0.6, 1.5  # of the sum of two covalent radii
NET_FORCE, NET_SHARE = 0.005, 0.1  # eV/A per atom, and of the length of all forces: what DFT leaves over is below
TORQUE, TORQUE_SHARE = 0.02, 0.3  # the same of the moments of forces, eV
RADII = np.nan_to_num(covalent_radii, nan=1.5)
VACUUM = 5.0  # A, without an atom along a lattice vector: a slab, layer or molecule
RADII[[2, 10, 18, 36, 54, 86]] *= 1.6  # noble gases have no bonds


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
    "two_names": Kind(False, "energy, forces", "has energies or forces by more than one name, and their values differ",
                      "say which to use: +dataset.label_keys.energy=..., +dataset.label_keys.forces=..."),
    "not_finite": Kind(True, "energy, forces, stress", "has a label that is infinite or NaN",
                       "take the frame out; its calculation failed"),
    "no_geometry": Kind(True, "positions, cell", "has a position or lattice vector that is infinite or NaN",
                        "take the frame out"),
    "close_atoms": Kind(True, "positions", "has atoms {value:.2f} A apart",
                        "take the frame out, or set +dataset.units.length=... if the file is not in A"),
    "fractional": Kind(True, "positions", "has fractional coordinates in place of Cartesian ones",
                       "multiply them by the cell: atoms.set_scaled_positions(atoms.positions)"),
    "dense": Kind(True, "cell", "has a cell of only {value:.2g} A^3 per atom",
                  "give the cell in A, or set +dataset.units.length=..."),
    "pbc_without_cell": Kind(True, "pbc", "is periodic along a direction that has no lattice vector",
                             "set pbc to F there, or give the cell"),
    "no_neighbours": Kind(True, "positions", "has no two atoms within the cutoff of {value:g} A",
                          "use a larger cutoff, or take the frame out"),
    "lonely_atom": Kind(False, "positions", "has atoms without a neighbour within the cutoff: {value:.0f}",
                        "use a larger cutoff, unless they are meant to be alone"),
    "cell_without_pbc": Kind(False, "pbc", "has a cell full of atoms ({value:.0f} A^3 each), and is not periodic",
                             "set pbc to T T T where it is a crystal or liquid"),
    "far_apart": Kind(False, "positions", "has nearest neighbours {value:.1f} times the sum of covalent radii apart",
                      "set +dataset.units.length=bohr if lengths are in bohr"),
    "half_empty": Kind(False, "cell", "fills {value:.0%} of each side of its periodic cell",
                       "give the cell in A if it is in bohr; vacuum on all sides is for molecules"),
    "left_handed": Kind(False, "cell", "has a left-handed cell (determinant {value:.1f} A^3)",
                        "swap two lattice vectors; some codes then give stress with the wrong sign"),
    "net_force": Kind(False, "forces", "has forces that do not sum to zero: {value:.2f} eV/A per atom remain",
                      "look for forces set to zero by constraints, a mixed-up order of atoms, or an external field"),
    "net_torque": Kind(False, "forces", "has forces with a net torque: {value:.0%} of their moments remain",
                       "look for a mixed-up order of atoms, or positions and forces in different orientations"),
    "overlap": Kind(False, "positions", "has two atoms at {value:.2f} of the sum of their covalent radii",
                    "look at it: bonds are not this short"),
    "duplicate": Kind(False, "positions", "has the same atoms, cell and positions as a frame before it",
                      "take one of them out"),
    "wrong_energy": Kind(True, "energy", "has an energy {value:+.0f} eV per atom off what its composition suggests",
                         "look for another unit (kcal/mol, hartree), or an energy of another kind"),
    "energy_outlier": Kind(False, "energy", "has an energy {value:+.2f} eV per atom off what its composition suggests",
                           "look for another functional, an unfinished calculation, or another unit"),
    "unlike_energy": Kind(False, "energy", "has an energy {value:+.3f} eV per atom off what the forces suggest",
                          "look for the energy of another frame, or an unfinished calculation"),
    "force_outlier": Kind(False, "forces", "has a force of {value:.1f} eV/A",
                          "take it out, unless such forces are wanted"),
    "turned_forces": Kind(True, "forces", "has forces opposite to those of other frames at the same distances "
                          "(correlation {value:.2f})", "if they are gradients, change their sign, or take it out"),
    "other_strength": Kind(True, "forces", "has forces {value:.3g} times those of other frames at the same distances",
                           "look for another unit: a force in kcal/mol/A is 23.06 times that in eV/A, and one in "
                           "hartree/bohr 0.0194 times"),
    "turned_stress": Kind(True, "stress", "has stress of the opposite sign to other frames "
                          "(correlation of shear {value:.2f})", "change its sign, or take the frame out"),
    "other_stress": Kind(True, "stress", "has stress {value:.3g} times that of other frames under similar strain",
                         "look for another unit: stress in GPa is 160.2 times that in eV/A^3, in kbar 1602 times"),
    "zero_forces": Kind(True, "forces", "has forces that are all exactly zero, and no symmetry that makes them so",
                        "take the frame out, or its forces"),
    "mixed_up_forces": Kind(False, "forces", "has forces that do not follow the distances of its atoms as in other "
                            "frames (correlation {value:.2f})",
                            "look for a mixed-up order of atoms, wrong elements, or forces of another frame or sign"),
}  # fmt: skip
BITS = {name: np.uint32(1 << i) for i, name in enumerate(KINDS)}
NEVER = BITS["no_geometry"] | BITS["pbc_without_cell"]  # have no neighbours that could be found
BAD = np.uint32(sum(int(BITS[name]) for name, kind in KINDS.items() if kind.bad))


@dataclass
class Checked:
    """Of some structures: neighbours, and what is odd. `values` has an entry for each kind that was found.

    Of a pair both directions are edges, or, where `num_ends` is 2, one that stands for both.
    """

    edges: np.ndarray  # [2, E], the structures' own end to end
    vectors: np.ndarray  # [E, 3]
    distances: np.ndarray  # [E]
    num_edges: np.ndarray  # [S]
    flags: np.ndarray  # [S]
    values: dict[str, np.ndarray]  # [S]
    volume: np.ndarray  # [S]
    gap: np.ndarray  # [S], A: the widest without an atom along a lattice vector; 0 unless periodic along all
    num_ends: int

    @property
    def share(self) -> float:
        """Of a pair's energy, what an edge has."""
        return self.num_ends / 2

    def at_centres(self, centre: np.ndarray, other: np.ndarray, vectors: np.ndarray, num_atoms: int) -> np.ndarray:
        """[A, 3]: sums at each atom of vectors that point from it, of its edges."""
        found = [np.bincount(centre, vectors[:, k], num_atoms) for k in range(3)]
        if self.num_ends == 2:
            found = [one - np.bincount(other, vectors[:, k], num_atoms) for k, one in enumerate(found)]
        return np.stack(found, 1)

    def neighbours(self, num_atoms: int) -> np.ndarray:
        """[A]: how many an atom has."""
        return sum(np.bincount(ends, minlength=num_atoms) for ends in self.edges[: self.num_ends])

    def nearest(self, of_edges: np.ndarray, num_atoms: int) -> np.ndarray:
        """[A]: the smallest of an atom's edges, infinite without one."""
        found = np.full(num_atoms, np.inf)
        for ends in self.edges[: self.num_ends]:
            np.minimum.at(found, ends, of_edges)
        return found


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
    filled, gap = _room(structures, np.flatnonzero(findable & solid))
    near = _edges(structures, findable, cutoffs, max_neighbors, flags, values, volume, gap)
    bond = RADII[structures.numbers[near.edges[0]]] + RADII[structures.numbers[near.edges[1]]]
    nearest, ratio = (near.nearest(of_edges, len(owner)) for of_edges in (near.distances, near.distances / bond))
    (nearest, _), (closest, usual) = (_least_and_median(values, structures) for values in (nearest, ratio))
    inside = ~any_of(((structures.positions < -0.01) | (structures.positions > 1.01)).any(-1))
    fractional = inside & periodic & (lengths.max(1) > 2) & (num_atoms > 1) & (closest < OVERLAP)
    found("fractional", fractional)
    found("close_atoms", (nearest < CLOSE) & ~fractional, nearest)
    found("overlap", (closest < OVERLAP) & (nearest >= CLOSE) & ~fractional, closest)
    found("far_apart", (usual > FAR) & np.isfinite(usual) & (num_atoms > 3), usual)
    found("half_empty", (filled > 0.4).all(1) & (filled < 0.56).all(1) & (num_atoms > 10), filled.mean(1))
    # Two atoms that are far apart are the end of a dissociation curve.
    alone = findable & (near.num_edges == 0) & (num_atoms > 2)
    found("no_neighbours", alone, cutoffs.largest)
    lonely = near.neighbours(len(owner)) == 0
    number = np.bincount(owner, weights=lonely, minlength=size)
    found("lonely_atom", findable & ~alone & (number > 0) & (num_atoms > 1), number)

    still = (num_atoms > 1) & ~any_of((structures.forces != 0).any(-1))
    if still.any():
        far = near.distances[:, None]
        pull = near.vectors / np.maximum(far, 1e-9) * (1 - far / cutoffs.largest) ** 2
        net = near.at_centres(*near.edges, pull, len(owner))
        found("zero_forces", still & any_of(np.linalg.norm(net, axis=1) > 0.05))

    def left_over(of_atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The length of the sum of an atom's vectors by structure, per atom, and as a share of their lengths."""
        net = np.stack([np.bincount(owner, of_atoms[:, k], size) for k in range(3)], 1)
        length, every = np.linalg.norm(net, axis=1), np.sqrt(np.bincount(owner, (of_atoms**2).sum(-1), size))
        return length / np.maximum(num_atoms, 1), length / np.maximum(every, 1e-30)

    net, share = left_over(structures.forces)
    unbalanced = (share > NET_SHARE) & (net > NET_FORCE) & (num_atoms > 1)
    found("net_force", unbalanced, net)
    if not periodic.all():
        centre = np.stack([np.bincount(owner, structures.positions[:, k], size) for k in range(3)], 1)
        arms = structures.positions - (centre / np.maximum(num_atoms, 1)[:, None])[owner]
        net, share = left_over(np.cross(arms, structures.forces))
        turning = (share > TORQUE_SHARE) & (net > TORQUE) & ~periodic & ~unbalanced & sound
        found("net_torque", turning, share)
    return near


def _least_and_median(of_atoms: np.ndarray, structures: Structures) -> tuple[np.ndarray, np.ndarray]:
    """[S]: the smallest and the median of an atom's number in each structure."""
    if not len(of_atoms):
        return np.full(len(structures), np.inf), np.full(len(structures), np.inf)
    ordered = of_atoms[np.lexsort((of_atoms, structures.structure))]
    last = len(ordered) - 1
    first, middle = structures.starts[:-1], structures.starts[:-1] + structures.num_atoms // 2
    return ordered[np.minimum(first, last)], ordered[np.minimum(middle, last)]


def _room(structures: Structures, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, 3], [S]: along each lattice vector the share that its widest gap leaves, and the widest of these gaps in A.

    Both are 0 for structures that are not among `some`.
    """
    filled, gap = np.zeros((len(structures), 3)), np.zeros(len(structures))
    for i in some:
        inverse = np.linalg.inv(structures.cell[i])
        at = np.sort(structures.positions[structures.atoms_of(i)] @ inverse % 1.0, axis=0)
        free = np.maximum(np.diff(at, axis=0).max(0, initial=0.0), at[0] + 1 - at[-1])
        filled[i], gap[i] = 1 - free, (free / np.linalg.norm(inverse, axis=0)).max()
    return filled, gap


def _edges(structures: Structures, findable: np.ndarray, cutoffs: Cutoffs, max_neighbors: int | None,
           flags: np.ndarray, values: dict[str, np.ndarray], volume: np.ndarray,
           gap: np.ndarray) -> Checked:  # fmt: skip
    """Edges of the structures that have a cell to find them in."""
    half, num_edges = max_neighbors is None and cutoffs.symmetric, np.zeros(len(structures), np.int64)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 3)))]
    for i in np.flatnonzero(findable):
        atoms = structures.atoms_of(i)
        centres, others, distances, vectors = find(
            structures.numbers[atoms], structures.positions[atoms], structures.cell[i], structures.pbc[i], cutoffs,
            max_neighbors, "ijdD", half,
        )  # fmt: skip
        num_edges[i] = len(centres) * (2 if half else 1)
        found.append((centres + atoms.start, others + atoms.start, distances, vectors))
    centres, others, distances, vectors = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    ends = 2 if half else 1
    return Checked(np.stack([centres, others]), vectors, distances, num_edges, flags, values, volume, gap, ends)


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


def element_counts(structures: Structures) -> np.ndarray:
    """[S, 119]: how many atoms of each element a structure has."""
    flat = structures.structure * NUM_ELEMENTS + structures.numbers
    return np.bincount(flat, minlength=len(structures) * NUM_ELEMENTS).reshape(-1, NUM_ELEMENTS)


def lacks(structures: Structures) -> np.ndarray:
    """[S]: which of `LABELS` a structure lacks, a bit each in their order."""
    without = np.bincount(structures.structure, ~np.isfinite(structures.forces).all(-1), len(structures)) > 0
    stress = ~np.isfinite(structures.stress).all((1, 2))
    return (~np.isfinite(structures.energy) + 2 * without + 4 * stress).astype(np.uint8)


def composition(numbers: np.ndarray) -> str:
    """As Li22P3S58 says it."""
    found, counts = np.unique(numbers, return_counts=True)
    return "".join(f"{SYMBOLS[n]}{'' if c == 1 else c}" for n, c in zip(found, counts, strict=True))
