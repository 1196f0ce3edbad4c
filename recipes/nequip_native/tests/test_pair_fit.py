# SPDX-License-Identifier: Apache-2.0
"""What pair potentials fitted to the forces tell of units, signs and single frames; frames are far apart here."""

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from looked_at import changed, dynamics, look, names, relabel
from structure_files import labelled, with_labels

from atoms.findings import findings, judge


@pytest.mark.parametrize(
    ("factor", "unit"), [(-1.0, "-eV/Ang^3"), (160.2177, "GPa"), (-1602.177, "-kbar"), (1 / 160.2, None)]
)
def test_stress_of_alloys_without_order(factor, unit, tmp_path, distributed):
    [finding] = findings(look(changed(labelled(30), range(30), stress=factor), tmp_path, distributed))
    assert finding.bad and finding.name == ("stress_sign" if factor == -1 else "stress_units")
    assert (f"units.stress={unit}." if unit else "0.00") in finding.text


def test_virial_in_place_of_stress(tmp_path, distributed):
    frames = [relabel(a, stress=-a.get_volume() * a.calc.results["stress"]) for a in labelled(30)]
    [finding] = findings(look(frames, tmp_path, distributed))
    assert finding.bad and "label_keys.virial=KEY" in finding.text
    assert not findings(look(frames, tmp_path, distributed, label_keys={"virial": "stress"}))


@pytest.mark.parametrize(("factor", "unit"), [(23.06, "kcal/mol"), (1 / 27.2114, "hartree"), (1 / 32, "per atom")])
def test_units_of_energies_of_frames_far_apart(factor, unit, tmp_path, distributed):
    frames = dynamics()
    assert not findings(look(frames, tmp_path, distributed))
    [finding] = findings(look(changed(frames, range(40), energy=factor), tmp_path, distributed))
    assert finding.name == "force_units" and finding.bad and unit in finding.text


def test_real_energies_in_kcal(real_structures, tmp_path, distributed):
    from ase.io import read

    frames = read(real_structures("lips_150.extxyz"), "::3")
    found = findings(look(changed(frames, range(50), energy=23.06), tmp_path, distributed, 5.0))
    assert [finding.name for finding in found] == ["force_units"] and "energies in kcal/mol" in found[0].text


@pytest.mark.parametrize("some", [[7], range(0, 30, 2)], ids=["one", "half"])
@pytest.mark.parametrize(
    ("name", "factors"),
    [("turned_forces", {"forces": -1}), ("other_strength", {"forces": 23.06}), ("turned_stress", {"stress": -1}),
     ("other_stress", {"stress": 160.2}), ("zero_forces", {"forces": 0})],
)  # fmt: skip
def test_some_frames_are_of_another_kind(name, factors, some, tmp_path, distributed):
    found = look(changed(labelled(30), some, **factors), tmp_path, distributed)
    finding = names(found)[name]
    others = sorted(set(range(30)) - set(some))
    assert finding.bad and finding.rows.tolist() in ([list(some)] if len(some) == 1 else [list(some), others])
    assert [one.name for one in findings(found) if one.bad] == [name]


@pytest.mark.parametrize("case", ["swapped", "hartree", "kcal", "levels"])
def test_energies_that_are_not_the_frames(case, tmp_path, distributed):
    frames = [relabel(a, energy=a.calc.results["energy"] - 40.0 * len(a)) for a in dynamics()]
    energies = [a.calc.results["energy"] for a in frames]
    if case == "swapped":
        low, high = int(np.argmin(energies)), int(np.argmax(energies))
        rows = sorted([low, high])
        frames[low], frames[high] = (relabel(frames[i], energy=energies[j]) for i, j in ((low, high), (high, low)))
    elif case == "levels":
        rows = list(range(20))
        frames[:20] = [relabel(a, energy=a.calc.results["energy"] - 0.5 * len(a)) for a in frames[:20]]
    else:
        rows = [4, 9]
        frames = changed(frames, rows, energy={"hartree": 1 / 27.2114, "kcal": 23.06}[case])
    [finding] = findings(look(frames, tmp_path, distributed))
    assert finding.rows.tolist() == rows and finding.bad == (case in ("hartree", "kcal"))
    expected = dict.fromkeys(("swapped", "levels"), "unlike_energy").get(case, "wrong_energy")
    assert finding.name == expected


def test_half_of_the_forces_are_turned(tmp_path, distributed):
    [finding] = findings(look(changed(dynamics(), range(1, 40, 2), forces=-1), tmp_path, distributed))
    assert finding.name == "turned_forces" and finding.rows.tolist() == list(range(1, 40, 2))
    [finding] = findings(look(changed(dynamics(), range(0, 40, 2), forces=-1), tmp_path, distributed))
    assert finding.rows.tolist() == list(range(0, 40, 2))


def test_forces_of_other_atoms(tmp_path, distributed):
    random = np.random.default_rng(0)
    frames = labelled(30)
    frames[7] = relabel(frames[7], forces=random.permutation(frames[7].calc.results["forces"]))
    [finding] = findings(look(frames, tmp_path, distributed))
    assert finding.name == "mixed_up_forces" and finding.rows.tolist() == [7]
    frames = [relabel(a, forces=random.permutation(a.calc.results["forces"])) for a in frames]
    assert "mixed_up_data" in names(look(frames, tmp_path, distributed))


def test_forces_that_would_turn_a_molecule(tmp_path, distributed):
    random, frames = np.random.default_rng(0), []
    for _ in range(12):
        cluster = bulk("Cu", cubic=True) * (2, 2, 2)
        cluster.pbc, cluster.cell = False, None
        cluster.positions += random.normal(0, 0.1, cluster.positions.shape)
        frames.append(with_labels(cluster, stress=False))
    assert not findings(look(frames, tmp_path, distributed))
    turned = frames[5].copy()
    turned.positions = turned.positions[:, [1, 2, 0]]  # as of an output in another orientation
    turned.calc = SinglePointCalculator(turned, **frames[5].calc.results)
    frames[5] = turned
    assert names(look(frames, tmp_path, distributed))["net_torque"].rows.tolist() == [5]


@pytest.mark.parametrize("name", ["half_empty", "far_apart"])
def test_lengths_in_bohr(name, tmp_path, distributed):
    frames = labelled(20, repeat=(2, 2, 2))
    frames[3].set_cell(frames[3].cell.array / 0.529177, scale_atoms=name == "far_apart")
    assert names(look(frames, tmp_path, distributed, 6.0))[name].rows.tolist() == [3]


def test_sound_crystals_without_shear_or_forces(tmp_path, distributed):
    random, frames = np.random.default_rng(0), labelled(20)
    for scale in np.linspace(0.98, 1.02, 8):
        crystal = bulk("Cu", cubic=True)
        crystal.set_cell(crystal.cell.array * scale, scale_atoms=True)
        crystal = with_labels(crystal)
        noise = {"stress": 1e-6 * random.normal(size=6), "forces": 1e-6 * random.normal(size=(4, 3))}
        noise["forces"] -= noise["forces"].mean(0)
        frames.append(relabel(crystal, **{k: crystal.calc.results[k] + v for k, v in noise.items()}))
    assert not findings(look(frames, tmp_path, distributed))


def test_one_frame_does_not_accuse_all(tmp_path, distributed):
    found = look(changed(dynamics(), [7], energy=23.06, forces=23.06, stress=-1602.0), tmp_path, distributed)
    bad = [finding for finding in findings(found) if finding.bad]
    assert bad and all(finding.rows.tolist() == [7] for finding in bad)
    kept, _ = judge("dataset", found, "leave_out", "keep")
    assert np.flatnonzero(~kept).tolist() == [7]
