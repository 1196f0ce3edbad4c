# SPDX-License-Identifier: Apache-2.0
"""Weights by name: read from a folder or the hub one at a time, and written into a model that may be sharded."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.files import UNWRITABLE
from common.random_numbers import seed_from


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: what a checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def listed(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "none"


def copy_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy full CPU tensors by name into `model`, which may be sharded; one at a time is read from `values`.

    Raises ValueError where names are missing, unexpected, or belong to tensors of another shape.
    """
    tensors = named_tensors(model)
    missing, unexpected = sorted(tensors.keys() - values.keys()), sorted(values.keys() - tensors.keys())
    if missing or unexpected:
        raise ValueError(
            f"These weights do not fit the model: missing {listed(missing)}; unexpected {listed(unexpected)}."
        )
    fill(tensors, values.__getitem__)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], full_value: Callable[[str], Tensor]) -> None:
    """Write `full_value(name)` into each tensor, or this rank's part of it into each DTensor."""
    for name, tensor in tensors.items():
        value = full_value(name)
        if value.shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} where the model has {tuple(tensor.shape)}.")
        if isinstance(tensor, DTensor):
            # src_data_rank=None: every rank has the full value and cuts its own part out of it.
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def random_normal(shape: torch.Size, std: float, *key: int | str) -> Tensor:
    """A full FP32 tensor on the CPU that depends on the key alone, as the first value of a weight."""
    generator = torch.Generator("cpu").manual_seed(seed_from(*key))
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)


def random_uniform(shape: torch.Size, limit: float, *key: int | str) -> Tensor:
    """Likewise, between -limit and limit."""
    generator = torch.Generator("cpu").manual_seed(seed_from(*key))
    return torch.empty(shape, device="cpu").uniform_(-limit, limit, generator=generator)


class LazyTensors(Mapping):
    """A state dict that makes a tensor when it is read, so that one at a time takes memory."""

    def __init__(self, makers: dict[str, Callable[[], Tensor]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def read(state_dict: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    """A maker of the tensor `name`, unchanged."""
    return partial(state_dict.__getitem__, name)


def reason(error: Exception) -> str:
    """Why the hub does not give something, in one sentence."""
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the cache, and the hub cannot be reached or is not asked (HF_HUB_OFFLINE)."
    if isinstance(error, GatedRepoError):
        return "its owner lets in whom he knows; ask on its page, and log in by HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        return "there is nothing of that name, or it is private (HF_TOKEN)."
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"its cache cannot be written ({error.filename}: {error.strerror}); set HF_HOME to a folder that can."
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def local_folder(source: str) -> Path:
    """`source` if it is a folder, or else what the hub has under that name. Raises ValueError if there is none."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"{source} is a file; give the folder of a model.")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:  # no name that the hub could have
        raise ValueError(
            f"{source} is no local folder{', and addresses are not read' * ('://' in source)}; give the folder of a "
            "model, or a name from the hub, OWNER/NAME."
        )
    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those of its names ValueErrors
        raise ValueError(f"{source} is no local folder, and the hub does not give it: {reason(error)}") from error
    return folder


def named_type(folder: Path) -> str | None:
    """The kind of model that a folder's config.json names. Raises ValueError where there is none."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is no JSON of a model"
        raise ValueError(f"{folder / 'config.json'}: {what}; give the folder of a model.") from error


def open_weights(folder: Path) -> Mapping[str, Tensor]:
    """The tensors in a checkpoint folder, memory-mapped: nothing is read before it is asked for."""
    if files := sorted(folder.glob("*.safetensors")):
        opened = [safe_open(file, "pt") for file in files]
        names = ((file, name) for file in opened for name in file.keys())  # noqa: SIM118 (no mapping, just has keys())
        return LazyTensors({name: partial(file.get_tensor, name) for file, name in names})
    weights = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not weights:
        raise ValueError(f"{folder} has neither *.safetensors nor pytorch_model*.bin in it.")
    return weights
