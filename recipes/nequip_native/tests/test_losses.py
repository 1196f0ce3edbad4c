# SPDX-License-Identifier: Apache-2.0
"""Each kind of loss by hand, over labels of which some are missing, and cut in any way into micro-batches."""

import numpy as np
import pytest
import torch

from atoms.losses import loss_terms


SIZES = np.array([2, 3, 1, 4])
STRATA = {2.0: 1.0, 0.5: 0.1}  # in any order


def step() -> tuple[dict, dict]:
    """Labels and predictions of four structures; the second has no energy, the third no forces, two no stress."""
    random = np.random.default_rng(3)
    shapes = {"energy": (4,), "forces": (10, 3), "stress": (4, 3, 3)}
    true = {name: random.normal(size=shape) for name, shape in shapes.items()}
    found = {name: values + random.normal(size=values.shape) * 0.3 for name, values in true.items()}
    true["energy"][1], true["forces"][5], true["stress"][[0, 2]] = np.nan, np.nan, np.nan
    return true, found


def summed(losses, true: dict, found: dict, cuts: list[slice], **weights) -> tuple[dict, np.ndarray]:
    """The terms of the step from micro-batches of structures, and the gradient by the predicted forces."""
    counts = {"energies": 3, "force_components": 27, "stress_components": 18}
    structure, types = np.repeat(np.arange(4), SIZES), torch.arange(10) % 2
    forces, totals = torch.tensor(found["forces"], requires_grad=True), {}
    for cut in cuts:
        atoms = (structure >= cut.start) & (structure < cut.stop)
        predicted = {"energy": torch.tensor(found["energy"][cut]), "forces": forces[torch.tensor(atoms)],
                     "stress": torch.tensor(found["stress"][cut])}  # fmt: skip
        labels = {name: torch.tensor(true[name][atoms if name == "forces" else cut]) for name in true}
        parts = losses(predicted, labels, types[atoms], torch.tensor(SIZES[cut]), counts, weights)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value
    sum(totals.values()).backward()
    return {name: float(value.detach()) for name, value in totals.items()}, forces.grad.numpy()


def by_hand(kind: str, error: float, delta: float) -> float:
    if kind == "mae":
        return abs(error)
    if kind == "mse":
        return error**2
    return error**2 / 2 if abs(error) < delta else delta * (abs(error) - delta / 2)


def expected(kinds: dict, per_atom: bool) -> dict:
    true, found = step()
    terms, weights = {}, {"energy": 2.0, "forces": 3.0, "stress": 5.0}
    for name, kind in kinds.items():
        errors = found[name] - true[name]
        if name == "energy" and per_atom:
            errors = errors / SIZES
        values = []
        for i, error in np.ndenumerate(errors):
            delta, factor = {"energy": 0.01, "forces": 0.2, "stress": 0.3}[name], 1.0
            if name == "forces":
                factor = (1.0, 4.0)[i[0] % 2]
            if kind == "stratified_huber":
                norm = np.linalg.norm(true["forces"][i[0]])
                delta = 1.0 if norm >= 2 else 0.1 if norm >= 0.5 else np.inf
            if np.isfinite(error):
                values.append(factor * by_hand(kind, error, delta))
        terms[f"{name}_loss"] = weights[name] / 10 * np.mean(values)
    return terms


@pytest.mark.parametrize("per_atom", [True, False])
@pytest.mark.parametrize("kinds", [("mse", "mse", "mse"), ("mae", "mae", "mae"), ("huber", "huber", "huber"),
                                   ("mse", "stratified_huber", "mae")])  # fmt: skip
def test_every_kind_in_any_micro_batches(kinds, per_atom):
    losses = loss_terms(
        ["Li", "S"], energy_weight=2.0, forces_weight=3.0, stress_weight=5.0, per_atom_energy=per_atom,
        energy_loss=kinds[0], forces_loss=kinds[1], stress_loss=kinds[2], forces_delta=0.2, stress_delta=0.3,
        element_forces_weights={"S": 4.0}, forces_strata=STRATA if kinds[1] == "stratified_huber" else None,
    )  # fmt: skip
    wanted = expected(dict(zip(("energy", "forces", "stress"), kinds, strict=True)), per_atom)
    gradients = []
    for cuts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        found, gradient = summed(losses, *step(), cuts)
        assert found == pytest.approx(wanted, rel=1e-12)
        gradients.append(gradient)
        assert np.isfinite(gradient).all() and (gradient[5] == 0).all() and (gradient[[0, 1, 9]] != 0).all()
        assert gradient == pytest.approx(gradients[0], rel=1e-12)


def test_weights_of_a_schedule_take_the_place_of_the_configurations():
    losses = loss_terms(["Li", "S"], energy_weight=1.0, forces_weight=1.0)
    found, _ = summed(losses, *step(), [slice(0, 4)], forces_weight=3.0)
    same, _ = summed(loss_terms(["Li", "S"], energy_weight=1.0, forces_weight=3.0), *step(), [slice(0, 4)])
    assert found == pytest.approx(same) and found["stress_loss"] == 0
    none, _ = summed(losses, *step(), [slice(0, 4)], energy_weight=0.0, forces_weight=0.0)
    assert set(none.values()) == {0.0}
