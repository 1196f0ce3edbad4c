# SPDX-License-Identifier: Apache-2.0
"""Pair potentials fitted to the forces alone, to hold forces, energies and stress of the data against each other.

They are poor potentials. But where they follow the forces, the energies and the shear stress that they predict have
the sign and size of true ones: measured on metals, melts, salts, molecules, clusters and surfaces, within a factor of
three; but not the stress of slabs, which surfaces rule. In shapes, S is structures, A atoms, E edges, P kinds of
pairs, C coefficients.
"""

from dataclasses import dataclass

import numpy as np

from atoms.checks import VACUUM
from atoms.structures import NUM_ELEMENTS, Structures


REACH, NUM_WAVES, STEP = 5.0, 8, 0.002  # A, of a kind of pair, and A between entries of the tables
MOST_PAIRS = 30  # kinds with functions of their own; all rarer ones share one
RIDGES = 1e-7, 1e-5, 1e-3, 1e-1  # of which the one that predicts the other half best is taken


@dataclass
class PairFit:
    """Tables of each kind of pair's energy (eV) and push -dE/dd (eV/A) by distance, and how well forces follow."""

    pairs: np.ndarray  # [P - 1], sorted: smaller number * NUM_ELEMENTS + larger
    energy: np.ndarray  # [P, distances]
    push: np.ndarray  # [P, distances]
    held: float  # correlation with the forces of structures that were not fitted to
    num_used: int = 1  # coefficients

    @classmethod
    def none(cls) -> "PairFit":
        """Without forces there is none."""
        return cls(np.zeros(0, np.int64), np.zeros((1, 2)), np.zeros((1, 2)), 0.0)

    def predict(
        self, structures: Structures, checked, with_virial: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies [S], forces [A, 3], and stress times volume [S, 3, 3]."""
        near = np.flatnonzero(checked.distances < (self.energy.shape[1] - 1) * STEP)
        centre, other, distances = checked.edges[0, near], checked.edges[1, near], checked.distances[near]
        place = kinds(structures.numbers, centre, other, self.pairs), (distances / STEP).astype(np.int64)
        starts, share = stretches(structures, centre), checked.share
        energy = _sums(share * self.energy[place], starts)
        vectors = checked.vectors[near]
        pull = vectors * (-self.push[place] / np.maximum(distances, 1e-9))[:, None]
        forces = checked.at_centres(centre, other, pull, len(structures.numbers))
        virial = np.zeros((len(structures), 3, 3))
        if with_virial:
            a, b = np.triu_indices(3)
            virial[:, a, b] = virial[:, b, a] = _sums(share * pull[:, a] * vectors[:, b], starts)
        return energy, forces, virial

    def compare(self, structures: Structures, checked) -> dict[str, np.ndarray]:
        """[S]: how forces go with those predicted: `agreement` (-1 to 1), `strength` as a factor, `misfit` (eV/A).

        The same of shear stress, and the size of that predicted, `shear` (eV/A^3); NaN without such a label or with
        vacuum, since pair potentials do not tell the stress of surfaces. `independent` is how many forces of a
        structure differ in length, and `fitted` the predicted energy in eV.
        """
        energy, forces, virial = self.predict(structures, checked, bool(np.isfinite(structures.stress).any()))
        size, volume = len(structures), np.maximum(checked.volume, 1e-30)[:, None, None]

        def of(of_atoms: np.ndarray) -> np.ndarray:
            return np.bincount(structures.structure, of_atoms.sum(-1), size)

        solid = structures.pbc.all(1) & (checked.volume > 0) & (checked.gap < VACUUM)
        ours, theirs = (shear_of(stress).reshape(size, 9) for stress in (virial / volume, structures.stress))
        sums = {
            "": (of(forces * structures.forces), of(structures.forces**2), of(forces**2)),
            "shear_": ((ours * theirs).sum(1), np.where(solid, (theirs**2).sum(1), np.nan), (ours**2).sum(1)),
        }
        found = {"misfit": np.sqrt(of((forces - structures.forces) ** 2) / np.maximum(structures.num_atoms, 1))}
        for name, (along, own, predicted) in sums.items():
            known = (own >= 0) & (predicted > 1e-12)
            found[f"{name}agreement"] = np.where(known, along / np.sqrt(np.maximum(own * predicted, 1e-30)), np.nan)
            found[f"{name}strength"] = np.where(known, along / np.maximum(predicted, 1e-30), np.nan)
        found |= {"shear": np.sqrt(sums["shear_"][2]), "independent": independent(structures)}
        return {name: values.astype(np.float32) for name, values in found.items()} | {"fitted": energy}


def independent(structures: Structures) -> np.ndarray:
    """[S]: how many lengths forces have, within 2% of the largest: atoms related by symmetry have the same."""
    owner, lengths = structures.structure, np.linalg.norm(structures.forces, axis=1)
    largest = np.zeros(len(structures))
    np.fmax.at(largest, owner, lengths)
    with np.errstate(invalid="ignore"):
        steps = np.nan_to_num(np.rint(50 * lengths / np.maximum(largest, 1e-30)[owner])).astype(np.int64)
    return np.bincount(np.unique(owner * 51 + steps) // 51, minlength=len(structures))


def shear_of(stress: np.ndarray) -> np.ndarray:
    """[S, 3, 3] without its pressure."""
    return stress - np.trace(stress, axis1=1, axis2=2)[:, None, None] / 3 * np.eye(3)


def stretches(structures: Structures, centre: np.ndarray) -> np.ndarray:
    """[S + 1]: where each structure's edges begin, of edges that lie end to end."""
    return np.searchsorted(structures.structure[centre], np.arange(len(structures) + 1))


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums over stretches, of which some can be empty."""
    found, some = np.zeros((len(starts) - 1, *values.shape[1:])), np.flatnonzero(np.diff(starts))
    if len(some):
        found[some] = np.add.reduceat(values, starts[some])
    return found


def kinds(numbers: np.ndarray, centre: np.ndarray, other: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """[E]: the place of each edge's elements among `pairs`, or behind the last."""
    table = np.full(NUM_ELEMENTS * NUM_ELEMENTS, len(pairs))
    table[pairs] = np.arange(len(pairs))
    table[pairs % NUM_ELEMENTS * NUM_ELEMENTS + pairs // NUM_ELEMENTS] = np.arange(len(pairs))
    return table[numbers[centre].astype(np.int64) * NUM_ELEMENTS + numbers[other]]


def waves(distances: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """[E, NUM_WAVES]: sin(k pi d / reach) / d, and its derivative by d."""
    k = np.arange(1, NUM_WAVES + 1) * np.pi / reach
    d = np.maximum(distances, 0.3)[:, None]
    value = np.sin(k * d) / d
    return value, (k * np.cos(k * d) - value) / d


def fit(structures: Structures, checked, reach: float) -> PairFit:
    """To the forces of structures that all have them, each counting the same; `checked` is theirs."""
    reach = min(reach, REACH)
    near = checked.distances < reach
    centre, other, d = checked.edges[0, near], checked.edges[1, near], checked.distances[near, None]
    a, b = np.sort(structures.numbers[np.stack([centre, other])].astype(np.int64), axis=0)
    found, counts = np.unique(a * NUM_ELEMENTS + b, return_counts=True)
    pairs = np.sort(found[np.argsort(-counts, kind="stable")[:MOST_PAIRS]])
    column = kinds(structures.numbers, centre, other, pairs)[:, None] * NUM_WAVES + np.arange(NUM_WAVES)
    units, width = checked.vectors[near] / np.maximum(d, 1e-9), (len(pairs) + 1) * NUM_WAVES
    starts = stretches(structures, centre)
    squares = np.bincount(structures.structure, (structures.forces**2).sum(-1), len(structures)) / structures.num_atoms
    usual = np.median(squares[squares > 0]) if (squares > 0).any() else 1.0
    normal, right, sizes = np.zeros((2, width, width)), np.zeros((len(structures), width)), np.zeros(len(structures))
    for i in range(len(structures)):
        atoms, edges = structures.atoms_of(i), slice(starts[i], starts[i + 1])
        # Of an edge, the force on its centre by each function: [E, 3, NUM_WAVES].
        pull = units[edges, :, None] * waves(d[edges, 0], reach)[1][:, None]
        matrix = np.zeros(3 * structures.num_atoms[i] * width)
        for ends, sign in ((centre, 1.0), (other, -1.0))[: checked.num_ends]:
            rows = (ends[edges, None] - atoms.start) * 3 + np.arange(3)
            places = rows[:, :, None] * width + column[edges, None]
            matrix += np.bincount(places.ravel(), sign * pull.ravel(), len(matrix))
        weight = 1 / np.sqrt((squares[i] + usual) * structures.num_atoms[i])
        matrix, forces = matrix.reshape(-1, width) * weight, structures.forces[atoms].ravel() * weight
        normal[i % 2] += matrix.T @ matrix
        right[i], sizes[i] = matrix.T @ forces, forces @ forces
    found, held = solved(normal, right, sizes)
    value, slope = waves(np.arange(0, reach, STEP), reach)
    found = found.reshape(-1, NUM_WAVES)
    return PairFit(pairs, found @ value.T, -found @ slope.T, held, int((np.diagonal(normal.sum(0)) > 0).sum()))


def solved(normal: np.ndarray, right: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """The coefficients [C], and how the forces that they give to the other half of the structures go with theirs.

    `normal` [2, C, C] are the normal equations of both halves, every second structure; `right` [S, C] and `sizes` [S]
    are of each structure. Some of the structures can have the wrong sign: it is turned where all then agree best.
    """
    scale = np.sqrt(np.maximum(np.diagonal(normal.sum(0)), 1e-300))
    normal, right = normal / np.outer(scale, scale), right / scale
    identity = np.eye(len(scale))

    def through(matrix: np.ndarray, ridge: float, of: np.ndarray) -> np.ndarray:
        return np.linalg.solve(matrix + ridge * np.trace(matrix) / len(matrix) * identity + 1e-12 * identity, of)

    # Frames that agree but for signs have one common direction; where others are, it says nothing of them.
    common = np.linalg.eigh(right @ through(normal.sum(0), RIDGES[1], right.T))[1][:, -1]
    found = through(normal.sum(0), RIDGES[1], right.T @ common)
    for _ in range(5):
        length = np.sqrt(found @ normal.sum(0) @ found / len(right))
        agreement = right @ found / np.maximum(length * np.sqrt(sizes), 1e-300)
        most = 1.0 if np.sign(agreement[np.abs(agreement) > 0.3]).sum() >= 0 else -1.0
        signs = np.where(most * agreement < -0.3, -1.0, 1.0)
        found = through(normal.sum(0), RIDGES[1], signs @ right)
    halves = [(signs[:, None] * right)[k::2].sum(0) for k in (0, 1)]
    best, held = RIDGES[-1], 0.0
    for ridge in RIDGES:
        given = [through(normal[1 - k], ridge, halves[1 - k]) for k in (0, 1)]
        along = sum(given[k] @ halves[k] for k in (0, 1))
        length = sum(given[k] @ normal[k] @ given[k] for k in (0, 1))
        if length > 0 and (now := along / np.sqrt(length * sizes.sum())) > held:
            best, held = ridge, float(now)
    return through(normal.sum(0), best, sum(halves)) / scale, held
