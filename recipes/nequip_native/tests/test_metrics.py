# SPDX-License-Identifier: Apache-2.0
"""Errors are those of the labels, recomputed here by hand; a prediction that is no number is not left out of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.batch import Batch
from metrics import Errors


ELEMENTS, SETS = ["Li", "S"], ["slabs", "Li"]  # the second data set is called as an element is
SIZES, OF_SET = np.array([2, 3, 1, 4]), np.array([0, 1, 1, 0])


def labels_and_predictions() -> tuple[dict, dict]:
    random = np.random.default_rng(5)
    true = {
        "energy": random.normal(size=4),
        "forces": random.normal(size=(10, 3)),
        "stress": random.normal(size=(4, 3, 3)),
    }
    found = {name: values + 0.1 * random.normal(size=values.shape) for name, values in true.items()}
    true["energy"][1], true["forces"][5], true["stress"][[0, 2]] = np.nan, np.nan, np.nan
    true["forces"][0] = 1e-5  # without a direction
    return true, found


def summary(true: dict, found: dict, batches: list[slice]) -> dict:
    """Of structures in batches, whose sums are added as `Validator` does."""
    errors, totals = Errors(ELEMENTS, SETS), {}
    structure, types = np.repeat(np.arange(4), SIZES), np.arange(10) % 2
    for some in batches:
        atoms = (structure >= some.start) & (structure < some.stop)
        of = {name: torch.tensor(true[name][atoms if name == "forces" else some]) for name in true}
        output = {name: torch.tensor(found[name][atoms if name == "forces" else some]) for name in found}
        output["energies"] = output.pop("energy")
        inputs = of | {"structure": torch.tensor(structure[atoms] - some.start), "types": torch.tensor(types[atoms])}
        inputs["data_set"] = torch.tensor(OF_SET[some])
        sums = errors.batch_sums(lambda output=output, **_: SimpleNamespace(**output), Batch(inputs, (0, 0, 0), {}, 0))
        for name, value in sums.items():
            before = totals.get(name, torch.zeros_like(value))
            totals[name] = torch.maximum(before, value) if name.startswith("max_") else before + value
    return errors.summary({name: value.numpy() if value.dim() else float(value) for name, value in totals.items()})


@pytest.mark.parametrize("batches", [[slice(0, 4)], [slice(0, 1), slice(1, 4)], [slice(0, 3), slice(3, 4)]])
def test_by_hand(batches):
    true, found = labels_and_predictions()
    expected = {"num_structures": 4}

    def add(name, errors, of=""):
        errors = np.abs(errors[np.isfinite(errors)])
        values = (
            {"mae": errors.mean(), "rmse": np.sqrt((errors**2).mean()), "max": errors.max()} if len(errors) else {}
        )
        expected.update({f"{name}_{kind}{of}": value for kind, value in values.items()})

    energy, structure, types = found["energy"] - true["energy"], np.repeat(np.arange(4), SIZES), np.arange(10) % 2
    forces, stress = found["forces"] - true["forces"], found["stress"] - true["stress"]
    for of, sets in {"": [0, 1], "/slabs": [0], "/data set Li": [1]}.items():
        here = np.isin(OF_SET, sets)
        add("energy", energy[here], of)
        add("energy_per_atom", (energy / SIZES)[here], of)
        add("forces", forces[here[structure]], of)
        add("stress", stress[here], of)
    for i, element in enumerate(ELEMENTS):
        add("forces", forces[types == i], f"/{element}")
    clear = [i for i in range(1, 10) if i != 5]
    cosines = (true["forces"] * found["forces"]).sum(1) / np.prod(
        [np.linalg.norm(x["forces"], axis=1) for x in (true, found)], 0
    )
    expected["forces_cosine"] = cosines[clear].mean()
    assert summary(true, found, batches) == pytest.approx(expected, rel=1e-12)


def test_a_prediction_that_is_no_number_shows():
    true, found = labels_and_predictions()
    found["energy"][0] = found["forces"][3] = np.nan
    found["energy"][1] = np.nan  # it has no label
    errors = summary(true, found, [slice(0, 4)])
    wrong = {name for name, value in errors.items() if np.isnan(value)}
    kinds = ("mae", "rmse", "max")
    whole = {f"{label}_{kind}" for label in ("energy", "energy_per_atom", "forces") for kind in kinds}
    assert wrong == whole | {"forces_cosine"} | {f"forces_{kind}/S" for kind in kinds} | {
        f"{label}_{kind}/{name}" for kind in kinds for label, name in
        (("energy", "slabs"), ("energy_per_atom", "slabs"), ("forces", "data set Li"))
    }  # fmt: skip
