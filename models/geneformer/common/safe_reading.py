# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint, or a pickle of plain values, without running what may be hidden in it.

DCP's `.metadata` is a pickle, and so is each entry that is no tensor; both are read here by readers that know a closed
list of classes and build nothing else.
"""

import io
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner, metadata
from torch.distributed.checkpoint.planner import ReadItem


# What `.metadata` consists of, by the module that it is pickled from.
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # a name to a layout
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}  # fmt: skip


class KnownClasses(pickle.Unpickler):
    """Raises UnpicklingError for all that is not in the list."""

    def find_class(self, module: str, name: str):
        """The class of that name, or a dtype of torch."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def read_metadata(step_folder: Path) -> metadata.Metadata:
    """DCP's table of a checkpoint. Raises ValueError for one that holds, or is, anything else."""
    try:
        found = KnownClasses(io.BytesIO((Path(step_folder) / ".metadata").read_bytes())).load()
    except Exception as error:  # bytes that are no pickle raise whatever they happen to mean
        raise ValueError(f"{step_folder}/.metadata cannot be trusted: {error or type(error).__name__}.") from error
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"{step_folder}/.metadata is a {type(found).__name__}, not what DCP writes.")
    files = {str(info.relative_path) for info in found.storage_data.values()}
    if outside := [file for file in files if file != Path(file).name]:
        raise ValueError(f"{step_folder}/.metadata cannot be trusted: it names {outside[0]}, outside of the folder.")
    return found


class StepReader(dcp.FileSystemReader):
    """DCP's reader of a step folder."""

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        """Of all ranks, by `read_metadata`."""
        found = read_metadata(Path(self.path))
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class PlainValues(default_planner.DefaultLoadPlanner):
    """DCP's planner; entries that are no tensors are numbers, text, lists and dicts."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises pickle.UnpicklingError for anything else."""
        found = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            path = self.mappings[read_item.dest_index.fqn]
            default_planner.set_element(self.original_state_dict, path, found)
        else:
            self.state_dict[read_item.dest_index.fqn] = found


def load(state: dict, step_folder: Path, *, no_dist: bool = False) -> None:
    """`dcp.load` of a step folder into `state`, in place. Raises ValueError for what is no part of a checkpoint."""
    try:
        dcp.load(state, storage_reader=StepReader(step_folder), planner=PlainValues(), no_dist=no_dist)
    except dcp.CheckpointException as failure:
        _, (error, _) = min(failure.failures.items())
        if isinstance(error, (ValueError, pickle.UnpicklingError)):
            raise ValueError(f"{step_folder} cannot be trusted: {str(error).splitlines()[0]}") from failure
        raise


class PlainPickle(pickle.Unpickler):
    """Raises UnpicklingError for all but numbers, text, lists, dicts, and numpy's numbers."""

    def find_class(self, module: str, name: str):
        """What makes a numpy number, or bytes as old pickles write them."""
        known = {
            ("numpy.core.multiarray", "scalar"): _number, ("numpy._core.multiarray", "scalar"): _number,
            ("numpy", "dtype"): _number_type, ("_codecs", "encode"): _bytes,
        }  # fmt: skip
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain value")
        return known[module, name]


def _number_type(name: str, *_) -> np.dtype:
    if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?[fiu][1248]", name):
        raise pickle.UnpicklingError("it holds something else than numbers and text")
    return np.dtype(name)


def _number(kind: np.dtype, value: bytes) -> float | int:
    if not isinstance(kind, np.dtype) or kind.kind not in "fiu" or not isinstance(value, bytes):
        raise pickle.UnpicklingError("it holds something else than numbers and text")
    return np.frombuffer(value, kind)[0].item()


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin-1" if encoding == "latin1" else "ascii")


def read_plain(path: Path) -> Any:
    """What a pickle of plain values holds. Raises whatever its bytes happen to mean, if they are no such pickle."""
    return PlainPickle(io.BytesIO(Path(path).read_bytes())).load()


@contextmanager
def pickled_scales_allowed():
    """TransformerEngine unpickles its own state in the block."""
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
