# SPDX-License-Identifier: Apache-2.0
"""Training begins as the pretrained potential, whatever its form, and says what it has kept."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.io import read
from omegaconf import OmegaConf

from atoms import package_zip
from atoms.calculator_file import write_potential
from atoms.final_model import calculator
from atoms.first_weights import init_parameters
from build_model import KINDS, model_config
from common import RECIPE
from common.contract.running import run_here
from convert_allegro import allegro_arguments, native_to_allegro
from convert_nequip import native_to_nequip, nequip_arguments
from pretrained import open_pretrained, read_pretrained, what_is_kept


SMALL = {
    "nequip": {"num_layers": 2, "num_features": [6, 4], "num_element_features": 3, "radial_width": 8},
    "allegro": {"l_max": 1, "num_scalars": 6, "num_tensors": 4, "embedding_width": 5, "mlp_width": 7,
                "readout_width": 3},
}  # fmt: skip
THEIRS = {"nequip": (nequip_arguments, native_to_nequip), "allegro": (allegro_arguments, native_to_allegro)}


def potential(folder: Path, elements: list[str], kind: str = "nequip", **more):
    """A final model with first weights and numbers that no data has."""
    config_class, model_class = KINDS[kind]
    number = len(elements)
    config = config_class(
        elements=elements, cutoff=3.7, num_neighbors=17.0, energy_scales=[0.1, 0.3, 0.2][:number],
        energy_shifts=[-1.0, 2.0, 0.5][:number], dtype="float64", **SMALL[kind] | more,
    )  # fmt: skip
    model = model_class(config)
    init_parameters(model, 7)
    if more.get("train_shifts"):
        with torch.no_grad():
            model.added_shifts += torch.tensor([0.25, -0.5, 0.125])
    folder.mkdir()
    write_potential(folder, config, model_class, model.state_dict())
    return config, model


@pytest.fixture
def refused(tmp_path, capfd):
    """The sentence that a run ends with."""

    def ask(*words: str) -> str:
        with pytest.raises(SystemExit):
            run_here("train_ddp", tmp_path / "log", *words)
        return capfd.readouterr().err

    return ask


def predictions(folder: Path) -> np.ndarray:
    found, potential = [], calculator(folder)
    for atoms in read(RECIPE / "data" / "validation.extxyz", ":3"):
        atoms.calc = potential
        found += [atoms.get_potential_energy(), *atoms.get_forces().ravel()]
    return np.array(found)


def like(source: Path) -> list[str]:
    """The model of the source, in a run that must move nothing."""
    source = f"{source}/"  # as a shell completes it
    nulls = [f"model_kwargs.{key}=null" for key in ("num_features", "num_element_features", "radial_width", "cutoff")]
    return [
        *nulls, f"init_from={source}", f"model_tag={source}", "precision=fp64", "num_train_steps=1",
        "adamw_kwargs.lr=1e-30", "validation.every_n_steps=null",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_step_0_is_the_pretrained_model(kind, tmp_path, capsys):
    config, _ = potential(tmp_path / "old", ["Ni", "Cu", "Al"], kind, train_shifts=True)
    run_here(
        "train_ddp", tmp_path / "log", *like(tmp_path / "old"), f"checkpoint.ckpt_dir={tmp_path / 'new'}",
        "checkpoint.save_final_model=true",
    )  # fmt: skip
    before, after = predictions(tmp_path / "old"), predictions(tmp_path / "new" / "final_model")
    assert np.ptp(before) > 0.1 and np.abs(after - before).max() < 1e-12
    found, _ = open_pretrained(str(tmp_path / "new"))  # a run's newest checkpoint
    assert (found.elements, found.num_neighbors, found.cutoff) == (config.elements, 17.0, 3.7)
    card = (tmp_path / "new" / "final_model" / "README.md").read_text()
    assert "# old, 1 steps" in card and "init_from: old\n" in card and str(tmp_path) not in card
    said = "".join(capsys.readouterr())
    assert f"Step 0 is init_from={tmp_path / 'old'}/. Kept of it: elements Ni Cu Al; num_neighbors" in said


@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_a_file_of_the_package_is_the_same_model(kind, tmp_path):
    config, model = potential(tmp_path / "old", ["Ni", "Cu", "Al"], kind)
    arguments, to_package = THEIRS[kind]
    state, weights = to_package(model.state_dict(), config), model.state_dict()
    torch.save({"model": arguments(config), "state_dict": state}, tmp_path / "theirs.pt")
    found, same = open_pretrained(str(tmp_path / "theirs.pt"))
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert (found.energy_shifts, found.num_neighbors, found.zbl) == (config.energy_shifts, 17.0, None)
    (tmp_path / "theirs.pt").write_bytes(b"c\nos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="no checkpoint of tensors and plain values"):
        open_pretrained(str(tmp_path / "theirs.pt"))


def modules_of(state: dict[str, torch.Tensor], options: dict) -> torch.nn.Module:
    """Modules with these parameters by dotted names, and with these options: as nequip's, but of no class of its."""
    root = torch.nn.Module()
    for name, value in [*state.items(), *options.items()]:
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                if part == "2":  # of a network, after its nonlinearity
                    module.add_module("1", torch.nn.SiLU())
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        if not torch.is_tensor(value):
            setattr(module, last, value)
        elif name in options or last in ("_rmax_recip", "bessel_weights", "scales"):
            module.register_buffer(last, value)
        else:
            module.register_parameter(last, torch.nn.Parameter(value))
    return root


def options_of(config) -> dict:
    """What nequip's modules know besides weights, of our small models."""
    at, edge = "sole_model.model.func", ((1, (0, 1)), (1, (1, -1)))
    numbers = {"type_names": config.elements, "r_max": str(config.cutoff), "model_dtype": config.dtype}
    found = {"type_names": config.elements, "_metadata": numbers}
    found = {f"sole_model.{name}": value for name, value in found.items()}
    number = torch.tensor([[config.num_neighbors**-0.5]], dtype=torch.float64)
    if config.model_type == "nequip":
        kept = [((6, (0, 1)), (4, (1, -1))), ((6, (0, 1)),)]
        found |= {f"{at}.layer{i}_convnet.feature_irreps_hidden": irreps for i, irreps in enumerate(kept)}
        found |= {f"{at}.spharm.irreps_edge_sh": edge, f"{at}.layer0_convnet.conv.norm.norm_const": number}
        found |= {f"{at}.type_embed.categorical_graph_field_embed_modules.training": True}
        return found | {f"{at}.bessel_encode.cutoff.p": 6.0}
    names = {"num_layers": 2, "num_scalar_features": 6, "num_tensor_features": 4}
    found |= {f"{at}.allegro.{name}": value for name, value in names.items()}
    found |= {f"{at}.allegro.tensor_track_allowed_irreps": (*edge, (1, (0, -1))), f"{at}.allegro.norm_const": number}
    found |= {f"{at}.allegro.tps.0.irreps_in2": edge, f"{at}.allegro.tps.0.path_channel_coupling": True}
    return found | {f"{at}.radial_chemical_embed.bessel_encode.cutoff.p": 6.0}


def package(path: Path, section: dict, model) -> None:
    """As `nequip-package` writes it."""
    with torch.package.PackageExporter(path) as exported:
        exported.extern("**")
        exported.save_text("model", "config.yaml", yaml.safe_dump({"training_module": {"model": section}}))
        exported.save_pickle("model", "eager_model.pkl", model)


class Harmful:
    """Writes a file as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch.package's own
@pytest.mark.parametrize("kind", ["nequip", "allegro"])
def test_a_package_is_read_and_nothing_in_it_runs(kind, tmp_path):
    config, model = potential(tmp_path / "old", ["Ni", "Cu", "Al"], kind, train_shifts=True)
    section, state = THEIRS[kind][0](config), THEIRS[kind][1](model.state_dict(), config)
    state = {f"sole_model.{name}": value for name, value in state.items()}
    modules = modules_of(state, options_of(config))
    modules.harmful = Harmful(tmp_path / "ran")
    package(tmp_path / "first.nequip.zip", section, modules)
    found, weights = open_pretrained(str(tmp_path / "first.nequip.zip"))
    want, same = open_pretrained(str(tmp_path / "old"))
    assert found == want and weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights) and not (tmp_path / "ran").exists()
    # Of one that began from another the YAML says no architecture, but its modules do.
    later = {"_target_": "nequip.model.ModelFromPackage", "package_path": "gone.nequip.zip"}
    package(tmp_path / "second.nequip.zip", later, modules)
    found, weights = open_pretrained(str(tmp_path / "second.nequip.zip"))
    default = {"radial_features": 6} if kind == "allegro" else {}  # as many as scalars
    assert found == replace(want, num_neighbors=pytest.approx(17.0, rel=1e-14), **default)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    package(tmp_path / "other.zip", later, torch.nn.Module())
    with pytest.raises(ValueError, match="no package of one NequIP or Allegro model that we know"):
        open_pretrained(str(tmp_path / "other.zip"))


def test_a_package_changes_none_of_our_functions(tmp_path):
    """What a pickle gets by name it can set attributes of, as the default values of a function."""
    words = [b"\x8c" + bytes([len(word)]) + word for word in (b"torch._utils", b"_rebuild_tensor_v2", b"__defaults__")]
    hostile = b"\x80\x04" + words[0] + words[1] + b"\x93N}" + words[2] + b"K\x01\x85s\x86b."
    with zipfile.ZipFile(tmp_path / "one.nequip.zip", "w") as file:
        file.writestr("one/model/config.yaml", "training_module: {model: {type_names: [Al]}}")
        file.writestr("one/model/eager_model.pkl", hostile)
    with pytest.raises(ValueError, match="0 models of nequip"):
        open_pretrained(str(tmp_path / "one.nequip.zip"))
    assert package_zip._tensor.__defaults__ is None


def repacked(source: Path, target: Path) -> None:
    """The same files compressed, and one more of zeros."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("more", bytes(20_000_000))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch.package's own
def test_a_package_that_would_fill_the_memory_is_refused(tmp_path):
    """By zeros that are compressed, or by a tensor that is one number again and again."""
    config, model = potential(tmp_path / "old", ["Ni", "Cu", "Al"])
    state = {f"sole_model.{k}": v for k, v in native_to_nequip(model.state_dict(), config).items()}
    modules = modules_of(state, options_of(config))
    package(tmp_path / "fine.nequip.zip", nequip_arguments(config), modules)
    repacked(tmp_path / "fine.nequip.zip", tmp_path / "zeros.nequip.zip")
    with pytest.raises(ValueError, match="it unpacks to more than 10 times its size"):
        open_pretrained(str(tmp_path / "zeros.nequip.zip"))
    modules.register_buffer("wide", torch.zeros(1).expand(10**15))  # petabytes, if it were copied
    package(tmp_path / "wide.nequip.zip", nequip_arguments(config), modules)
    with pytest.raises(ValueError, match="its tensors are more than 10 times its size"):
        open_pretrained(str(tmp_path / "wide.nequip.zip"))
    content = (tmp_path / "fine.nequip.zip").read_bytes()
    (tmp_path / "cut.nequip.zip").write_bytes(content[: len(content) // 2] + content[-1000:])
    with pytest.raises(ValueError, match=r"cut\.nequip\.zip is no (checkpoint|package)"):
        open_pretrained(str(tmp_path / "cut.nequip.zip"))


def test_a_checkpoint_that_began_from_another(tmp_path):
    config, model = potential(tmp_path / "old", ["Ni", "Cu", "Al"])
    state = native_to_nequip(model.state_dict(), config)
    torch.save({"model": nequip_arguments(config), "state_dict": state}, tmp_path / "first.pt")
    section = {"_target_": "nequip.model.ModelFromCheckpoint", "checkpoint_path": str(tmp_path / "first.pt")}
    change = {"modifier": "modify_PerTypeScaleShift", "scales": {"Ni": 2.0}, "scales_trainable": True}
    section = {"_target_": "nequip.model.modify", "model": section, "modifiers": [change]}
    state["model.func.per_type_energy_scale_shift.scales"] += 1
    torch.save({"model": section, "state_dict": state}, tmp_path / "second.pt")
    found, weights = open_pretrained(str(tmp_path / "second.pt"))
    assert found.energy_scales == pytest.approx([scale + 1 for scale in config.energy_scales], abs=1e-12)
    assert torch.equal(weights["readout.weights.0"], model.state_dict()["readout.weights.0"])
    change["modifier"] = "modify_all"
    torch.save({"model": section, "state_dict": state}, tmp_path / "second.pt")
    with pytest.raises(ValueError, match="it was changed by modify_all, which we have nothing for"):
        open_pretrained(str(tmp_path / "second.pt"))
    (tmp_path / "first.pt").unlink()
    with pytest.raises(ValueError, match=r"second.pt began from .*first.pt, which says the architecture and is not"):
        open_pretrained(str(tmp_path / "second.pt"))
    section["model"]["checkpoint_path"], change["modifier"] = str(tmp_path / "second.pt"), "enable_Triton"
    torch.save({"model": section, "state_dict": state}, tmp_path / "second.pt")
    with pytest.raises(ValueError, match=r"second.pt began from itself"):
        open_pretrained(str(tmp_path / "second.pt"))
    torch.save(
        {"model": {"_target_": "nequip.model.ModelFromCheckpoint"}, "state_dict": state}, tmp_path / "second.pt"
    )
    with pytest.raises(ValueError, match="names no type_names"):
        open_pretrained(str(tmp_path / "second.pt"))


def test_averaged_weights_of_the_package_are_taken(tmp_path):
    config, model = potential(tmp_path / "old", ["Ni", "Cu", "Al"], train_bessels=True)
    state = {f"model.sole_model.{k}": v for k, v in native_to_nequip(model.state_dict(), config).items()}
    order = [k for k in state if not k.endswith(("_rmax_recip", "scales", "shifts"))]
    state |= {f"ema.ema_weight_{i}": 2 * state[k] for i, k in enumerate(order)}
    found = {"hyper_parameters": {"model": nequip_arguments(config)}, "state_dict": state}
    torch.save(found, tmp_path / "best.ckpt")
    _, weights = open_pretrained(str(tmp_path / "best.ckpt"))
    torch.testing.assert_close(weights["elements"], 2 * model.state_dict()["elements"])
    moved = found | {"schedulefree_optimizer_state_dict": {"param_groups": [{"train_mode": True}]}}
    torch.save(moved, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt has the weights that a schedule-free optimizer moves"):
        open_pretrained(str(tmp_path / "last.ckpt"))
    del state["ema.ema_weight_2"]
    torch.save(found, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="which is which cannot be told"):
        open_pretrained(str(tmp_path / "best.ckpt"))


@pytest.mark.parametrize(("kind", "more"), [("nequip", {}), ("allegro", {}), ("allegro", {"radial": "spline"})])
def test_new_elements_by_the_stated_rule(kind, more, tmp_path):
    potential(tmp_path / "old", ["Ni", "Al"], kind, **more)
    source, elements = str(tmp_path / "old"), ["Al", "Cu", "Ni"]
    # Structures of Al1Cu1 at 5 eV and Ni2Cu3 at 7: by the shifts of the old, 3 eV are left for Cu, and 9 for 3 Cu.
    counts, energies = np.array([[1, 1, 0], [0, 3, 2]]), np.array([5.0, 7.0])
    statistics = {"num_neighbors_mean": 9.0, "forces_rms": 3.0, "per_element_energy": [0, 0, 0]}
    statistics |= {"energy_normal": (counts.T @ counts).tolist(), "energy_right": (counts.T @ energies).tolist()}
    wanted = model_config(source, "fp64", source, cutoff=None, elements=elements)
    shape = wanted.on(elements, statistics)
    assert shape.num_neighbors == 17.0 and shape.energy_scales == pytest.approx([0.3, 0.2, 0.1])
    assert shape.energy_shifts == pytest.approx([2.0, 3.0, -1.0])
    with pytest.raises(ValueError, match=r"model_kwargs.energy_shifts: Nl is no symbol of an element"):
        model_config(source, "fp64", source, cutoff=None, energy_shifts={"Nl": 7.0})
    some = model_config(
        source, "fp64", source, cutoff=None, elements=elements, energy_shifts=OmegaConf.create({"Ni": 7.0})
    )
    moved = some.on(elements, statistics)
    assert moved.energy_shifts == pytest.approx([2.0, 3.0, 7.0])
    begun = open_pretrained(source)[0]
    assert (
        "by model_kwargs.energy_shifts, so energies are not its own, but forces"
        in what_is_kept("old", begun, moved)[1]
    )
    moved.num_neighbors = 2.0
    assert "energy_shifts, so neither energies nor forces are" in what_is_kept("old", begun, moved)[1]
    notes = []
    config = {"init_from": source, "seed": 3, "adamw_kwargs": {"lr": 0.005}}
    config["dataset"] = {"load_dataset_kwargs": {"data_files": str(RECIPE / "data" / "train.extxyz")}}
    state = read_pretrained(OmegaConf.create(config), shape, notes)
    assert "New elements: Cu; first weights by the seed, energy_shifts by least squares" in notes[1]
    assert "(Cu 3.0000 eV)" in notes[1]
    assert "lr=0.005 is a rate for training from scratch" in notes[2] and "is the bundled sample" in notes[3]
    new = KINDS[kind][1](shape)
    new.load_state_dict(state)
    (tmp_path / "new").mkdir()
    write_potential(tmp_path / "new", shape, KINDS[kind][1], state)
    atoms = read(RECIPE / "data" / "validation.extxyz", "0")
    atoms.set_chemical_symbols(["Ni", "Al"] * (len(atoms) // 2) + ["Ni"] * (len(atoms) % 2))
    energies = []
    for name in ("old", "new"):
        atoms.calc = calculator(tmp_path / name)
        energies.append(atoms.get_potential_energy())
    assert energies[1] == pytest.approx(energies[0], abs=1e-11)


def test_what_cannot_be_begun_from(tmp_path, refused):
    potential(tmp_path / "old", ["Ni", "Al"])
    source = tmp_path / "old"
    message = refused(*like(source))
    assert "there is Cu in the data, and the model knows Ni, Al; model_kwargs.elements=[Ni,Al,Cu] adds it" in message
    message = refused(f"init_from={source}", "model_kwargs.elements=[Al,Ni,Cu]")
    assert f"init_from={source} cannot be used: it has cutoff=3.7" in message and f"give model_tag={source}" in message
    message = refused("init_from=none")
    assert "init_from=none cannot be used: none is no run with checkpoints, no step_<n> and no final_model" in message


def test_another_init_from_is_no_resume(tmp_path, refused):
    for name in ("old", "other"):
        potential(tmp_path / name, ["Ni", "Cu", "Al"])
    kept = f"checkpoint.ckpt_dir={tmp_path / 'run'}"
    run_here("train_ddp", tmp_path / "log", *like(tmp_path / "old"), kept)
    message = refused(*like(tmp_path / "old"), f"init_from={tmp_path / 'other'}", kept, "num_train_steps=2")
    assert "init_from was old and is other" in message or f"init_from was {tmp_path / 'old'}" in message
