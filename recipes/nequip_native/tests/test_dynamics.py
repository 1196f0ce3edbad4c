# SPDX-License-Identifier: Apache-2.0
"""Dynamics and relaxation with a final model, as users start them."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress
from ase.io import Trajectory, read, write

import md
import relax
from atoms.calculator_file import write_potential
from atoms.first_weights import init_parameters
from build_model import KINDS
from common import RECIPE


def write_model(folder, seed):
    """A potential with first weights and the nuclei's repulsion: smooth, and good for nothing else."""
    config_class, model_class = KINDS["nequip"]
    config = config_class(
        elements=["Al", "Ni", "Cu"], cutoff=4.0, num_neighbors=20.0, energy_scales=[0.1] * 3, energy_shifts=[0.0] * 3,
        num_layers=2, num_features=[6, 4], num_element_features=3, radial_width=8, zbl="metal", dtype="float64",
    )  # fmt: skip
    model = model_class(config)
    init_parameters(model, seed)
    write_potential(folder, config, model_class, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def final_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("final_model"), 0)


def test_energy_is_kept_and_a_trajectory_and_a_picture_are_left(final_model, tmp_path):
    structure = RECIPE / "data" / "validation.extxyz"
    fine = md.run([final_model], structure, tmp_path / "fine", 300.0, 40, 0.5, False, 1, 0)
    coarse = md.run([final_model], structure, tmp_path / "run", 300.0, 20, 1.0, False, 5, 0)
    assert fine["swing_mev_per_atom"] < 0.5 * coarse["swing_mev_per_atom"] < 1 and (tmp_path / "run.png").exists()
    assert len(Trajectory(tmp_path / "run.traj")) == 5
    with pytest.raises(ValueError, match=r"fine\.traj exists; move it away"):
        md.run([final_model], structure, tmp_path / "fine", 300.0, 1, 1.0, False, 5, 0)
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        md.run([final_model], structure, tmp_path / "nowhere" / "md", 300.0, 1, 1.0, False, 5, 0)
    (tmp_path / "broken.xyz").write_text("3\n\nCu 0 0\n")
    with pytest.raises(ValueError, match=r"broken\.xyz cannot be read by ASE"):
        md.run([final_model], tmp_path / "broken.xyz", tmp_path / "new", 300.0, 1, 1.0, False, 5, 0)
    for temperature, steps in ((300.0, 0), (np.nan, 1), (-1.0, 1)):
        with pytest.raises(ValueError, match="must be above 0"):
            md.run([final_model], structure, tmp_path / "new", temperature, steps, 1.0, False, 5, 0)
    with pytest.raises(ValueError, match=r"apart: they are at .* K at step \d+; take a shorter --timestep"):
        md.run([final_model], structure, tmp_path / "apart", 300.0, 50, 200.0, False, 50, 0)
    md.run([final_model], structure, tmp_path / "warm", 300.0, 2, 1.0, True, 1, 0)


def test_relaxed_structures_have_their_energies_and_what_does_not_get_there_is_said(final_model, tmp_path):
    given = read(RECIPE / "data" / "validation.extxyz", ":2")
    write(tmp_path / "two.xyz", given)
    assert relax.run(final_model, tmp_path / "two.xyz", tmp_path / "relaxed.xyz", 1e-4, 4, False) == (2, 2)
    relaxed, calc = read(tmp_path / "relaxed.xyz", ":"), md.calculator(final_model)
    assert not any(atoms.info["converged"] for atoms in relaxed)
    for before, atoms in zip(given, relaxed, strict=True):
        assert atoms.get_potential_energy() < calc.get_potential_energy(before) - 1e-3
        assert atoms.get_potential_energy() == pytest.approx(calc.get_potential_energy(atoms), abs=1e-6)
        assert np.allclose(atoms.get_forces(), calc.get_forces(atoms), atol=1e-6)
    with pytest.raises(ValueError, match=r"relaxed\.xyz exists; move it away"):
        relax.run(final_model, tmp_path / "two.xyz", tmp_path / "relaxed.xyz", 1e-4, 1, False)
    with pytest.raises(ValueError, match=r"relaxed\.traj must end with"):
        relax.run(final_model, tmp_path / "two.xyz", tmp_path / "relaxed.traj", 1e-4, 1, False)
    for last, message in ((Atoms("Au"), "has Au; the potential knows"), (Atoms("Cu2"), "energy is not a number")):
        write(tmp_path / "three.xyz", [*given, last])
        with pytest.raises(ValueError, match=rf"frame 2 of .*three\.xyz.*{message}"):
            relax.run(final_model, tmp_path / "three.xyz", tmp_path / "new.xyz", 1.0, 1, False)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "new.xyz").exists()


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 1, 0), (0, 0, 1)])
def test_stress_is_the_energys_derivative_in_skewed_cells(final_model, pbc):
    cell = [[2.6, 0.2, 0.0], [0.9, 5.1, 0.3], [0.4, 1.2, 12.0]]
    atoms = Atoms("CuNiAl", [[0, 0, 0], [1.2, 2.2, 0.3], [0.1, 0.3, 2.4]], cell=cell, pbc=pbc)
    atoms.calc = md.calculator(final_model)
    stress = atoms.get_stress()
    assert np.abs(stress).max() > 1e-3
    assert np.allclose(calculate_numerical_stress(atoms, eps=1e-5), stress, atol=1e-8)


def test_atoms_that_cannot_be_are_a_sentence(final_model):
    calc = md.calculator(final_model)
    for atoms, message in (
        (Atoms("Cu", pbc=True), "periodic along a direction without a lattice vector"),
        (Atoms("Cu", cell=[3, 0, 3], pbc=(1, 1, 0)), "periodic along a direction without a lattice vector"),
        (Atoms("Cu2", [[0, 0, 0], [np.nan, 0, 0]]), "infinite or not a number"),
        (Atoms("Cu2", [[1, 0, 0], [1, 0, 0]]), "look for atoms in the same place"),
    ):
        with pytest.raises(ValueError, match=message):
            calc.get_potential_energy(atoms)
    with pytest.raises(PropertyNotImplementedError, match="if they are periodic"):
        calc.get_stress(Atoms("Cu2", [[0, 0, 0], [2, 0, 0]]))


def test_a_committee_says_how_much_it_differs(final_model, tmp_path):
    (tmp_path / "other").mkdir()
    folders = [final_model, write_model(tmp_path / "other", 1)]
    structure = RECIPE / "data" / "validation.extxyz"
    said = md.run(folders, structure, tmp_path / "md", 300.0, 4, 1.0, False, 2, 0)
    atoms = Trajectory(tmp_path / "md.traj")[0]
    forces = np.array([md.calculator(folder).get_property("forces", atoms) for folder in folders])
    energies = [md.calculator(folder).get_property("energy", atoms) for folder in folders]
    calc = md.calculator(*folders)
    assert np.allclose(calc.get_property("forces", atoms), forces.mean(0), atol=1e-12)
    assert calc.results["energy"] == pytest.approx(np.mean(energies))
    assert calc.results["energy_std"] == pytest.approx(abs(energies[0] - energies[1]) / np.sqrt(2))
    spread = np.linalg.norm(forces[0] - forces[1], axis=1) / np.sqrt(2)
    assert np.allclose(calc.results["forces_std"], spread) and spread.max() > 0.001
    assert said["largest_forces_std"] >= spread.max() - 1e-12
    with pytest.raises(ValueError, match="at least two models"):
        type(calc)([final_model])


def test_a_folder_that_is_no_final_model(tmp_path):
    with pytest.raises(ValueError, match=r"is no final model: it has no calculator\.py"):
        md.calculator(tmp_path)
    (tmp_path / "final_model").mkdir()
    write_model(tmp_path / "final_model", 0)
    with pytest.raises(ValueError, match=r"no calculator\.py; give .*final_model\."):
        md.calculator(tmp_path)
    for name in ("model.safetensors", "config.json"):
        file = tmp_path / "final_model" / name
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"final_model: its config\.json or model\.safetensors is damaged"):
            md.calculator(tmp_path / "final_model")
        write_model(tmp_path / "final_model", 0)
