# SPDX-License-Identifier: Apache-2.0
"""Which frames have energies or forces unlike those of nearly all others; `flags` of a survey get their bits."""

from collections.abc import Callable

import numpy as np

from atoms.checks import BAD, BITS


OUTLIER, LEAST_OUTLIER = 12.0, 0.5  # median deviations of the energy per atom, and eV per atom
UNLIKE = 20.0  # median deviations from the energies of pair potentials
LEAST_GAP, WRONG = 0.2, 20.0  # eV per atom: between heaps of energies, and more than elements can explain
FORCE_OUTLIER, LEAST_FORCE = 12.0, 10.0  # times the median of the frames' largest forces, and eV/A
FOLLOWED = 0.6  # correlation with the forces of pair potentials where these can be asked
TURNED, MIXED_UP = -0.5, 0.15  # of a frame: forces of the wrong sign, or of other atoms
EVIDENCE = 6  # forces of different size in a frame: the one of a dimer can have any sign and strength
TURNED_SHEAR = -0.9  # correlation of a frame's shear stress with that of pair potentials, for the wrong sign
OTHER_UNIT, GAP = 8.0, 3.0  # times as strong forces for the same distances: of heaps, and of the gap between them


def heaps_of(values: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The widest gap between values, and the places of those below and above; NaN are in neither."""
    order = np.argsort(values, kind="stable")[: np.isfinite(values).sum()]
    gaps = np.diff(values[order])
    return (float(gaps.max()), np.split(order, [int(gaps.argmax()) + 1])) if len(gaps) > 2 else (0.0, [order, order])


def mark_energies(survey) -> None:
    """By the energies of their elements; and by pair potentials, where they tell energies well."""
    deviation, misfit, flags = survey.energy_deviation, survey.energy_misfit, survey.flags
    if np.isfinite(deviation).sum() <= 10:
        return
    usual = np.nanmedian(np.abs(deviation))
    odd = np.abs(deviation) > max(OUTLIER * 1.4826 * usual, LEAST_OUTLIER)
    odd[of_two_levels(deviation)] = True
    # Where atoms nearly touch energies have no upper bound, but the forces, in eV/A, then exceed those per atom.
    wrong = odd & (np.abs(deviation) > WRONG) & ((deviation < 0) | (deviation > survey.max_force))
    flags[wrong] |= BITS["wrong_energy"]
    flags[odd & ~wrong] |= BITS["energy_outlier"]
    if survey.evidence.held[0] > FOLLOWED:
        unlike, rest = np.zeros(len(odd), bool), np.nanmedian(np.abs(misfit))
        unlike[of_two_levels(misfit)] = True
        if rest < 0.3 * usual:
            change = np.abs(deviation) + np.abs(deviation - misfit)
            unlike |= np.abs(misfit) > np.maximum(0.5 * change, max(UNLIKE * 1.4826 * rest, 1e-3))
        flags[unlike & ~odd] |= BITS["unlike_energy"]


def of_two_levels(deviation: np.ndarray) -> np.ndarray:
    """The smaller of two heaps of energies with a wide gap between them, as of two levels of theory or units."""
    gap, heaps = heaps_of(deviation)
    small, large = sorted(heaps, key=len)
    return small if gap > max(LEAST_GAP, 3 * np.ptp(deviation[small]), 3 * np.ptp(deviation[large])) else small[:0]


def mark_forces(survey) -> None:
    """By their size; and by their direction and strength, as pair potentials have them for the same distances."""
    flags, strongest = survey.flags, survey.max_force
    usual = np.median(strongest[strongest > 0]) if (strongest > 0).any() else 0.0
    flags[strongest > max(FORCE_OUTLIER * usual, LEAST_FORCE)] |= BITS["force_outlier"]
    agreement, misfit = survey.column("agreement"), survey.column("misfit")
    known, number = agreement > 0.3, survey.column("independent")
    sure = number >= EVIDENCE
    if survey.evidence.held[0] > FOLLOWED and known.any():
        unlike = misfit / max(np.median(misfit[known]), 1e-6)
        against, (_, aa, ab, bb) = (agreement < TURNED) & (unlike > 2), survey.evidence.energy_fit
        turned = against & sure
        if turned.mean() > 0.4 and ab < -FOLLOWED * np.sqrt(aa * bb):
            turned = (agreement > -TURNED) & sure  # of two halves it is the other that goes against the energies
        mixed = ((np.abs(agreement) < MIXED_UP) & (unlike > 1.8)) | ((np.abs(agreement) < FOLLOWED) & (unlike > 6))
        mixed = (mixed | against) & (number > 2) & ~turned
        flags[turned] |= BITS["turned_forces"]
        if mixed.sum() <= max(0.1 * len(flags), 1):
            flags[mixed & ((flags & BAD) == 0)] |= BITS["mixed_up_forces"]
    # Where next to none are predicted, as after a relaxation, forces have any size beside them.
    told = sure & (np.abs(agreement) > FOLLOWED)
    strength = survey.column("strength")
    with np.errstate(invalid="ignore", divide="ignore"):
        predicted = misfit / np.sqrt(np.maximum((strength / agreement) ** 2 - 2 * strength + 1, 1e-12))
    usual = np.median(predicted[told]) if told.any() else 0.0
    small, survey.usual_strength = _other_unit(strength, told, len)
    few = len(small) < 0.25 * told.sum()
    clear = (predicted[small] > 0.7 * usual) | (agreement[small] > 0.9)
    flags[small[clear] if few else small] |= BITS["other_strength"]
    shear, size = survey.column("shear_agreement"), survey.column("shear")
    told &= np.isfinite(shear) & (size > 0.2 * np.median(size[size > 0]) if (size > 0).any() else False)
    if told.sum() > 3 and np.median(np.abs(shear[told])) > 0.9:
        # A sign that most have is taken as right here; whether it is, is asked of the data as a whole.
        most = -1.0 if np.mean(shear[told] < 0) > 0.6 else 1.0
        flags[told & (shear * most < TURNED_SHEAR)] |= BITS["turned_stress"]
        told &= np.abs(shear) > FOLLOWED
        # Of shear that forces give the size is known; of forces it is that of most.
        strength = survey.column("shear_strength")
        other, survey.usual_shear = _other_unit(strength, told, lambda heap: -abs(np.log(_size(strength[heap]))))
        flags[other] |= BITS["other_stress"]


def _size(strength: np.ndarray) -> float:
    """As usual in a heap."""
    return float(np.median(np.abs(strength)))


def _other_unit(
    strength: np.ndarray, told: np.ndarray, weight: Callable[[np.ndarray], float]
) -> tuple[np.ndarray, float]:
    """Units are heaps with a gap between them: the rows of that with less `weight`, and the median of the other."""
    gap, heaps = heaps_of(np.log(np.where(told, np.maximum(np.abs(strength), 1e-30), np.nan)))
    sizes = [_size(strength[heap]) if len(heap) else 1.0 for heap in heaps]
    if gap < np.log(GAP) or sizes[1] < OTHER_UNIT * sizes[0]:
        return np.zeros(0, np.int64), 1.0
    small, large = sorted(heaps, key=weight)
    return small, float(np.median(strength[large]))
