# SPDX-License-Identifier: Apache-2.0
"""Each kind of damage is found, named by file, frame and key, and told what to do; sound data is left in peace."""

import numpy as np
import pytest
from ase.build import bulk, molecule
from looked_at import look, names, relabel, walk
from structure_files import labelled, with_labels, write

from atoms.arrow_cache import open_structures
from atoms.findings import SLOPES, findings, judge, likely
from atoms.label_names import Options
from atoms.neighbours import Cutoffs
from atoms.survey import survey


def test_sound_data(tmp_path, distributed):
    assert not findings(look(labelled(40), tmp_path, distributed))
    assert not findings(look(walk(), tmp_path, distributed))
    assert not findings(look(walk(cells=True), tmp_path, distributed))
    rows = open_structures("dataset", {"path": "structures", "data_files": str(tmp_path / "mine.extxyz")})
    for cutoffs, most in ((Cutoffs(5.0), 6), (Cutoffs(5.0, {"Cu-Al": 2.8, "Al-Cu": 4.0}), None)):
        assert not findings(survey(distributed, "dataset", rows, cutoffs, most))


@pytest.mark.parametrize("name", ["lips_150.extxyz", "oqmd_200.extxyz"])
def test_real_data(name, real_structures, distributed):
    options = {"label_keys": {"energy": "formation_energy_per_atom"}} if "oqmd" in name else {}
    rows = open_structures("dataset", {"path": "structures", "data_files": real_structures(name)}, **options)
    found = [finding.name for finding in findings(survey(distributed, "dataset", rows, Cutoffs(5.0)))]
    assert found == (["not_extensive"] if "oqmd" in name else [])


def close(atoms):
    atoms.positions[1] = atoms.positions[0] + [0.3, 0, 0]


def fractional(atoms):
    atoms.positions = atoms.get_scaled_positions()


def not_finite(atoms):
    atoms.calc.results["forces"][2, 1] = np.nan


def no_geometry(atoms):
    atoms.positions[3, 1] = np.inf


def left_handed(atoms):
    atoms.cell[:] = atoms.cell.array[[1, 0, 2]]


def without_cell(atoms):
    atoms.cell[2] = 0


def not_periodic(atoms):
    atoms.pbc = False


def unbalanced(atoms):
    atoms.calc.results["forces"][:10] = 0


def dense(atoms):
    atoms.set_cell(atoms.cell.array / 5)


def outlier(atoms):
    atoms.calc.results["energy"] += 60


def strong(atoms):
    atoms.calc.results["forces"][3] = [300, 0, 0]
    atoms.calc.results["forces"][4] = [-300, 0, 0]


def unlabelled(atoms):
    atoms.calc = None


DAMAGE = {
    "close_atoms": (close, True, "positions"), "fractional": (fractional, True, "positions"),
    "not_finite": (not_finite, True, "forces"), "no_geometry": (no_geometry, True, "positions, cell"),
    "left_handed": (left_handed, False, "cell"),
    "pbc_without_cell": (without_cell, True, "pbc"), "cell_without_pbc": (not_periodic, False, "pbc"),
    "net_force": (unbalanced, False, "forces"), "dense": (dense, True, "cell"),
    "energy_outlier": (outlier, False, "energy"), "force_outlier": (strong, False, "forces"),
    "no_labels": (unlabelled, True, "energy, forces"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name, tmp_path, distributed):
    damage, bad, key = DAMAGE[name]
    frames = labelled(30)
    damage(frames[7])
    damage(frames[21])
    found = look(frames, tmp_path, distributed)
    finding = names(found)[name]
    assert finding.bad == bad and finding.rows.tolist() == [7, 21]
    assert "mine.extxyz, frame 7 (and 21; 2 of 30 in all)" in finding.text and f"[{key}]" in finding.text
    policies = {"bad_frames": "keep", "odd_frames": "keep"}
    which = "bad_frames" if bad else "odd_frames"
    if name in ("no_geometry", "pbc_without_cell"):
        with pytest.raises(ValueError, match=r"frame 7 .* cannot be kept; leave_out would do"):
            judge("dataset", found, **policies)
    else:
        kept, _ = judge("dataset", found, **policies)
        assert kept.all()
    kept, notes = judge("dataset", found, **policies | {which: "leave_out"})
    assert np.flatnonzero(~kept).tolist() == [7, 21]
    assert any(f"2 of 30 structures are left out (dataset.{which}=leave_out)" in note for note in notes)
    with pytest.raises(ValueError, match=f"frame 7 .*dataset.{which}=leave_out"):
        judge("dataset", found, **policies | {which: "refuse"})


def test_copies(tmp_path, distributed):
    frames = labelled(12)
    moved = with_labels(frames[4])
    moved.positions += 1.0  # the same structure, from another origin
    finding = names(look([*frames, moved], tmp_path, distributed))["duplicate"]
    assert finding.rows.tolist() == [12] and "as frame 4 of mine.extxyz" in finding.text


def test_energies_by_two_names(tmp_path, distributed):
    frames = labelled(12)
    frames[4].info["REF_energy"] = frames[4].calc.results["energy"] + 1.0
    frames[5].info["REF_energy"] = frames[5].calc.results["energy"]
    found = look(frames, tmp_path, distributed)
    finding = names(found)["two_names"]
    assert finding.rows.tolist() == [4] and "the file has REF_energy." in finding.text and not finding.bad
    assert found.rows[4]["energy"] == frames[4].calc.results["energy"]
    assert Options("dataset").also("energy", {"energy": np.nan, "REF_energy": np.nan}) == []
    options = {"label_keys": {"energy": "REF_energy"}}
    assert "two_names" not in names(look(frames, tmp_path, distributed, **options))


def test_no_neighbours(tmp_path, distributed):
    far = molecule("H2O")
    far.positions *= 9
    found = names(look([*labelled(3), with_labels(far, stress=False)], tmp_path, distributed))
    assert found["no_neighbours"].rows.tolist() == [3] and "within the cutoff of 4 A" in found["no_neighbours"].text
    lonely = labelled(1)[0]
    lonely.pbc = False
    lonely.positions[0] += 50
    found = names(look([*labelled(3), relabel(lonely)], tmp_path, distributed))
    assert found["lonely_atom"].rows.tolist() == [3]


def test_a_file_keeps_its_name(tmp_path, distributed):
    frames = labelled(3)
    path = write([a.copy() for a in frames], tmp_path / "dataset.extxyz")
    rows = open_structures("validation", {"path": "structures", "data_files": path})
    with pytest.raises(ValueError, match=r"dataset\.extxyz, frame 0 .*\+validation\.label_keys\.energy"):
        judge("validation", survey(distributed, "validation", rows, Cutoffs(4.0)), "refuse", "keep")


def test_energies_an_atom(tmp_path, distributed):
    frames = [relabel(a, energy=a.calc.results["energy"] / len(a) - 3.0) for a in labelled(60)]
    finding = names(look(frames, tmp_path, distributed))["not_extensive"]
    assert finding.bad and "total energy" in finding.text


@pytest.mark.parametrize("frames", [labelled(30), walk()], ids=["any", "walk"])
def test_gradients_for_forces(frames, tmp_path, distributed):
    frames = [relabel(a, forces=-a.calc.results["forces"]) for a in frames]
    finding = names(look(frames, tmp_path, distributed))["force_sign"]
    assert finding.bad and "dataset.units.forces=-eV/Ang" in finding.text
    assert "force_sign" not in names(look(frames, tmp_path, distributed, units={"forces": "-eV/Ang"}))


@pytest.mark.parametrize(("energy", "forces", "words"), [(23.06, 1, "kcal/mol"), (1, 1 / 51.42, "hartree/bohr")])
def test_units_of_energies_and_forces(energy, forces, words, tmp_path, distributed):
    frames = [
        relabel(a, energy=energy * a.calc.results["energy"], forces=forces * a.calc.results["forces"]) for a in walk()
    ]
    finding = names(look(frames, tmp_path, distributed))["force_units"]
    assert finding.bad and words in finding.text


def test_units_that_are_much_alike_are_both_named():
    assert likely(1 / 23.1, SLOPES) == "forces in kcal/mol/A"
    assert likely(-0.0339, SLOPES) == "energies in hartree or forces in kcal/mol/A"
    assert likely(5.0, SLOPES) is None


@pytest.mark.parametrize(("factor", "unit"), [(23.06, "kcal/mol/Ang"), (1 / 51.42, "hartree/bohr")])
def test_units_of_forces_without_steps(factor, unit, tmp_path, distributed):
    frames = [relabel(a, forces=factor * a.calc.results["forces"]) for a in labelled(30)]
    finding = names(look(frames, tmp_path, distributed))["force_units"]
    assert finding.bad and f"dataset.units.forces={unit}" in finding.text


@pytest.mark.parametrize(("factor", "unit"), [(160.2177, "GPa"), (-1602.177, "-kbar"), (-1.0, "-eV/Ang^3")])
def test_units_and_sign_of_stress(factor, unit, tmp_path, distributed):
    frames = [relabel(a, stress=factor * a.calc.results["stress"]) for a in walk(cells=True)]
    found = names(look(frames, tmp_path, distributed))
    told = [found[name] for name in ("stress_sign", "stress_units") if name in found]
    assert (
        told and all(finding.bad for finding in told) and any(f"dataset.units.stress={unit}" in f.text for f in told)
    )
    assert not findings(look(frames, tmp_path, distributed, units={"stress": unit}))


def test_sign_of_stress_without_steps(tmp_path, distributed):
    random, frames = np.random.default_rng(0), []
    for _ in range(40):
        atoms = bulk("Cu", cubic=True) * (2, 2, 1)
        atoms.set_cell(atoms.cell.array * (1 + random.normal(0, 0.03)), scale_atoms=True)
        atoms.positions += random.normal(0, 0.2, atoms.positions.shape)
        frames.append(with_labels(atoms))
    assert "stress_sign" not in names(look(frames, tmp_path, distributed))
    frames = [relabel(a, stress=-a.calc.results["stress"]) for a in frames]
    assert names(look(frames, tmp_path, distributed))["stress_sign"].bad


def test_frames_that_lack_a_label(tmp_path, distributed):
    frames = labelled(20)
    frames[3] = relabel(frames[3], stress=None)
    frames[5] = relabel(frames[5], forces=None)
    found = names(look(frames, tmp_path, distributed))
    assert set(found) == {"no_stress", "no_forces"} and not found["no_stress"].bad
    assert "mine.extxyz, frame 3 has no stress [stress]; it trains on its other labels." in found["no_stress"].text
    frames[7] = relabel(frames[7], forces=None)
    text = names(look(frames, tmp_path, distributed))["no_forces"].text
    assert "mine.extxyz, frame 5 (and 7; 2 of 20 in all) have no forces [forces]; they train on their" in text


def test_forces_of_a_few_frames_that_have_the_other_sign(tmp_path, distributed):
    frames = [*walk(), *walk(seed=1), *labelled(20)]
    for turned in (0, 30, 44):
        frames[turned] = relabel(frames[turned], forces=-frames[turned].calc.results["forces"])
    found = look(frames, tmp_path, distributed)
    [finding] = [f for f in findings(found) if f.name == "turned_forces"]
    assert finding.rows.tolist() == [0, 30, 44] and finding.bad
    assert "mine.extxyz, frame 0 (and 30, 44; 3 of 68 in all) has forces opposite to those" in finding.text
    kept, _ = judge("dataset", found, "leave_out", "keep")
    assert np.flatnonzero(~kept).tolist() == [0, 30, 44]


def test_real_forces_that_were_turned(real_structures, tmp_path, distributed):
    from ase.io import read

    frames = read(real_structures("lips_150.extxyz"), ":")
    for turned in (17, 90):
        frames[turned] = relabel(frames[turned], forces=-frames[turned].calc.results["forces"])
    [finding] = findings(look(frames, tmp_path, distributed, 5.0))
    assert finding.name == "turned_forces" and finding.rows.tolist() == [17, 90]
