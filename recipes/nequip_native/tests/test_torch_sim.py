# SPDX-License-Identifier: Apache-2.0
"""`torch_sim_model.py` of a final model: torch-sim's dynamics and relaxations of several structures are ASE's.

It runs where that package is, on Python 3.12: pip install -r requirements-torch-sim.txt
"""

import sys

import numpy as np
import pytest
import torch
from ase import units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from structure_files import labelled, model_in

from atoms.calculator_file import write_potential
from atoms.final_model import calculator
from atoms.first_weights import init_parameters
from build_model import KINDS


torch_sim = pytest.importorskip("torch_sim")
PAIRS = [[3.5, 3.1, 3.3], [3.1, 3.5, 3.2], [3.3, 3.2, 3.4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """First weights and the nuclei's repulsion."""
    config_class, model_class = KINDS["nequip"]
    config = config_class(
        elements=["Al", "Ni", "Cu"], cutoff=3.5, num_neighbors=20.0, energy_scales=[0.1] * 3, energy_shifts=[0.0] * 3,
        num_layers=2, num_features=[6, 4], num_element_features=3, radial_width=8, zbl="metal", dtype="float64",
    )  # fmt: skip
    model, found = model_class(config), tmp_path_factory.mktemp("model")
    init_parameters(model, 0)
    write_potential(found, config, model_class, model.state_dict())
    return found


@pytest.fixture
def model(folder, monkeypatch):
    """As a user opens it."""
    monkeypatch.syspath_prepend(str(folder))
    for name in ("calculator", "torch_sim_model"):
        sys.modules.pop(name, None)
    return pytest.importorskip("torch_sim_model").TorchSimModel()


def structures() -> list:
    """Of different sizes, in skewed cells, some atoms far outside of them."""
    found = [labelled(2)[1], labelled(1, seed=3)[0], labelled(1, seed=4, repeat=(2, 2, 2))[0]]
    for atoms in found:
        atoms.set_cell(atoms.cell.array + [[0, 2.6, 1.3], [0, 0, 0.9], [0, 0, 0]], scale_atoms=True)
        atoms.positions[::3] += atoms.cell[0] - 2 * atoms.cell[1] + atoms.cell[2]
    return found


def state_of(some: list):
    return torch_sim.initialize_state(some, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_a_batch_has_the_calculators_numbers(model, folder, pairs):
    model.model.config.pair_cutoffs = pairs
    calc = calculator(folder)
    calc.model.config.pair_cutoffs = pairs
    found = model(state_of(structures()))
    starts = np.cumsum([0, *map(len, structures())])
    for i, atoms in enumerate(structures()):
        atoms.calc = calc
        calc.reset()
        forces = found["forces"][starts[i] : starts[i + 1]].numpy()
        assert float(found["energy"][i]) == pytest.approx(atoms.get_potential_energy(), rel=1e-10)
        assert np.allclose(forces, atoms.get_forces(), atol=1e-10) and np.abs(forces).max() > 0.1
        assert np.allclose(found["stress"][i].numpy(), atoms.get_stress(voigt=False), atol=1e-10)


def test_a_cluster_has_no_stress_and_strangers_are_refused(model, folder):
    cluster = structures()[0]
    cluster.pbc = False
    cluster.cell = None
    found = model(state_of([cluster]))
    cluster.calc = calculator(folder)
    assert np.allclose(found["forces"].numpy(), cluster.get_forces(), atol=1e-10)
    assert (found["stress"] == 0).all()
    with pytest.raises(ValueError, match="There is O among the atoms, and the potential knows Al, Ni, Cu"):
        model(state_of([molecule("H2O")]))


def test_it_is_what_torch_sim_asks_of_a_model(tmp_path, monkeypatch):
    interface = pytest.importorskip("torch_sim.models.interface")
    monkeypatch.syspath_prepend(model_in(tmp_path, 0, ("H", "C", "Mg", "Si", "Fe")))
    for name in ("calculator", "torch_sim_model"):
        sys.modules.pop(name, None)
    found = pytest.importorskip("torch_sim_model").TorchSimModel()
    interface.validate_model_outputs(found, torch.device("cpu"), torch.float64)


def test_dynamics_go_where_ases_go(model, folder):
    state = state_of(structures())
    state.rng = 1
    state = torch_sim.nve_init(state, model, kT=0.05)
    all_atoms, dt, first = structures(), 1.0 * units.fs, state.clone()
    for _ in range(20):
        state = torch_sim.nve_step(state, model, dt=dt)
    starts = np.cumsum([0, *map(len, all_atoms)])
    for i, atoms in enumerate(all_atoms):
        mine = slice(starts[i], starts[i + 1])
        atoms.set_momenta(first.momenta[mine].numpy())
        atoms.set_masses(first.masses[mine].numpy())
        atoms.calc = calculator(folder)
        VelocityVerlet(atoms, dt).run(20)
        moved = np.abs(atoms.positions - first.positions[mine].numpy()).max()
        assert np.abs(state.positions[mine].numpy() - atoms.positions).max() < 1e-8 * moved


def test_relaxations_end_where_ases_end(model, folder):
    close = torch_sim.generate_force_convergence_fn(force_tol=1e-3, include_cell_forces=False)
    found = torch_sim.optimize(
        structures(), model, optimizer=torch_sim.Optimizer.fire, convergence_fn=close, max_steps=400
    )
    for i, atoms in enumerate(structures()):
        before = calculator(folder).get_potential_energy(atoms)
        atoms.calc = calculator(folder)
        FIRE(atoms, logfile=None).run(1e-3, 400)
        after = atoms.get_potential_energy()
        assert before - after > 0.05
        assert float(found.energy[i]) == pytest.approx(after, abs=0.02 * (before - after))
