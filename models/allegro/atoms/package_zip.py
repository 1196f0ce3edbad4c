# SPDX-License-Identifier: Apache-2.0
"""Packages of `nequip-package`, zip files with the YAML, pickled modules and their tensors; no code in them is run."""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor


UNPACKED = 10  # so many times as large as the file may be what it holds; packages are not compressed


def first_words(error: Exception) -> str:
    """The beginning of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def package_folder(path: Path) -> str | None:
    """The folder that everything in a package is in; None for another file."""
    try:
        with zipfile.ZipFile(path) as file:
            found = [name for name in file.namelist() if name.endswith("/model/eager_model.pkl")]
    except zipfile.BadZipFile:
        return None
    return found[0].partition("/")[0] if found else None


class Nothing:
    """Stands for an object of any class: it keeps the attributes and does nothing."""

    def __new__(cls, *arguments):
        found = super().__new__(cls)
        found.arguments = arguments
        return found

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})

    def __call__(self, *arguments) -> "Nothing":
        return Nothing()

    def append(self, value):
        """As of a list."""

    def __setitem__(self, key, value):
        """As of a dict."""


class PackedTensors(pickle.Unpickler):
    """Modules as `Nothing`, with their tensors; no class or function that the pickle names is looked for."""

    def __init__(self, file: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(file.read(f"{folder}/model/eager_model.pkl")))
        self.file, self.folder = file, folder
        self.storages: dict[tuple[str, str], Tensor] = {}  # each is read once, however often it is named

    def find_class(self, module: str, name: str):
        """Dicts, tensors, and `Nothing` under its own name."""
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        known = {"_rebuild_tensor_v2": _tensor, "_rebuild_parameter": _parameter}
        if module == "torch._utils" and name in known:
            return lambda *arguments: known[name](*arguments)  # not ours itself: a pickle can set its attributes
        return type(name, (Nothing,), {})

    def persistent_load(self, identity: tuple):
        """The numbers of a tensor; other things, as modules of Python, are nothing."""
        if identity[0] != "storage":
            return Nothing()
        _, kind, key, *_, size = identity
        dtype = {"FloatStorage": "float32", "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32",
                 "BoolStorage": "bool"}[kind.__name__]  # fmt: skip
        if not size:
            return torch.empty(0)
        if (key, dtype) not in self.storages:
            content = bytearray(self.file.read(f"{self.folder}/.data/{key}.storage"))
            self.storages[key, dtype] = torch.frombuffer(content, dtype=getattr(torch, dtype))
        return self.storages[key, dtype]


def _tensor(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_) -> Tensor:
    return numbers.as_strided(size, stride, offset)  # takes no memory, whatever size it claims


def _parameter(tensor: Tensor, *_) -> Tensor:
    return tensor


def tensors_of(module: Nothing, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """As `named_parameters` and `named_buffers`."""
    state = vars(module)
    for name, value in [*state.get("_parameters", {}).items(), *state.get("_buffers", {}).items()]:
        if isinstance(value, Tensor):
            yield prefix + name, value
    for name, child in state.get("_modules", {}).items():
        if isinstance(child, Nothing):
            yield from tensors_of(child, f"{prefix}{name}.")


def read_package(path: Path, folder: str) -> tuple[dict, dict[str, Tensor]]:
    """The section `model` and the weights of a package, which are the averaged ones already.

    Where the YAML of the training names another model instead of an architecture, that is read off the modules.
    """
    with zipfile.ZipFile(path) as file:
        try:
            largest = UNPACKED * path.stat().st_size
            if sum(info.file_size for info in file.infolist()) > largest:
                raise ValueError(f"it unpacks to more than {UNPACKED} times its size")
            section = yaml.safe_load(file.read(f"{folder}/model/config.yaml"))["training_module"]["model"]
            modules = PackedTensors(file, folder).load()
            weights = dict(tensors_of(modules))
            if sum(weight.nbytes for weight in weights.values()) > largest:
                raise ValueError(f"its tensors are more than {UNPACKED} times its size")
            section = section if "type_names" in section else architecture(modules)
            return section, {name: weight.clone() for name, weight in weights.items()}
        except OSError:
            raise
        except Exception as error:  # bytes that are no pickle raise whatever they happen to mean
            raise ValueError(
                f"{path} is no package of one NequIP or Allegro model that we know ({first_words(error)})."
            ) from error


# ---- the arguments that modules were made with


def child(module: Nothing, path: str) -> Nothing:
    """By dotted names. Raises KeyError where there is none."""
    for name in path.split("."):
        module = vars(module)["_modules"][name]
    return module


def irreps(module: Nothing, name: str) -> list[tuple[int, int, int]]:
    """Numbers, l and parities of an attribute with e3nn's irreps."""

    def plain(value):
        value = value.arguments[0] if isinstance(value, Nothing) else value
        return tuple(plain(one) for one in value) if isinstance(value, tuple) else value

    return [(number, *irrep) for number, irrep in plain(vars(module)[name])]


def hidden(module: Nothing, name: str) -> dict:
    """Depth, width and nonlinearity of a network's hidden layers."""
    layers = vars(child(module, "mlp"))["_modules"].values()
    weights = [vars(layer)["_parameters"]["weight"] for layer in layers if vars(layer)["_parameters"]]
    between = {type(layer).__name__.lower() for layer in layers if not vars(layer)["_parameters"]}
    if len(weights) == 1:
        return {f"{name}_depth": 0}
    nonlinearity = between.pop() if len(between) == 1 else None
    found = {f"{name}_depth": len(weights) - 1, f"{name}_width": len(weights[1])}
    return found | {f"{name.partition('_hidden')[0]}_nonlinearity": nonlinearity}


def bessels(encoding: Nothing) -> dict:
    """Of a Bessel basis."""
    trained = "bessel_weights" in vars(encoding)["_parameters"]
    number = dict(tensors_of(encoding))["bessel_weights"].numel()
    power = vars(child(encoding, "cutoff"))["p"]
    return {"num_bessels": number, "bessel_trainable": trained, "polynomial_cutoff_p": power}


def architecture(modules: Nothing) -> dict:
    """The section `model` that makes these modules. Raises KeyError and the like for others."""
    model = child(modules, "sole_model")
    whole, said = child(model, "model.func"), vars(model)["_metadata"]
    parts, names = vars(whole)["_modules"], list(vars(model)["type_names"])
    shift = vars(parts["per_type_energy_scale_shift"])
    norm = next(value for name, value in tensors_of(whole) if name.endswith("norm_const"))
    numbers = norm.flatten().double().pow(-2).tolist()
    found = {
        "type_names": names, "model_dtype": said["model_dtype"], "r_max": float(said["r_max"]),
        "avg_num_neighbors": dict(zip(names, numbers, strict=True)) if len(numbers) > 1 else numbers[0],
        **{f"per_type_energy_{name}_trainable": name in shift["_parameters"] for name in ("scales", "shifts")},
    }  # fmt: skip
    if (pair := parts.get("pair_potential")) is not None:
        found["pair_potential"] = {"_target_": type(pair).__name__, "chemical_species": names}
        if type(pair).__name__ == "ZBL":
            real = float(vars(pair)["_buffers"]["_qqr2exesquare"]) > 100
            found["pair_potential"] |= {"units": "real" if real else "metal"}
            found["pair_potential"] |= {"polynomial_cutoff_p": vars(child(pair, "cutoff"))["p"]}
    return found | (allegro_parts(whole) if "allegro" in parts else nequip_parts(whole))


def nequip_parts(whole: Nothing) -> dict:
    """What is NequIP's own."""
    layers = [layer for name, layer in vars(whole)["_modules"].items() if name.endswith("_convnet")]
    kept = irreps(layers[0], "feature_irreps_hidden")
    if any(irreps(layer, "feature_irreps_hidden") != kept for layer in layers[:-1]):
        raise ValueError("its layers have different irreps")
    if vars(child(whole, "type_embed.categorical_graph_field_embed_modules"))["_modules"]:
        raise ValueError("it embeds more than elements")
    by_l = {l: number for number, l, _ in kept}  # noqa: E741
    l_max = max(l for _, l, _ in irreps(child(whole, "spharm"), "irreps_edge_sh"))  # noqa: E741
    radial, readout = child(layers[0], "conv.edge_mlp"), child(whole, "per_atom_energy_readout.mlp_module")
    return {
        "_target_": "nequip.model.NequIPGNNModel", "num_layers": len(layers), "l_max": l_max,
        "num_features": [by_l.get(l, 1) for l in range(l_max + 1)],  # noqa: E741
        "parity": any(p != (-1) ** l for _, l, p in kept),  # noqa: E741
        "type_embed_num_features": dict(tensors_of(whole))["type_embed.embed_module.weight"].shape[1],
        **bessels(child(whole, "bessel_encode")),
        **{key: value for key, value in hidden(radial, "radial_mlp").items() if "nonlin" not in key},  # always SiLU
        **hidden(readout, "readout_mlp_hidden_layers"),
    }  # fmt: skip


def allegro_parts(whole: Nothing) -> dict:
    """What is Allegro's own."""
    core, embed = child(whole, "allegro"), child(whole, "radial_chemical_embed")
    if "spline" in vars(embed)["_modules"]:
        spline = vars(child(embed, "spline"))
        width, options = spline["num_channels"], {key: spline[key] for key in ("num_splines", "spline_span")}
        options["_target_"] = "allegro.nn.TwoBodySplineScalarEmbed"
    else:
        width = dict(tensors_of(embed))["type_embed.basis_linear.mlp.0.weight"].shape[1]
        options = {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", **bessels(child(embed, "bessel_encode"))}
    product = child(core, "tps.0")
    return {
        "_target_": "allegro.model.AllegroModel", "radial_chemical_embed": options, "radial_chemical_embed_dim": width,
        "l_max": max(l for _, l, _ in irreps(product, "irreps_in2")),  # noqa: E741
        "parity": any(p != (-1) ** l for _, l, p in irreps(core, "tensor_track_allowed_irreps")),  # noqa: E741
        "num_layers": vars(core)["num_layers"], "num_scalar_features": vars(core)["num_scalar_features"],
        "num_tensor_features": vars(core)["num_tensor_features"],
        "tp_path_channel_coupling": vars(product)["path_channel_coupling"],
        **hidden(child(whole, "scalar_embed_mlp.mlp_module"), "scalar_embed_mlp_hidden_layers"),
        **hidden(child(core, "latents.0"), "allegro_mlp_hidden_layers"),
        **hidden(child(whole, "edge_readout.mlp_module"), "readout_mlp_hidden_layers"),
    }  # fmt: skip
