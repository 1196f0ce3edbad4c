# SPDX-License-Identifier: Apache-2.0
"""The weights as safetensors."""

from pathlib import Path

from safetensors.torch import save_file

from common.step_folder import read_weights


def export(step_folder: Path, target: Path) -> None:
    """Write `target/model.safetensors`."""
    target.mkdir()
    save_file(read_weights(step_folder), target / "model.safetensors")
