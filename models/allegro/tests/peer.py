# SPDX-License-Identifier: Apache-2.0
"""The packages' side of golden.json: their model, our weights, the same structures, loss and gradients."""

from collections.abc import Callable

import torch
from golden import WEIGHTS, digest, labelled
from torch import Tensor


def peer_model(
    package: str, arguments: dict, state: dict[str, Tensor], compile_mode: str = "eager"
) -> torch.nn.Module:
    """Their model with these weights; what a state dict of ours lacks must be a table."""
    from hydra.utils import get_method
    from nequip.utils.global_state import set_global_state

    set_global_state()
    arguments = dict(arguments)
    model = get_method(arguments.pop("_target_"))(**arguments, compile_mode=compile_mode)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tables = ("output_mask", "w3j", "_empty", "mul.weight", "tp.weight", ".bias", "atomic_numbers", "_qqr2exesquare",
              "spline.lower", "spline.upper")  # fmt: skip
    assert not unexpected, unexpected
    assert not [name for name in missing if not any(table in name for table in tables)], missing
    return model


def peer_output(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their energies, forces and stress; of a molecule the stress means nothing."""
    from nequip.data import AtomicDataDict as keys

    number = torch.bincount(inputs["structure"])
    data = {
        keys.POSITIONS_KEY: inputs["positions"].clone(), keys.EDGE_INDEX_KEY: inputs["edges"],
        # Without a volume they would divide by 0.
        keys.CELL_KEY: torch.where(inputs["cell"].any(-1).any(-1)[:, None, None], inputs["cell"], 50 * torch.eye(3)),
        keys.EDGE_CELL_SHIFT_KEY: inputs["shifts"], keys.ATOM_TYPE_KEY: inputs["types"],
        keys.BATCH_KEY: inputs["structure"], keys.NUM_NODES_KEY: number,
    }  # fmt: skip
    out = model(data)
    stress = torch.where(inputs["cell"].any(-1).any(-1)[:, None, None], out[keys.STRESS_KEY], 0.0)
    return {"energy": out[keys.TOTAL_ENERGY_KEY].flatten(), "forces": out[keys.FORCE_KEY], "stress": stress}


def peer_digest(package: str, arguments: dict, state: dict[str, Tensor], to_native: Callable) -> dict:
    """As `our_digest`; gradients go back under our names as weights do."""
    model, inputs = peer_model(package, arguments, state).train(), labelled()
    found, total = peer_output(model, inputs), sum(WEIGHTS.values())
    sizes = torch.bincount(inputs["structure"])
    loss = WEIGHTS["energy_weight"] / total * ((found["energy"] - inputs["energy"]) / sizes).square().mean()
    loss = loss + WEIGHTS["forces_weight"] / total * (found["forces"] - inputs["forces"]).square().mean()
    loss = loss + WEIGHTS["stress_weight"] / total * (found["stress"][0] - inputs["stress"][0]).square().mean()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    gradients = {n: torch.zeros_like(p) if gradients[n] is None else gradients[n]
                 for n, p in zip(names, parameters, strict=True)}  # fmt: skip
    ours = to_native(state | gradients)
    for name in ("scales", "shifts"):
        if f"added_{name}" in ours:
            ours[f"added_{name}"] = gradients[f"model.func.per_type_energy_scale_shift.{name}"].flatten()
    if "bessel.moved" in ours:  # it is made of a difference to whole numbers
        key = next(name for name in gradients if name.endswith("bessel_weights"))
        ours["bessel.moved"] = gradients[key].flatten()
    return digest(found["energy"], found["forces"], found["stress"], ours)
