# SPDX-License-Identifier: Apache-2.0
"""What a survey says of the data, in sentences that name file, frame, key and what to do; and which frames stay."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from atoms.checks import BAD, BITS, KINDS, LABELS, NEVER, check
from atoms.structures import structures_of
from atoms.survey import ODD, Survey, solve


Policy = Literal["refuse", "leave_out", "keep"]
STIFFNESS = 0.3, 120.0  # eV/A^2 of bonds: softer than metals, harder than a triple bond
NAMED = 5  # frames that a sentence names
SLOPES = {  # a change of energy over the work of forces that goes with it, and what that means
    23.06: "energies in kcal/mol", 96.49: "energies in kJ/mol", 1 / 27.21: "energies in hartree",
    1 / 23.06: "forces in kcal/mol/A", 51.42: "forces in hartree/bohr", 1 / 0.5292: "lengths in bohr",
    0.5292: "forces in eV/bohr", 1 / 13.606: "energies in Ry", 25.71: "forces in Ry/bohr",
}  # fmt: skip
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
            if name == "no_labels" and (others := survey.rows[int(rows[0])]["others"]):
                text = f"{text[:-1]}; the file has {others}."
            found.append(Finding(name, kind.bad, text, rows))
    return found


def _values(survey: Survey, name: str, rows: np.ndarray) -> np.ndarray:
    if name == "energy_outlier":
        return survey.energy_deviation[rows]
    if name == "force_outlier":
        return survey.max_force[rows]
    if name == "turned_forces":
        return survey.column("agreement")[rows]
    if name == "duplicate":
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
    """Of a over b, through zero, and the square of how well it holds; None where there is too little."""
    number, aa, ab, bb = products
    return (ab / bb, ab * ab / (aa * bb)) if number >= fewest and aa > 0 and bb > 0 else None


def _nearest(slope: float, known: dict[float, str]) -> str | None:
    return next((text for factor, text in known.items() if abs(np.log(abs(slope) / factor)) < 0.15), None)


def of_units(survey: Survey) -> list[Finding]:
    """Units and signs, by what must hold between energies, forces, stress and distances."""
    return [*of_forces(survey), *of_stress(survey), *of_lengths(survey)]


GRADIENTS = "[forces]; they are gradients perhaps: +dataset.units.forces=-eV/Ang."


def of_forces(survey: Survey) -> list[Finding]:
    """Forces against energies, and against what bonds do."""
    found, fit, (within, stiffness) = [], _slope(survey.total("force_work")), _bonds(survey.bonds())
    if fit and fit[1] > 0.8:
        if fit[0] < 0:
            text = (
                "Forces have the wrong sign: between frames that follow each other the energy falls where it should "
            )
            found.append(Finding("force_sign", True, text + "rise " + GRADIENTS))
        if abs(np.log(abs(fit[0]))) > 0.25:
            guess = _nearest(fit[0], SLOPES)
            text = (
                f"Energies change {abs(fit[0]):.3g} times as much between frames as the forces say [energy, forces]; "
            )
            text += f"as with {guess}: " if guess else ""
            found.append(Finding("force_units", True, text + "set +dataset.units.energy=..., forces or length."))
    elif within is not None and within > 0.3:
        text = "Forces seem to have the wrong sign: neighbours nearer than others pull each other closer "
        found.append(Finding("force_sign", within > 0.5, text + GRADIENTS))
    soft, hard = STIFFNESS
    if stiffness and not soft < abs(stiffness) < hard and not any(finding.name == "force_units" for finding in found):
        amount, unit = ("more", "kcal/mol/Ang") if abs(stiffness) > hard else ("less", "hartree/bohr")
        text = f"By these forces bonds are {abs(stiffness):.3g} eV/A^2 stiff, {amount} than most [forces]; if in "
        found.append(Finding("force_units", False, f"{text}{unit}: +dataset.units.forces={unit}; are energies in eV?"))
    return found


def of_stress(survey: Survey) -> list[Finding]:
    """Stress against the energy of strained frames, against volume and heat, and by its size."""
    found, fit = [], _slope(survey.total("stress_work"))
    told = "[stress]; ASE's is +dE/d(strain)/V, under tension positive: +dataset.units.stress=-eV/Ang^3."
    squeezed, heated = _together(survey.total("squeeze"), 20), _together(survey.total("heat"), 20)
    if fit and fit[1] > 0.8:
        if fit[0] < 0:
            found.append(
                Finding(
                    "stress_sign", True, f"Stress has the wrong sign: the energy falls where it should rise {told}"
                )
            )
        if abs(np.log(abs(fit[0]))) > 0.25:
            unit = _nearest(fit[0], STRESS_SLOPES)
            guess = f"as with stress in {unit}: +dataset.units.stress={'-' if fit[0] < 0 else ''}{unit}."
            text = f"Energies change {abs(fit[0]):.3g} times as much between strained frames as stress says [stress]; "
            found.append(Finding("stress_units", True, text + (guess if unit else "set +dataset.units.stress=...")))
        return found
    if squeezed is not None and squeezed < -0.5:
        text = f"Stress seems to have the wrong sign: it falls as the cell grows {told}"
        found.append(Finding("stress_sign", squeezed < -0.7, text))
    elif heated is not None and heated > 0.5 and squeezed is None:
        text = f"Stress seems to have the wrong sign: it rises with the energy {told}"
        found.append(Finding("stress_sign", False, text))
    rms = np.sqrt(float(survey.total("stress_squares")) / max(9 * float(survey.total("stresses")), 1))
    if rms > 0.3:
        unit = "GPa" if rms < 60 else "kbar"
        text = f"Stress of {rms:.3g} eV/A^3 (root mean square; {rms * 160.2:,.0f} GPa) is more than materials usually "
        text += f"bear [stress]; if it is in {unit}: +dataset.units.stress={unit}."
        found.append(Finding("stress_units", rms > 2, text))
    return found


def of_lengths(survey: Survey) -> list[Finding]:
    """Distances against covalent radii."""
    ratios = survey.total("ratios")
    median = float(np.searchsorted(np.cumsum(ratios), ratios.sum() / 2)) * 0.02
    if ratios.sum() < 50 or median < 1.6:
        return []
    text = f"Nearest neighbours are {median:.2f} times the sum of their covalent radii apart [positions]; if lengths "
    return [Finding("length_units", False, text + "are in bohr: +dataset.units.length=bohr.")]


def _together(products: np.ndarray, fewest: int) -> float | None:
    """How two things change together, from -1 to 1."""
    number, aa, ab, bb = products
    return ab / np.sqrt(aa * bb) if number >= fewest and aa > 0 and bb > 0 else None


def _bonds(bonds: np.ndarray) -> tuple[float | None, float | None]:
    """How distance and push go together within each kind of pair, from -1 to 1, and the stiffness (eV/A^2)."""
    bonds = bonds[bonds[:, 0] > 20] if len(bonds) else bonds
    if not len(bonds) or bonds[:, 0].sum() < 200:
        return None, None
    n, d, p, dd, dp, pp = bonds.T
    together, of_d, of_p = (dp - d * p / n).sum(), (dd - d * d / n).sum(), (pp - p * p / n).sum()
    return (together / np.sqrt(of_d * of_p), together / of_d) if of_d > 0 and of_p > 0 else (None, None)


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
        if better or (of_share < rest and stays_flat(survey.total("growth"))):
            text = "Energies do not grow with the number of atoms, as if they were energies an atom [energy]; "
            found.append(Finding("not_extensive", True, text + "give the total energy of each structure."))
    sound = int(((survey.flags & BAD) == 0).sum())
    for label in LABELS:
        rows = survey.lacking(label)
        if 0 < len(rows) < sound:
            has, they = ("has", "it trains on its") if len(rows) == 1 else ("have", "they train on their")
            text = f"{frames(survey, rows)} {has} no {label} [{label}]; {they} other labels."
            found.append(Finding(f"no_{label}", False, text))
    return found


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
        finding.text = finding.text.replace("dataset.", f"{section}.")
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
