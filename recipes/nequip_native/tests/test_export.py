# SPDX-License-Identifier: Apache-2.0
"""`potential.pt2` opens without our code, at other sizes, and says what the model says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from structure_files import model_in

import export
from atoms.exported import example, write_program
from atoms.first_weights import init_parameters
from build_model import KINDS


COMMON = {
    "elements": ["Al", "Cu", "Ni"], "cutoff": 4.5, "num_neighbors": 9.0, "energy_scales": [1.0, 2.0, 3.0],
    "energy_shifts": [0.1, 0.2, 0.3],
}  # fmt: skip
SMALL = {
    "nequip": {"num_layers": 2, "num_features": [6, 4], "num_element_features": 5, "radial_width": 8, "zbl": "metal"},
    "allegro": {"num_scalars": 8, "num_tensors": 4, "l_max": 1, "dtype": "float64"},
}
WITHOUT_US = """
import sys, torch
for case in torch.load(sys.argv[1]):
    found = torch.export.load(sys.argv[2]).module()(*case[0])
    for ours, theirs in zip(case[1], found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
"""


@pytest.mark.parametrize("kind", ["nequip", pytest.param("allegro", marks=pytest.mark.slow)])
def test_a_program_of_torch_alone(kind, tmp_path):
    config_class, model_class = KINDS[kind]
    model = model_class(config_class(**COMMON, **SMALL[kind]))
    init_parameters(model, 0)
    write_program(model, tmp_path / "potential.pt2")
    cases = []
    for number in (2, 23):
        arguments = example(number, 3)
        positions, types, cell, edges, shifts = arguments
        out = model(positions, types, cell[None], edges, shifts, torch.zeros_like(types))
        assert out.forces.abs().max() > 1e-3
        cases.append((arguments, (out.energies[0], out.forces, out.stress[0], out.atomic_energies)))
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-I", "-c", WITHOUT_US, tmp_path / "cases.pt", tmp_path / "potential.pt2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_final_model_becomes_a_program(tmp_path):
    model = model_in(tmp_path, 0)
    with pytest.raises(ValueError, match=r"--for and --device mean nothing; name it \*.nequip.pt2"):
        export.package(Path(model), tmp_path / "potential.pt2", "ase")
    export.package(Path(model), tmp_path / "potential.pt2")
    assert torch.export.load(tmp_path / "potential.pt2") and not list(tmp_path.glob(".*"))


def test_what_cannot_be_compiled_is_a_sentence(tmp_path, monkeypatch):
    target = tmp_path / "potential.nequip.pt2"
    with pytest.raises(ValueError, match="nowhere"):
        export.package(tmp_path / "nowhere", target, "lammps", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here"):
            export.package(tmp_path, target, "lammps", "cuda")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"there is no C\+\+ compiler \(no-such-compiler\)"):
        export.package(tmp_path, target, "lammps", "cpu")
    target.write_text("")
    with pytest.raises(ValueError, match="exists; move it away"):
        export.package(tmp_path, target, "lammps", "cpu")
