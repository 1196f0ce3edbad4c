# SPDX-License-Identifier: Apache-2.0
"""A final model, opened by the calculator that lies in its folder, as a user of it does, and what it is asked of."""

import importlib.util
import sys
from pathlib import Path

import torch


def calculator(*folders: Path, device: str | None = None):
    """An ASE calculator, of several folders a committee's; on a GPU, unless told otherwise, where there is one.

    Raises ValueError for a folder that is no final model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for folder in map(Path, folders):
        if not (folder / "calculator.py").exists():
            inside = (folder / "final_model" / "calculator.py").exists()
            instead = f"give {folder / 'final_model'}" if inside else "export.py writes one"
            raise ValueError(f"{folder} is no final model: it has no calculator.py; {instead}.")
    file = Path(folders[0]) / "calculator.py"
    name = f"final_model_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look their own module up
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder stays as it is
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    if len(folders) == 1:
        return module.PotentialCalculator(device=device)
    return module.CommitteeCalculator(folders, device)


def frames(path: Path, index: str) -> list:
    """Structures of a file that ASE reads. Raises ValueError for one that it does not read, or that has none."""
    from ase.io import read

    try:
        found = read(path, index)
    except Exception as error:  # ASE's readers raise whatever a line happens to break
        if isinstance(error, OSError) and error.strerror:  # the system's, as of a file that is not there
            raise
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read by ASE: {what}") from error
    if not found:
        raise ValueError(f"{path} has no structures in it.")
    return found


def refuse_existing(*targets: Path) -> None:
    """Raise ValueError for a file that would be written over, or whose folder is not there."""
    for target in targets:
        if target.exists():
            raise ValueError(f"{target} exists; move it away or give another name.")
        if not target.parent.is_dir():
            raise ValueError(f"{target} cannot be written: there is no folder {target.parent}.")
