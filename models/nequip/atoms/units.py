# SPDX-License-Identifier: Apache-2.0
"""What a sample of the structures tells about units and signs: sums that findings.py judges."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import datasets
import numpy as np

from atoms.checks import BAD, CLOSE, VACUUM, Checked, check, element_counts
from atoms.neighbours import Cutoffs
from atoms.pair_fit import PairFit, fit, shear_of
from atoms.structures import NUM_ELEMENTS, Structures, structures_of


SAMPLE, STRETCH, SAMPLE_ATOMS = 300, 10, 12_000  # structures, those that follow each other in it, and atoms, at most


@dataclass
class Evidence:
    """Sums of products of two things that must go together: n, a a, a b, b b; and the pair potentials.

    `held` are the correlation of forces with those predicted, and how many force components there are for each
    coefficient; NaN without forces.
    """

    force_work: np.ndarray  # change of energy, and work of the forces, between frames nearly the same
    stress_work: np.ndarray  # what is left of it, and work of the stress
    squeeze: np.ndarray  # volume and pressure of structures of the same atoms
    bonds: np.ndarray  # [pairs, 6]: by pair of elements n, and sums of d, p, d d, d p, p p of nearest neighbours
    energy_fit: np.ndarray  # change of energy between structures of the same atoms, and as pair potentials have it
    shear_fit: np.ndarray  # shear stress, and as pair potentials have it
    virial_fit: np.ndarray  # shear stress, and that of pair potentials times the volume
    held: np.ndarray
    pairs: np.ndarray  # of PairFit
    energy: np.ndarray
    push: np.ndarray

    @property
    def fit(self) -> PairFit:
        """The pair potentials."""
        return PairFit(self.pairs, self.energy, self.push, float(np.nan_to_num(self.held[0])))

    def arrays(self) -> dict[str, np.ndarray]:
        """To be saved."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def sample(rows: datasets.Dataset) -> Structures:
    """Short stretches from all over the rows."""
    size, number = len(rows), SAMPLE // STRETCH
    starts = np.linspace(0, max(size - STRETCH, 0), number).astype(np.int64)
    places = np.arange(size) if size <= SAMPLE else np.unique((starts[:, None] + np.arange(STRETCH)).ravel())
    found = structures_of(rows.with_format("arrow")[places])
    if found.starts[-1] > SAMPLE_ATOMS:  # every k-th stretch, at least one
        stretch = np.arange(len(found)) // STRETCH
        step = int(np.ceil(found.starts[-1] / SAMPLE_ATOMS))
        found = found.take(np.flatnonzero(stretch % step == 0))
    return found


def gather(rows: datasets.Dataset, cutoffs: Cutoffs) -> Evidence:
    """Of a sample of the rows, whatever the keys leave out."""
    structures = sample(rows)
    checked = check(structures, cutoffs)
    steps = np.array(list(work(structures, checked))).reshape(-1, 4)
    fixed, moved = steps[steps[:, 0] == 0], steps[steps[:, 0] == 1]
    moved = moved[np.isfinite(moved[:, 3])]
    without = np.bincount(structures.structure, ~np.isfinite(structures.forces).all(-1), len(structures)) > 0
    useful = np.flatnonzero(~without & ((checked.flags & BAD) == 0) & (checked.num_edges > 0))
    fitted, held, chosen = PairFit.none(), np.full(2, np.nan), structures.take(useful)
    if len(chosen) >= 4 and np.any(chosen.forces):
        fitted = fit(chosen, check(chosen, cutoffs), cutoffs.largest)
        held = np.array([fitted.held, 3 * chosen.starts[-1] / fitted.num_used])
    return Evidence(
        force_work=products(fixed[:, 1], fixed[:, 2]), stress_work=products(moved[:, 1] - moved[:, 2], moved[:, 3]),
        squeeze=squeeze(structures, checked), bonds=bonds(structures, checked),
        **against(fitted, structures, checked), held=held, pairs=fitted.pairs, energy=fitted.energy, push=fitted.push,
    )  # fmt: skip


def usual(values: np.ndarray) -> np.ndarray:
    """[N]: all but a few (less than a fifth) that are ten times the median."""
    if not len(values):
        return np.zeros(0, bool)
    size = np.abs(values).reshape(len(values), -1).max(1)
    few = size > 10 * np.median(size)
    return ~few if few.mean() < 0.2 else np.ones(len(values), bool)


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """n, a a, a b, b b of what is usual: of these a slope and how well it holds."""
    for which in (0, 1):
        some = usual((a, b)[which])
        a, b = a[some], b[some]
    return np.array([float(len(a)), (a * a).sum(), (a * b).sum(), (b * b).sum()])


def alike(structures: Structures) -> tuple[np.ndarray, np.ndarray]:
    """An order in which structures of the same atoms follow each other, and where both neighbours in it are such."""
    kind = np.unique(element_counts(structures), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(kind, kind="stable")
    return order, np.diff(kind[order]) == 0


def against(fitted: PairFit, structures: Structures, checked: Checked) -> dict[str, np.ndarray]:
    """Energies against those of the pair potentials at the same volume, and shear stress where there is no vacuum."""
    energy, _, virial = fitted.predict(structures, checked)
    order, same = alike(structures)
    sound = (checked.flags[order] & BAD) == 0
    volume, change, expected = checked.volume[order], np.diff(structures.energy[order]), np.diff(energy[order])
    same &= np.isfinite(change) & sound[1:] & sound[:-1]
    same &= np.abs(np.diff(volume)) <= 0.01 * volume[1:]  # what energies owe to the volume alone is not in the forces
    solid = structures.pbc.all(1) & np.isfinite(structures.stress).all((1, 2)) & ((checked.flags & BAD) == 0)
    solid &= checked.gap < VACUUM
    shear, of_pairs = shear_of(structures.stress[solid]), shear_of(virial[solid])
    volume = checked.volume[solid, None, None]
    return {"energy_fit": products(change[same], expected[same]), "shear_fit": products(shear, of_pairs / volume),
            "virial_fit": products(shear, of_pairs)}  # fmt: skip


def squeeze(structures: Structures, checked: Checked) -> np.ndarray:
    """How pressure goes with volume between structures of the same atoms: what is stretched is under tension.

    Not with vacuum, since more of it lets stress fall.
    """
    order, same = alike(structures)
    volume = (checked.volume / np.maximum(structures.num_atoms, 1))[order]
    dv, dp = np.diff(volume), np.diff(np.trace(structures.stress, axis1=1, axis2=2)[order] / 3)
    sound = ((checked.flags & BAD) == 0)[order] & (checked.gap[order] < VACUUM)
    good = same & np.isfinite(dp) & sound[1:] & sound[:-1] & (np.abs(dv) > 1e-3 * volume[1:])
    return products(dv[good], dp[good])


def bonds(structures: Structures, checked: Checked) -> np.ndarray:
    """[pairs, 6]: of each atom's nearest neighbour the distance d and how strongly the two push apart, p (eV/A).

    Pairs that are too near push: within a kind of pair p falls with d, and rises where forces have the wrong sign.
    """
    edges, vectors, distances = checked.edges, checked.vectors, checked.distances
    if checked.num_ends == 2:
        edges, vectors = np.concatenate([edges, edges[::-1]], axis=1), np.concatenate([vectors, -vectors])
        distances = np.concatenate([distances, distances])
    nearest = checked.nearest(checked.distances, len(structures.numbers))
    ties = np.flatnonzero(distances == nearest[edges[0]])
    # Of several that are as near the one in the direction of the largest x, y, z: not the first, which nobody rules.
    ties = ties[np.lexsort((*vectors[ties].T, edges[0][ties]))]
    first = ties[np.flatnonzero(np.diff(edges[0][ties], append=-1))]
    (centre, other), d = edges[:, first], distances[first]
    apart = structures.forces[centre] - structures.forces[other]
    p = -0.5 * np.einsum("ei,ei->e", apart, vectors[first]) / np.maximum(d, 1e-9)
    a, b = np.sort(np.stack([structures.numbers[centre], structures.numbers[other]]).astype(np.int64), axis=0)
    fine = np.isfinite(p) & (d > CLOSE) & ((checked.flags[structures.structure[centre]] & BAD) == 0)
    fine[fine] = usual(p[fine])  # a few repulsive walls do not stand for all bonds
    pairs, place = np.unique((a * NUM_ELEMENTS + b)[fine], return_inverse=True)
    d, p = d[fine], p[fine]
    weights = (np.ones_like(d), d, p, d * d, d * p, p * p)
    return np.stack([np.bincount(place, w, len(pairs)) for w in weights], 1)


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
