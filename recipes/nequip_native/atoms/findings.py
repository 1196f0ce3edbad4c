# SPDX-License-Identifier: Apache-2.0
"""What a survey says of the data, in sentences that name file, frame, key and what to do; and which frames stay."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from atoms.checks import BAD, BITS, KINDS, NEVER, check
from atoms.outliers import FOLLOWED
from atoms.structures import LABELS, structures_of
from atoms.survey import ODD, Survey, solve


Policy = Literal["refuse", "leave_out", "keep"]
STIFFNESS = 1 / 6, 8.0  # of bonds, over the usual one of their length: materials have 0.35 to 4.2
MIXED = 0.4  # correlation below which forces are of other atoms: many different molecules have 0.56
NAMED = 5  # frames that a sentence names
SLOPES = {  # a change of energy over the work of forces that goes with it, and what that means
    23.06: "energies in kcal/mol", 96.49: "energies in kJ/mol", 1 / 27.21: "energies in hartree",
    1 / 23.06: "forces in kcal/mol/A", 51.42: "forces in hartree/bohr", 1 / 0.5292: "lengths in bohr",
    0.5292: "forces in eV/bohr", 1 / 13.606: "energies in Ry", 25.71: "forces in Ry/bohr",
}  # fmt: skip
COARSE_ENERGIES = {23.06: "energies in kcal/mol", 96.49: "energies in kJ/mol", 1 / 27.21: "energies in hartree",
                   1 / 13.606: "energies in Ry", 1000.0: "energies in meV"}  # fmt: skip
COARSE_FORCES = {1 / 23.06: "forces in kcal/mol/A", 1 / 96.49: "forces in kJ/mol/A", 51.42: "forces in hartree/bohr",
                 25.71: "forces in Ry/bohr", 1 / 1000: "forces in meV/A"}  # fmt: skip
FORCE_SIZES = {23.06: "kcal/mol/Ang", 96.49: "kJ/mol/Ang", 1000.0: "meV/Ang", 1 / 51.42: "hartree/bohr"}
STRESS_SLOPES = {1 / 160.2: "GPa", 1 / 1602: "kbar", 1 / 1.602e6: "bar", 1 / 1.602e11: "Pa"}


@dataclass
class Finding:
    """One kind of thing that is wrong, and the rows where it is; none where it is the data as a whole."""

    name: str
    bad: bool
    text: str
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def findings(survey: Survey) -> list[Finding]:
    """All of them, the bad ones first."""
    found = [*of_frames(survey), *of_units(survey), *of_labels(survey)]
    return sorted(found, key=lambda finding: not finding.bad)


def of_frames(survey: Survey) -> list[Finding]:
    """Those of single frames."""
    found = []
    for name, kind in KINDS.items():
        rows = np.flatnonzero(survey.flags & BITS[name])
        if len(rows):
            values = _values(survey, name, rows[:1])
            which = frames(survey, rows)
            key = broken_keys(survey, rows[0]) if name == "not_finite" else kind.key
            text = f"{which} {kind.text.format(value=values[0])} [{key}]; {kind.remedy}."
            if name == "duplicate":
                prints = survey.column("prints")
                first = int(np.flatnonzero(prints == prints[rows[0]])[0])
                origin = survey.rows[first]
                text = text.replace("a frame before it", f"frame {origin['key']} of {origin['source']}")
            if name in ("no_labels", "two_names") and (others := survey.rows[int(rows[0])]["others"]):
                text = f"{text[:-1]}; the file has {others}."
            found.append(Finding(name, kind.bad, text, rows))
    return found


def _values(survey: Survey, name: str, rows: np.ndarray) -> np.ndarray:
    if name in ("energy_outlier", "wrong_energy"):
        return survey.energy_deviation[rows]
    if name == "unlike_energy":
        return survey.energy_misfit[rows]
    if name == "force_outlier":
        return survey.max_force[rows]
    if name in ("turned_forces", "mixed_up_forces"):
        return survey.column("agreement")[rows]
    if name == "other_strength":
        return survey.column("strength")[rows] / survey.usual_strength
    if name == "turned_stress":
        return survey.column("shear_agreement")[rows]
    if name == "other_stress":
        return survey.column("shear_strength")[rows] / survey.usual_shear
    if name in ("duplicate", "two_names"):
        return np.zeros(len(rows))
    structures = structures_of(survey.rows.with_format("arrow")[rows])
    return check(structures, survey.cutoffs, survey.max_neighbors).values[name]


def broken_keys(survey: Survey, row: int) -> str:
    """Which of a structure's labels have a number that is none."""
    structure = structures_of(survey.rows.with_format("arrow")[[int(row)]])
    arrays = {name: getattr(structure, name) for name in ("energy", "forces", "stress")}
    return ", ".join(name for name, array in arrays.items() if not (np.isfinite(array).all() or np.isnan(array).all()))


def frames(survey: Survey, rows: np.ndarray) -> str:
    """As: lips.extxyz, frame 3 (and 4, 7; 12 in all)."""
    some = survey.rows[rows[:NAMED]]
    first = f"{some['source'][0]}, frame {some['key'][0]}"
    if len(rows) == 1:
        return first
    others = [key if source == some["source"][0] else f"{source} {key}"
              for source, key in zip(some["source"][1:], some["key"][1:], strict=True)]  # fmt: skip
    return f"{first} (and {', '.join(others)}; {len(rows):,} of {len(survey.flags):,} in all)"


def _slope(products: np.ndarray, fewest: int = 10) -> tuple[float, float] | None:
    """Of a over b, through zero, and how both go together, from -1 to 1; None where there is too little."""
    number, aa, ab, bb = products
    return (ab / bb, ab / np.sqrt(aa * bb)) if number >= fewest and aa > 0 and bb > 0 else None


def _nearest(slope: float, known: dict[float, str], within: float) -> str | None:
    """The unit with the nearest factor, if it is near enough."""
    factor = min(known, key=lambda one: abs(np.log(abs(slope) / one)))
    return known[factor] if abs(np.log(abs(slope) / factor)) < within else None


def likely(slope: float, known: dict[float, str]) -> str | None:
    """The unit whose factor is within 5%; or else all within 35%, the nearest first: some differ by a tenth only."""
    far = {unit: abs(np.log(abs(slope) / factor)) for factor, unit in known.items()}
    units = sorted((unit for unit in far if far[unit] < 0.3), key=far.__getitem__)
    return " or ".join(units[:1] if units and far[units[0]] < 0.05 else units) or None


def of_units(survey: Survey) -> list[Finding]:
    """Units and signs, by what must hold between energies, forces, stress and distances."""
    forces = of_forces(survey)
    return [*forces, *of_stress(survey, bool(forces))]


GRADIENTS = "[forces]; they may be gradients: +dataset.units.forces=-eV/Ang."


def of_forces(survey: Survey) -> list[Finding]:
    """Forces against energies, and against what bonds do."""
    seen = survey.evidence
    found, steps, (within, stiffness) = [], _slope(seen.force_work), _bonds(seen.bonds)
    if steps and abs(steps[1]) < 0.5:
        text = "Energies of consecutive frames change without regard to the forces (correlation "
        text += f"{steps[1]:.2f}) [energy, forces]; look for energies or forces of other frames."
        found.append(Finding("unlike_work", False, text))
    steps = steps if steps and abs(steps[1]) > (0.9 if abs(np.log(abs(steps[0]))) > 1.5 else 0.97) else None
    fitted = _slope(seen.energy_fit) if seen.held[0] > FOLLOWED else None
    soft, hard = STIFFNESS
    stiff = stiffness is not None and abs(within) > 0.3 and not soft < abs(stiffness) < hard
    if _many(survey, "turned_forces", "other_strength"):
        return found  # of two kinds; what all together say means nothing
    if steps and steps[0] < 0:
        text = "Forces have the wrong sign: between consecutive frames the energy falls where it should rise "
        found.append(Finding("force_sign", True, text + GRADIENTS))
    elif within is not None and within > 0.3 and not steps and not (fitted and fitted[1] > 0.6):
        sure = within > 0.5 or (fitted is not None and fitted[1] < -0.6)
        text = "Forces seem to have the wrong sign: the closer two neighbours are, the more they attract each other "
        found.append(Finding("force_sign", sure, text + GRADIENTS))
    elif fitted and fitted[1] < -0.6 and not steps:
        text = "Energies seem to have the wrong sign: they fall where pair potentials fitted to the forces rise "
        text += "[energy]; +dataset.units.energy=-eV +dataset.units.forces=eV/Ang."
        found.append(Finding("energy_sign", fitted[1] < -0.8, text))
    if steps and abs(np.log(abs(steps[0]))) > 0.25:
        guess = likely(steps[0], SLOPES)
        text = f"Energies change {abs(steps[0]):.3g} times as much between frames as the forces say [energy, forces]; "
        text += f"as with {guess}: " if guess else ""
        found.append(Finding("force_units", True, text + "set +dataset.units.energy=..., forces or length."))
    elif fitted and not steps and abs(fitted[1]) > 0.6 and abs(np.log(abs(fitted[0]))) > np.log(5):
        alone = {1 / float(np.median(survey.atoms)): "energies per atom"}
        guess = _nearest(fitted[0], COARSE_FORCES if stiff else COARSE_ENERGIES | alone, 0.8)
        text = f"Energies change about {abs(fitted[0]):.2g} times as much between frames as in pair potentials "
        text += "fitted to the forces [energy, forces]; " + (f"as with {guess}: " if guess else "")
        found.append(Finding("force_units", True, text + "set +dataset.units.energy=... or forces."))
    elif stiff:
        unit = _nearest(stiffness, FORCE_SIZES, 3.0)
        text = f"By these forces bonds are {abs(stiffness):.2g} times as stiff as others of their length [forces]; "
        text += f"as with forces in {unit}: +dataset.units.forces={unit}; are energies in eV?"
        found.append(Finding("force_units", not soft / 2 < abs(stiffness) < 2 * hard, text))
    if 0 <= seen.held[0] < MIXED and seen.held[1] > 20:  # components for each coefficient
        text = (
            f"Forces hardly follow the distances of the atoms (correlation {seen.held[0]:.2f}) [forces]; look for a "
        )
        text += "mixed-up order of atoms, wrong elements, or frames with forces of another sign or unit."
        found.append(Finding("mixed_up_data", False, text))
    return found


def _many(survey: Survey, *kinds: str) -> bool:
    """Whether more than a tenth of the frames are of these kinds."""
    return bool(np.mean((survey.flags & sum(BITS[name] for name in kinds)) > 0) > 0.1)


def of_stress(survey: Survey, forces_are_odd: bool) -> list[Finding]:
    """Stress against the energy of strained frames, the forces, and the volume, and by its size."""
    seen = survey.evidence
    told = "[stress]; ASE's is +dE/d(strain)/V, under tension positive: +dataset.units.stress=-eV/Ang^3."
    steps, squeezed = _slope(seen.stress_work), _slope(seen.squeeze, 20)
    if _many(survey, "turned_forces", "other_strength", "turned_stress", "other_stress"):
        return []
    fitted = _slope(seen.shear_fit, 4) if seen.held[0] > FOLLOWED and not forces_are_odd else None
    if steps and abs(steps[1]) > (0.9 if abs(np.log(abs(steps[0]))) > 1.5 else 0.97):
        return _wrong_stress(steps[0], 0.25, STRESS_SLOPES, "the energy of strained frames says", 0.15)
    if fitted and abs(fitted[1]) > 0.6:
        factors, slope = {1 / factor: unit for factor, unit in STRESS_SLOPES.items()}, fitted[0]
        of_virial = _slope(seen.virial_fit, 4)
        far = abs(np.log(abs(slope))) > np.log(5)
        if (
            far
            and of_virial
            and abs(np.log(abs(of_virial[0]))) < min(abs(np.log(abs(slope) / one)) for one in factors)
        ):
            text = (
                f"Stress is about {slope:.2g} times what the forces say, as a virial in eV would be [stress]; if so: "
            )
            way = "+dataset.label_keys.virial=KEY" if slope < 0 else "divide it by the volume of the cell"
            return [Finding("stress_units", True, f"{text}{way}.")]
        return _wrong_stress(1 / slope, np.log(5), STRESS_SLOPES, "the forces say", 1.1)
    found = []
    if squeezed is not None and squeezed[1] < -0.5:
        text = f"Stress seems to have the wrong sign: it falls as the cell grows {told}"
        found.append(Finding("stress_sign", squeezed[1] < -0.7, text))
    if (survey.flags & (BITS["turned_stress"] | BITS["other_stress"])).any():
        return found
    rms = np.sqrt(float(survey.total("stress_squares")) / max(9 * float(survey.total("stresses")), 1))
    if rms > 0.3:
        unit = "GPa" if rms < 60 else "kbar"
        text = f"Stress of {rms:.3g} eV/A^3 (root mean square; {rms * 160.2:,.0f} GPa) is more than materials usually "
        text += f"bear [stress]; if it is in {unit}: +dataset.units.stress={unit}."
        found.append(Finding("stress_units", rms > 2, text))
    return found


def _wrong_stress(slope: float, unlike: float, known: dict[float, str], by: str, within: float) -> list[Finding]:
    """Where what is right is `slope` times the label, and that is `unlike` 1 or below 0."""
    unit = "eV/Ang^3" if abs(np.log(abs(slope))) <= unlike else _nearest(slope, known, within)
    if slope > 0 and unit == "eV/Ang^3":
        return []
    what = f"Stress is {'about ' if unlike > 1 else ''}{1 / slope:.3g} times what {by} [stress]; "
    what += "its sign is wrong: ASE's is +dE/d(strain)/V, under tension positive; " if slope < 0 else ""
    way = f"as with {'-' if slope < 0 else ''}{unit}: +dataset.units.stress={'-' if slope < 0 else ''}{unit}."
    name = "stress_sign" if unit == "eV/Ang^3" else "stress_units"
    return [Finding(name, True, what + (way if unit else "set +dataset.units.stress=..."))]


def _bonds(bonds: np.ndarray) -> tuple[float | None, float | None]:
    """How distance and push go together within each kind of pair, from -1 to 1, and the stiffness over a usual one."""
    bonds = bonds[bonds[:, 0] > 10] if len(bonds) else bonds
    if not len(bonds) or bonds[:, 0].sum() < 80:
        return None, None
    n, d, p, dd, dp, pp = bonds.T
    together, of_d, of_p = dp - d * p / n, dd - d * d / n, pp - p * p / n
    if not (of_d.sum() > 0 and of_p.sum() > 0):
        return None, None
    usual = 30 * np.exp(-1.55 * (d / n - 1.1))  # eV/A^2, from C-H over metals to argon within a factor of four
    return together.sum() / np.sqrt(of_d.sum() * of_p.sum()), together.sum() / (usual * of_d).sum()


def of_labels(survey: Survey) -> list[Finding]:
    """Energies that do not grow with the structure, and labels that some frames lack."""
    found = []
    normal, number = survey.total("normal"), float(survey.total("energies"))
    if number > 20:
        squares = float(survey.total("energy_squares"))
        whole, rank = solve(normal, survey.total("right"))
        share, _ = solve(survey.total("share_normal"), survey.total("share_right"))
        rest = max(squares - float(whole @ survey.total("right")), 1e-12 * squares)
        of_share = max(squares - float(share @ survey.total("share_right")), 1e-12 * squares)
        better = number > 2 * rank and of_share < 0.3 * rest and rest > 1e-9 * squares
        better = better or (of_share < rest and stays_flat(survey.total("growth")))
        # A few high energies, as of dimers beside crystals, rule the squares but not the medians.
        better = better and survey.usual_residual(share, True) < 2 * survey.usual_residual(whole, False)
        if better and not of_totals(survey):
            text = "Energies do not grow with the number of atoms, as if they were energies per atom [energy]; "
            found.append(Finding("not_extensive", True, text + "give the total energy of each structure."))
    sound = int(((survey.flags & BAD) == 0).sum())
    for label in LABELS:
        rows = survey.lacking(label)
        if 0 < len(rows) < sound:
            has, they = ("has", "it trains on its") if len(rows) == 1 else ("have", "they train on their")
            text = f"{frames(survey, rows)} {has} no {label} [{label}]; {they} other labels."
            found.append(Finding(f"no_{label}", False, text))
    return found


def of_totals(survey: Survey) -> bool:
    """Whether energies change as much as forces say, so that they are no energies per atom."""
    seen, number = survey.evidence, float(np.median(survey.atoms))
    steps, fitted = _slope(seen.force_work), _slope(seen.energy_fit) if seen.held[0] > FOLLOWED else None
    return any(
        one is not None and one[1] > least and abs(np.log(one[0])) < abs(np.log(one[0] * number))
        for one, least in ((steps, 0.97), (fitted, 0.6))
    )


def stays_flat(sums: np.ndarray) -> bool:
    """Whether the energy's size grows by less than the root of the number of atoms, and that beyond doubt."""
    n, x, xx, y, xy, yy = sums
    spread = xx - x * x / max(n, 1)
    if n < 30 or spread < 0.01 * n:
        return False
    slope = (xy - x * y / n) / spread
    error = np.sqrt(max(yy - y * y / n - slope**2 * spread, 0.0) / (n - 2) / spread)
    return slope < 0.5 and slope + 3 * error < 1


def judge(section: str, survey: Survey, bad_frames: Policy, odd_frames: Policy) -> tuple[np.ndarray, list[str]]:
    """Which rows stay, and what is to be said. Raises ValueError, with all that is wrong, where a key says refuse."""
    kept, notes, refused = np.ones(len(survey.flags), bool), [], []
    for mask, policy, name in ((BAD, bad_frames, "bad"), (ODD, odd_frames, "odd")):
        hit = (survey.flags & mask) > 0
        if policy == "leave_out" and hit.any():
            kept &= ~hit
            number = f"{section}: {int(hit.sum()):,} of {len(hit):,} structures are left out"
            notes.append(f"{number} ({section}.{name}_frames=leave_out).")
    if bad_frames == "keep" and ((survey.flags & NEVER) > 0).any():
        row = np.flatnonzero(survey.flags & NEVER)
        raise ValueError(f"{section}.bad_frames=keep: {frames(survey, row)} cannot be kept; leave_out would do.")
    for finding in findings(survey):
        finding.text = finding.text.replace("+dataset.", f"+{section}.")  # a file may be named dataset.xyz
        policy = bad_frames if finding.bad else odd_frames
        whole = len(finding.rows) == 0
        if policy == "refuse" or (policy == "leave_out" and whole and finding.bad):
            refused.append(finding)
        else:
            notes.append(f"{section}: {finding.text}")
    if refused:
        listed = " ".join(f"({i}) {finding.text}" for i, finding in enumerate(refused, 1))
        keys = sorted({f"{section}.{'bad' if finding.bad else 'odd'}_frames" for finding in refused})
        can = "leave_out" if all(len(finding.rows) for finding in refused) else "keep"
        raise ValueError(
            f"{section}: {listed} To {'leave such frames out' if can == 'leave_out' else 'train all the same'}: "
            f"{' '.join(f'{key}={can}' for key in keys)}; python inspect_data.py shows all."
        )
    if not kept.any():
        raise ValueError(f"{section}: no structure is left; python inspect_data.py says what is wrong with them.")
    return kept, notes
