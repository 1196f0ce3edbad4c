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


def package_folder(path: Path) -> str | None:
    """The folder that everything in a package is in; None for another file."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        found = [name for name in file.namelist() if name.endswith("/model/eager_model.pkl")]
    return found[0].partition("/")[0] if found else None


class Nothing:
    """Stands for an object of any class: it keeps the attributes and does nothing."""

    def __init__(self, *arguments):
        self.arguments = arguments

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

    def find_class(self, module: str, name: str):
        """Dicts, tensors, and `Nothing` under its own name."""
        known = {"OrderedDict": dict, "_rebuild_tensor_v2": _tensor, "_rebuild_parameter": _parameter}
        if module in ("collections", "torch._utils") and name in known:
            return known[name]
        return type(name, (Nothing,), {})

    def persistent_load(self, identity: tuple):
        """The numbers of a tensor; other things, as modules of Python, are nothing."""
        if identity[0] != "storage":
            return Nothing()
        _, kind, key, *_, size = identity
        dtype = {"FloatStorage": "float32", "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32",
                 "BoolStorage": "bool"}[kind.__name__]  # fmt: skip
        content = bytearray(self.file.read(f"{self.folder}/.data/{key}.storage")) if size else b""
        return torch.frombuffer(content, dtype=getattr(torch, dtype)) if size else torch.empty(0)


def _tensor(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_) -> Tensor:
    return numbers.as_strided(size, stride, offset).clone()


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
    """The section `model` and the weights of a package, which are the averaged ones already."""
    with zipfile.ZipFile(path) as file:
        try:
            section = yaml.safe_load(file.read(f"{folder}/model/config.yaml"))["training_module"]["model"]
            weights = dict(tensors_of(PackedTensors(file, folder).load()))
        except OSError:
            raise
        except Exception as error:  # as of a checkpoint
            what = (str(error) or type(error).__name__).splitlines()[0][:100]
            raise ValueError(f"{path} is no package as nequip-package writes it ({what}).") from error
    return section, weights
