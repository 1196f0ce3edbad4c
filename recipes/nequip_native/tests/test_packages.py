# SPDX-License-Identifier: Apache-2.0
"""`*.nequip.pt2`: what LAMMPS' pair styles and nequip's calculator pass in comes out as our calculator says it.

The tensors are those that pair_nequip_allegro.cpp makes. With the package `nequip` in the environment its own loader
and calculator open the files too: pip install -r ../../models/nequip/requirements-peer.txt
"""

import numpy as np
import pytest
import torch
from ase import Atoms
from hydra.utils import get_method
from structure_files import labelled

import convert_allegro
import convert_nequip
from atoms.calculator_file import write_potential
from atoms.exported import write_package
from atoms.final_model import calculator
from atoms.first_weights import init_parameters
from build_model import KINDS


pytestmark = pytest.mark.slow  # the compiler takes half a minute for each
ELEMENTS = ["Al", "Ni", "Cu"]
COMMON = {"elements": ELEMENTS, "cutoff": 4.5, "num_neighbors": 20.0, "energy_scales": [1.0, 2.0, 3.0],
          "energy_shifts": [0.1, 0.2, 0.3]}  # fmt: skip
PAIRS = [[4.5, 4.0, 3.5], [4.0, 4.5, 4.2], [3.5, 4.2, 3.8]]
NEQUIP = {"num_layers": 2, "num_features": [6, 4], "num_element_features": 5, "radial_width": 8}
ALLEGRO = {"num_scalars": 8, "num_tensors": 4, "l_max": 1}
CASES = {  # the kind, its options, what it is for, and how near the numbers must be
    "nequip": ("nequip", NEQUIP | {"zbl": "metal"}, 1e-5),
    "nequip float64": ("nequip", NEQUIP | {"dtype": "float64", "pair_cutoffs": PAIRS}, 1e-10),
    "allegro float64": ("allegro", ALLEGRO | {"dtype": "float64"}, 1e-10),
}


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    """A model with first weights, its final folder, and the tolerance."""
    kind, options, tolerance = CASES[request.param]
    config_class, model_class = KINDS[kind]
    found, folder = model_class(config_class(**COMMON | options)), tmp_path_factory.mktemp("model")
    init_parameters(found, 0)
    write_potential(folder, found.config, model_class, found.state_dict())
    return found, folder, tolerance


@pytest.fixture(scope="module")
def for_lammps(model):
    path = model[1] / "lammps.nequip.pt2"
    write_package(model[0], path, "lammps")
    return path


@pytest.fixture(scope="module")
def for_ase(model):
    path = model[1] / "ase.nequip.pt2"
    write_package(model[0], path, "ase")
    return path


def structures() -> list[Atoms]:
    """Several sizes, strained."""
    return [labelled(2)[1], labelled(1, seed=3, repeat=(2, 2, 2))[0]]


def expected(folder, atoms: Atoms) -> dict[str, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator(folder)
    atoms.get_stress()
    return atoms.calc.results


def edges_of(atoms: Atoms, config) -> tuple[np.ndarray, ...]:
    """As LAMMPS' full neighbour list gives them: by centre, the neighbours of one in any order."""
    from ase.neighborlist import neighbor_list

    i, j, d, shift = neighbor_list("ijdS", atoms, config.cutoff)
    types = np.array([ELEMENTS.index(symbol) for symbol in atoms.symbols])
    keep = d <= np.array(config.pair_cutoffs or np.full((3, 3), config.cutoff))[types[i], types[j]]
    order = np.lexsort((np.random.default_rng(0).random(keep.sum()), i[keep]))
    return i[keep][order], j[keep][order], shift[keep][order], types


def as_pair_nequip(atoms: Atoms, config) -> dict[str, torch.Tensor]:
    """Local atoms, and whole cells that a neighbour is away."""
    i, j, shift, types = edges_of(atoms, config)
    return {
        "pos": torch.tensor(atoms.positions), "edge_index": torch.tensor(np.stack([i, j])),
        "atom_types": torch.tensor(types), "cell": torch.tensor(atoms.cell.array)[None],
        "edge_cell_shift": torch.tensor(shift.astype(float)),
    }  # fmt: skip


def as_pair_allegro(atoms: Atoms, config) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Images ("ghosts") as atoms that are behind the others, and of which atom each is one."""
    i, j, shift, types = edges_of(atoms, config)
    own, place = np.unique(np.column_stack([j, shift])[shift.any(1)], axis=0, return_inverse=True)
    neighbor = j.copy()
    neighbor[shift.any(1)] = len(atoms) + place.ravel()
    of = np.concatenate([np.arange(len(atoms)), own[:, 0]])
    positions = np.concatenate([atoms.positions, atoms.positions[own[:, 0]] + own[:, 1:] @ atoms.cell.array])
    inputs = {"pos": torch.tensor(positions), "edge_index": torch.tensor(np.stack([i, neighbor])),
              "atom_types": torch.tensor(types[of])}  # fmt: skip
    return inputs, of


def test_lammps_gets_the_calculators_numbers(model, for_lammps):
    model, folder, tolerance = model
    package = torch._inductor.aoti_load_package(str(for_lammps))
    metadata = package.get_metadata()
    assert float(metadata["r_max"]) == 4.5 and metadata["type_names"] == "Al Ni Cu" and metadata["num_types"] == "3"
    assert ("per_edge_type_cutoff" in metadata) == (model.config.pair_cutoffs is not None)
    for atoms in structures():
        local = slice(len(atoms))
        if model.config.model_type == "allegro":
            inputs, of = as_pair_allegro(atoms, model.config)
        else:
            inputs, of = as_pair_nequip(atoms, model.config), np.arange(len(atoms))
        assert metadata["nequip_aoti_inputs"].split() == list(inputs)
        found = dict(zip(metadata["nequip_aoti_outputs"].split(), package(list(inputs.values())), strict=True))
        assert {name: tuple(x.shape) for name, x in found.items()} == {
            "atomic_energy": (len(of), 1), "forces": (len(of), 3), "virial": (1, 3, 3)
        }  # fmt: skip
        assert {x.dtype for x in found.values()} == {torch.float64}
        # What LAMMPS does with them: energies of local atoms, images' forces on the atoms that they are of.
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, of, found["forces"].numpy())
        virial = found["virial"][0].numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        right = expected(folder, atoms)
        scale = np.abs(right["forces"]).max()
        assert scale > 0.1
        assert found["atomic_energy"][local].sum() == pytest.approx(right["energy"], rel=tolerance)
        assert np.abs(forces - right["forces"]).max() < tolerance * scale
        assert np.allclose(virial, -right["stress"] * atoms.get_volume(), rtol=tolerance, atol=tolerance * scale)


def test_nequips_calculator_opens_it(model, for_ase):
    ase = pytest.importorskip("nequip.integrations.ase")
    _, folder, tolerance = model
    for atoms in structures():
        right = expected(folder, atoms)
        atoms.calc = ase.NequIPCalculator.from_compiled_model(for_ase, chemical_species_to_atom_type_map=True)
        for name in ("energy", "energies", "forces", "stress"):
            found = atoms.calc.get_property(name, atoms)
            assert np.abs(found - right[name]).max() < tolerance * np.abs(right[name]).max(), name


def test_nequip_names_its_own_so(model, for_lammps, tmp_path):
    """What `nequip-compile` makes of the same weights has the same metadata, and returns the same."""
    compiled = pytest.importorskip("nequip.model.inference_models")
    targets = pytest.importorskip("nequip.scripts._compile_utils").COMPILE_TARGET_DICT
    aot = pytest.importorskip("nequip.utils.aot")
    pytest.importorskip("nequip.utils.global_state").set_global_state()

    model, _, tolerance = model
    config, kind = model.config, model.config.model_type
    atoms = structures()[0]
    if kind == "allegro":
        arguments = convert_allegro.allegro_arguments(config)
        state = convert_allegro.native_to_allegro(model.state_dict(), config)
        data, _ = as_pair_allegro(atoms, config)
    else:
        arguments = convert_nequip.nequip_arguments(config)
        state = convert_nequip.native_to_nequip(model.state_dict(), config)
        data = as_pair_nequip(atoms, config)
    theirs = get_method(arguments.pop("_target_"))(**arguments, compile_mode="eager")
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    target, any_number = targets[f"pair_{kind}"], torch.export.Dim
    sizes = {"graph": any_number.STATIC, "node": any_number("nodes", min=2), "edge": any_number("edges", min=2)}
    path, kept = str(tmp_path / "theirs.nequip.pt2"), {"allow_tf32": "0"} | theirs.metadata
    aot.aot_export_model(theirs.eval(), "cpu", target["input"], target["output"], data, sizes, path,
                         {"aot_inductor.metadata": kept})  # fmt: skip
    theirs, says = compiled.load_compiled_model(path, "cpu", target["input"], target["output"])
    ours, we_say = compiled.load_compiled_model(str(for_lammps), "cpu")
    assert {name: we_say[name] for name in says} == says
    assert [we_say[f"nequip_aoti_{way}puts"].split() for way in ("in", "out")] == [target["input"], target["output"]]
    expected = theirs(data)
    for name, found in ours(data).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(found, expected[name], rtol=0, atol=float(tolerance * scale), msg=name)
