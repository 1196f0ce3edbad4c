# SPDX-License-Identifier: Apache-2.0
"""What the packages `nequip` and `nequip-allegro` call the parts that all their potentials have, and we what.

Their `arguments` are the section `model` of their YAML, every number resolved; their weights are a state dict.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from atoms.elements import SYMBOLS
from atoms.potential import PotentialConfig


# Theirs to ours, where the value is the same.
COMMON = {
    "r_max": "cutoff", "per_type_energy_scales_trainable": "train_scales",
    "per_type_energy_shifts_trainable": "train_shifts", "model_dtype": "dtype",
}  # fmt: skip
NO_PART_OF_THE_MODEL = (
    "_target_", "seed", "type_names", "avg_num_neighbors", "per_type_energy_scales", "per_type_energy_shifts",
    "per_edge_type_cutoff", "pair_potential", "compile_mode", "do_derivatives", "preset", "model",
)  # fmt: skip


def stripped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights by names within the model, whatever it was wrapped in.

    Raises ValueError where there is no potential of theirs, or several.
    """
    end = "edge_norm._rmax_recip"
    starts = [name.removesuffix(end) for name in state if name.endswith(end)]
    if len(starts) != 1:
        raise ValueError(f"These weights are {len(starts)} models of nequip (by {end}); give those of one.")
    return {name.removeprefix(starts[0]): value for name, value in state.items() if name.startswith(starts[0])}


def only_silu(arguments: Mapping, depths: Mapping[str, int]) -> dict:
    """Their arguments without networks' nonlinearities, which are SiLU here; `depths` are what is not given.

    Raises ValueError for another one of a network that has hidden layers.
    """
    left = dict(arguments)
    for name, depth in depths.items():
        found = left.pop(f"{name}_mlp_nonlinearity", "silu")
        if found != "silu" and left.get(f"{name}_mlp_hidden_layers_depth", depth):
            raise ValueError(f"{name}_mlp_nonlinearity={found} must be silu.")
    return left


def common_config(arguments: Mapping, state: Mapping[str, Tensor], known: Mapping[str, str]) -> dict:
    """What `PotentialConfig` takes, and by `known` (theirs to ours) a subclass, of what they were given.

    Raises ValueError for an argument that we have nothing for.
    """
    elements = list(arguments["type_names"])
    if strange := [name for name in elements if name not in SYMBOLS[1:]]:
        raise ValueError(f"type_names: {strange[0]} is no symbol of an element, and types are elements here.")
    names = dict(known) | COMMON
    if unknown := sorted(set(arguments) - set(names) - set(NO_PART_OF_THE_MODEL)):
        raise ValueError(f"This model was made with {unknown[0]}={arguments[unknown[0]]}, which we have nothing for.")
    found = {names[key]: value for key, value in arguments.items() if key in names and value is not None}
    number = arguments["avg_num_neighbors"]
    for key in ("avg_num_neighbors", "r_max"):
        if isinstance(arguments[key], str):
            raise ValueError(f"{key}={arguments[key]} is no number yet; give it as it was resolved in training.")
    found["num_neighbors"] = [float(number[e]) for e in elements] if isinstance(number, Mapping) else float(number)
    reciprocal = state["edge_norm._rmax_recip"].double()
    if reciprocal.numel() > 1:
        found["pair_cutoffs"] = reciprocal.reciprocal().view(len(elements), -1).tolist()
    for name, default in (("scales", 1.0), ("shifts", 0.0)):
        values = state[f"per_type_energy_scale_shift.{name}"].double().flatten().tolist() or [default]
        found[f"energy_{name}"] = values * len(elements) if len(values) == 1 else values
    pair = arguments.get("pair_potential")
    if pair is not None:
        if not str(pair.get("_target_", "")).endswith("ZBL"):
            raise ValueError(f"pair_potential={pair} is not ZBL, the only one that we have.")
        if float(power := pair.get("polynomial_cutoff_p", 6)) != 6:
            raise ValueError(f"pair_potential.polynomial_cutoff_p={power} must be 6, which ZBL always has here.")
        found["zbl"] = pair["units"]
        if list(pair["chemical_species"]) != elements:
            raise ValueError(f"type_names={elements} must be the elements themselves, {pair['chemical_species']}.")
    found["cutoff"] = float(found["cutoff"])
    return {"elements": elements, **found}


def common_arguments(config: PotentialConfig) -> dict:
    """Their arguments for such a model of ours."""
    elements = config.elements
    found = {name: getattr(config, ours) for name, ours in COMMON.items()}
    found |= {
        "seed": 0, "type_names": elements, "avg_num_neighbors": config.num_neighbors,
        "per_type_energy_scales": dict(zip(elements, config.energy_scales, strict=True)),
        "per_type_energy_shifts": dict(zip(elements, config.energy_shifts, strict=True)),
    }  # fmt: skip
    if isinstance(config.num_neighbors, list):
        found["avg_num_neighbors"] = dict(zip(elements, config.num_neighbors, strict=True))
    if config.pair_cutoffs:
        rows = (dict(zip(elements, row, strict=True)) for row in config.pair_cutoffs)
        found["per_edge_type_cutoff"] = dict(zip(elements, rows, strict=True))
    if config.zbl:
        found["pair_potential"] = {
            "_target_": "nequip.nn.pair_potential.ZBL", "units": config.zbl, "chemical_species": elements,
        }  # fmt: skip
    return found


def common_weights(weights: Mapping[str, Tensor], config: PotentialConfig) -> dict[str, Tensor]:
    """Their tensors for those parts."""
    found = {}
    for name in ("scales", "shifts"):
        values = torch.tensor(getattr(config, f"energy_{name}"), dtype=torch.float64)
        if (added := weights.get(f"added_{name}")) is not None:
            values = values + added.double()
        found[f"per_type_energy_scale_shift.{name}"] = values.view(-1, 1)
    cutoffs = torch.tensor(config.pair_cutoffs or config.cutoff, dtype=torch.float64)
    found["edge_norm._rmax_recip"] = cutoffs.reciprocal().flatten() if config.pair_cutoffs else cutoffs.reciprocal()
    return found


def fit_or_refuse(found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Raise ValueError unless all that our model has is there, in its shape."""
    for name, shape in sorted(wanted.items()):
        if name not in found or found[name].shape != shape:
            has = tuple(found[name].shape) if name in found else "nothing"
            raise ValueError(f"These weights do not fit: {name} must have shape {tuple(shape)}, and they have {has}.")


def zeros_added(config: PotentialConfig) -> dict[str, Tensor]:
    """What training adds to their scales and shifts, which are in the configuration already."""
    zeros = torch.zeros(len(config.elements), dtype=config.torch_dtype)
    return {f"added_{name}": zeros for name in ("scales", "shifts") if getattr(config, f"train_{name}")}


def mlp_names(theirs: str, ours: str, depth: int) -> dict[str, str]:
    """Their names of a network's weights to ours."""
    return {f"{theirs}.mlp.{2 * i}.weight": f"{ours}.weights.{i}" for i in range(depth + 1)}
