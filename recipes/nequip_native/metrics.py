# SPDX-License-Identifier: Apache-2.0
"""Errors of energies, forces and stress: of all structures, by element and by data set.

Means are over all frames, atoms or components of the whole set, on any number of ranks; batches are never averaged.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atoms.parity import parity_plot
from common.batch import Batch
from common.command import writing
from common.distributed import Distributed
from common.files import finite


UNIT = "atoms"  # of `Batch.counts`, by which throughput and progress go
LOSS_NAME = "Energy, force and stress loss"
BETTER = {"energy_per_atom_mae": min, "forces_mae": min, "forces_rmse": min}  # by which a best checkpoint can be kept
LEAST_FORCE = 1e-3  # eV/A: a smaller force has no direction to speak of
UNITS = {"energy": "eV", "energy_per_atom": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³"}
# What plots and the terminal show of a validation: by title the curves, and their names in metrics.jsonl.
CURVES = {
    f"{what} error, {UNITS[label]}": {"MAE": f"{label}_mae", "RMSE": f"{label}_rmse"}
    for what, label in (("Energy", "energy_per_atom"), ("Force", "forces"), ("Stress", "stress"))
}


class Errors:
    """Sums of errors over a batch, and the metrics from the sums of all ranks; `elements` are the model's types.

    `labels` are those of energy, forces and stress that some structure has.
    """

    def __init__(
        self, elements: list[str], data_sets: list[str], labels: Sequence[str] = ("energy", "forces", "stress")
    ):
        self.elements, self.data_sets, self.labels = elements, data_sets, labels

    def batch_sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return, for one batch, the number, sum, sum of squares and maximum of errors, by data set or element."""
        inputs = dict(batch.inputs)
        data_set = inputs.pop("data_set")
        output = model(**inputs, counts=dict.fromkeys(batch.counts, 1))
        structure = inputs["structure"]
        num_atoms = torch.bincount(structure, minlength=len(inputs["energy"]))
        energy, label = output.energies.detach().double()[:, None], inputs["energy"][:, None]
        forces, of_atom = output.forces.detach().double(), data_set[structure]
        each, number = num_atoms[:, None], len(self.data_sets)
        found = {
            **_sums("energy", energy, label, data_set, number),
            **_sums("energy_per_atom", energy / each, label / each, data_set, number),
            **_sums("forces", forces, inputs["forces"], of_atom, number),
            **_sums("of_element", forces, inputs["forces"], inputs["types"], len(self.elements)),
        }
        if getattr(output, "stress", None) is not None:
            both = (one.detach().double().reshape(-1, 9) for one in (output.stress, inputs["stress"]))
            found |= _sums("stress", *both, data_set, number)
        size = inputs["forces"].norm(dim=-1)
        both = forces.norm(dim=-1) * size
        clear = (size > LEAST_FORCE) & (both != 0)  # false for NaN, where there is no label
        cosine = torch.where(clear, (forces * inputs["forces"]).sum(-1) / both, 0.0)
        return found | {
            "cosine": cosine.sum(),
            "cosine_number": clear.sum(),
            "structures": torch.ones_like(energy).sum(),
        }

    def summary(self, sums: dict[str, float | np.ndarray]) -> dict:
        """Return `<label>_mae`, `_rmse`, `_max` in eV and A; of forces also by element, and all by data set."""
        found: dict[str, float | int] = {}
        labels = [label for label in UNITS if f"{label}_number" in sums]
        for label in labels:
            found |= _errors(label, *(_one(sums, label, part) for part in PARTS))
        if sums["cosine_number"]:
            found["forces_cosine"] = float(sums["cosine"] / sums["cosine_number"])
        for i, element in enumerate(self.elements):
            found |= {
                f"{k}/{element}": v
                for k, v in _errors("forces", *(sums[f"{n}"][i] for n in _names("of_element"))).items()
            }
        for i, name in enumerate(self.data_sets if len(self.data_sets) > 1 else []):
            name = f"data set {name}" if name in self.elements else name
            for label in labels:
                found |= {f"{k}/{name}": v for k, v in _errors(label, *(sums[n][i] for n in _names(label))).items()}
        return found | {"num_structures": int(sums["structures"])}


class Recorded(Errors):
    """Also keeps true and predicted values, by micro-batch, because a rank without one repeats another's."""

    def __init__(self, errors: Errors):
        super().__init__(errors.elements, errors.data_sets, errors.labels)
        self.seen: dict[tuple, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        self.types: dict[tuple, np.ndarray] = {}

    def batch_sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the same sums, and keep the values; the model is called once."""
        outputs = []

        def asked(**inputs):
            outputs.append(model(**inputs))
            return outputs[0]

        sums = super().batch_sums(asked, batch)
        inputs, output = batch.inputs, outputs[0]
        num_atoms = torch.bincount(inputs["structure"], minlength=len(inputs["energy"]))
        found = {
            "energy_per_atom": (inputs["energy"] / num_atoms, output.energies / num_atoms),
            "forces": (inputs["forces"], output.forces), "stress": (inputs["stress"], output.stress),
        }  # fmt: skip
        self.seen[batch.name] = {k: tuple(one.detach().cpu().double().numpy() for one in v) for k, v in found.items()}
        self.types[batch.name] = inputs["types"].cpu().numpy()
        return sums

    def report(self, distributed: Distributed, errors: dict, source: str, folder: Path) -> None:
        """Print a table, and write `errors.json` and `parity.png` of all ranks' structures; all ranks call it."""
        ranks = distributed.gather((self.seen, self.types))
        if not distributed.is_main:
            return
        seen = {name: one for others, _ in ranks for name, one in others.items()}
        types = {name: one for _, others in ranks for name, one in others.items()}
        both = {
            label: tuple(np.concatenate([seen[name][label][i].ravel() for name in sorted(seen)]) for i in (0, 1))
            for label in ("energy_per_atom", "forces", "stress")
        }
        symbols = np.repeat(np.array(self.elements)[np.concatenate([types[name] for name in sorted(types)])], 3)
        title = f"{'/'.join(Path(source).resolve().parts[-2:])} on {errors['num_structures']:,} structures"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "errors.json").write_text(json.dumps(finite(errors), indent=1) + "\n")
            parity_plot(folder / "parity.png", both, UNITS, {"forces": symbols}, title)
        for name, value in errors.items():
            distributed.say(f"{name:30} {value:,}" if isinstance(value, int) else f"{name:30} {value:.6f}")
        distributed.say(f"written: {folder}/errors.json, {folder}/parity.png")


PARTS = ("number", "absolute", "square", "max")


def _names(label: str) -> list[str]:
    return [f"max_{label}" if part == "max" else f"{label}_{part}" for part in PARTS]


def _sums(name: str, found: Tensor, label: Tensor, group: Tensor, number: int) -> dict[str, Tensor]:
    """Add up errors [N, components] by group [N]; a label of NaN is none, and a prediction of NaN counts."""
    labelled = torch.isfinite(label).all(-1)
    errors = torch.where(labelled[:, None], found - label, 0.0)
    zeros = errors.new_zeros(number)
    largest = zeros.scatter_reduce(0, group, errors.abs().amax(-1), "amax")
    values = (labelled * float(errors.shape[1]), errors.abs().sum(-1), errors.square().sum(-1))
    return dict(
        zip(_names(name), [*(zeros.index_add(0, group, v.to(zeros.dtype)) for v in values), largest], strict=True)
    )


def _one(sums: dict, label: str, part: str) -> float:
    return float(np.max(sums[f"max_{label}"]) if part == "max" else np.sum(sums[f"{label}_{part}"]))


def _errors(label: str, number: float, absolute: float, square: float, largest: float) -> dict[str, float]:
    """Return mean, root mean square and largest error; nothing if there was no label."""
    if not number:
        return {}
    return {
        f"{label}_mae": float(absolute / number),
        f"{label}_rmse": math.sqrt(square / number),
        f"{label}_max": float(largest),
    }
