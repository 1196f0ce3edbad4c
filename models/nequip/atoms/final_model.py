# SPDX-License-Identifier: Apache-2.0
"""A final model, opened by the calculator that lies in its folder, as a user of it does."""

import importlib.util
import sys
from pathlib import Path


def calculator(folder: Path, device: str = "cpu"):
    """An ASE calculator. Raises ValueError for a folder that is no final model."""
    file = Path(folder) / "calculator.py"
    if not file.exists():
        raise ValueError(f"{folder} is no final model: it has no calculator.py; export.py writes one.")
    name = f"final_model_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look their own module up
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder stays as it is
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module.PotentialCalculator(device=device)
