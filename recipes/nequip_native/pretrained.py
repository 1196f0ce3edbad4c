# SPDX-License-Identifier: Apache-2.0
"""Potentials that exist: a final model, a checkpoint or a run, or a checkpoint or package of nequip or allegro."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import Tensor

from atoms.first_weights import init_parameters
from atoms.package_files import kind_of, read_checkpoint
from atoms.potential import PotentialConfig, read_config
from common.command import one_line
from common.config import notes_on_continuing
from common.step_folder import complete_steps, damage, read_weights
from common.weights import listed, open_weights
from convert_allegro import allegro_to_native, config_from_allegro
from convert_nequip import config_from_nequip, nequip_to_native
from modeling_allegro import Allegro, AllegroConfig
from modeling_nequip import NequIP, NequIPConfig


KINDS = {"nequip": (NequIPConfig, NequIP), "allegro": (AllegroConfig, Allegro)}
THEIRS = {"nequip": (config_from_nequip, nequip_to_native), "allegro": (config_from_allegro, allegro_to_native)}
# What training data says, unless the configuration or pretrained weights do.
MEASURED = ("num_neighbors", "energy_scales", "energy_shifts")
# Not of the architecture: a model that begins from another may have others.
OWN = ("model_type", "elements", "pair_cutoffs", "train_scales", "train_shifts", "dtype", *MEASURED)
BY_ELEMENT = ("elements", "centre_elements", "neighbor_elements")  # weights with a row for each


def open_pretrained(source: str) -> tuple[PotentialConfig, dict[str, Tensor]]:
    """Configuration and weights; what training added to scales and shifts is in the configuration.

    Raises ValueError for what is neither a potential of ours nor one of the packages'.
    """
    try:
        config, weights = _open(Path(source))
    except KeyError as error:
        raise ValueError(f"it lacks {error}.") from error
    except (OSError, SafetensorError, TypeError, RuntimeError) as error:
        raise ValueError(f"{one_line(error)}.") from error
    for name in ("scales", "shifts"):
        if (added := weights.pop(f"added_{name}", None)) is not None:
            total = torch.tensor(getattr(config, f"energy_{name}"), dtype=torch.float64) + added.double()
            setattr(config, f"energy_{name}", total.tolist())
    return replace(config, train_scales=False, train_shifts=False), weights


def _open(path: Path) -> tuple[PotentialConfig, dict[str, Tensor]]:
    if path.is_file():
        arguments, state = read_checkpoint(path)
        read, to_native = THEIRS[kind_of(arguments)]
        config = read(arguments, state)
        return config, to_native(state, config)
    if not (path / "config.json").exists() and not (path / ".metadata").exists():
        steps = complete_steps(path)
        inside = path / f"step_{steps[-1]}" if steps else path / "final_model"
        path = inside if inside.exists() else path
    return read_saved(path)


def read_saved(folder: Path) -> tuple[PotentialConfig, dict[str, Tensor]]:
    """Configuration and weights of a checkpoint `step_<n>` or of a final model.

    Raises ValueError for another folder.
    """
    if (folder / ".metadata").exists():
        if reason := damage(folder):
            raise ValueError(f"{folder} is no whole checkpoint: {reason}; give a step_<n> folder that is.")
        values, weights = json.loads((folder / "run.json").read_text())["model"], read_weights(folder)
    elif (folder / "config.json").exists():
        values, weights = json.loads((folder / "config.json").read_text()), dict(open_weights(folder))
    else:
        raise ValueError(f"{folder} is no run with checkpoints, no step_<n> and no final_model; give one of these.")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{folder}: its model_type is {kind}, not {' or '.join(KINDS)}.")
    return read_config(KINDS[kind][0], values), weights


def architecture_of(config: PotentialConfig) -> dict:
    """The arguments that make a model with this architecture, for any elements."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OWN}


def named_cutoffs(config: PotentialConfig) -> dict[str, float] | None:
    """`pair_cutoffs` as the key of that name has them."""
    if config.pair_cutoffs is None:
        return None
    pairs = zip(config.elements, config.pair_cutoffs, strict=True)
    return {f"{a}-{b}": cutoff for a, row in pairs for b, cutoff in zip(config.elements, row, strict=True)}


def continued(pretrained: PotentialConfig, elements: list[str], statistics: Mapping) -> dict:
    """`MEASURED` of a model that begins from another one: its own numbers.

    A new element's scale is the mean of the others', and its shift a least-squares fit to what their shifts leave of
    the energies; its neighbours are as measured, where the model has a number for each element.
    """
    new = [i for i, element in enumerate(elements) if element not in pretrained.elements]
    old = [i for i, element in enumerate(elements) if element in pretrained.elements]

    def kept(values: list[float], fresh: float | list[float]) -> list[float]:
        known = dict(zip(pretrained.elements, values, strict=True))
        fresh = fresh if isinstance(fresh, list) else [fresh] * len(elements)
        return [known.get(element, fresh[i]) for i, element in enumerate(elements)]

    neighbors, shifts = pretrained.num_neighbors, kept(pretrained.energy_shifts, 0.0)
    if isinstance(neighbors, list):
        neighbors = kept(neighbors, [max(number, 1.0) for number in statistics["num_neighbors_per_type"]])
    if new:
        normal, right = (np.array(statistics[f"energy_{name}"], dtype=np.float64) for name in ("normal", "right"))
        left = right[new] - normal[np.ix_(new, old)] @ np.array(shifts)[old]
        fitted = np.linalg.lstsq(normal[np.ix_(new, new)], left, rcond=1e-12)[0]
        for i, shift in zip(new, fitted, strict=True):
            shifts[i] = float(shift)
    scale = float(np.mean(pretrained.energy_scales))
    return {
        "num_neighbors": neighbors,
        "energy_scales": kept(pretrained.energy_scales, scale),
        "energy_shifts": shifts,
    }


def differences(found: PotentialConfig, shape: PotentialConfig) -> dict[str, tuple]:
    """What their architectures, or cutoffs of pairs that both know, differ in: theirs and the model's."""
    if found.model_type != shape.model_type:
        return {"model_type": (found.model_type, shape.model_type)}
    ours, theirs = architecture_of(shape), architecture_of(found)
    differ = {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
    reach = [{} if one.pair_cutoffs is None else named_cutoffs(one) for one in (found, shape)]
    both = [element for element in shape.elements if element in found.elements]
    for pair in (f"{a}-{b}" for a in both for b in both):
        cutoffs = tuple(one.get(pair, config.cutoff) for one, config in zip(reach, (found, shape), strict=True))
        if abs(cutoffs[0] - cutoffs[1]) > 1e-9 * cutoffs[0] and "cutoff" not in differ:
            differ[f"pair_cutoffs.{pair}"] = cutoffs
    return differ


def adapted(found: PotentialConfig, weights: Mapping[str, Tensor], shape: PotentialConfig, seed: int) -> dict:
    """All weights of the model: those that are there, and first ones by the seed for elements that are new."""
    model = KINDS[shape.model_type][1](shape)
    init_parameters(model, seed)
    state = dict(model.state_dict())
    new_names = {name for name in state if name.startswith("added_")}
    if wrong := (state.keys() - new_names) ^ weights.keys():
        raise ValueError(f"tensors that only one of both has: {listed(wrong)}.")
    both = [element for element in shape.elements if element in found.elements]
    here, there = (torch.tensor([c.elements.index(e) for e in both]) for c in (shape, found))
    for name, value in weights.items():
        value, target = value.to(shape.torch_dtype), state[name]
        if name in BY_ELEMENT:
            target[here] = value[there]
        elif name == "spline.weight":  # a row for each pair
            n, m = len(shape.elements), len(found.elements)
            rows = (here[:, None] * n + here).flatten()
            target[rows] = value[(there[:, None] * m + there).flatten()]
        elif value.shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, and the model {tuple(target.shape)}.")
        else:
            target.copy_(value)
    return state


def read_pretrained(config: DictConfig, shape: PotentialConfig, notes: list[str]) -> dict[str, Tensor] | None:
    """The weights that `init_from` names; `notes` gets what there is to say of them.

    Raises ValueError for weights that do not fit, and for elements that they do not know and no key names.
    """
    source = config.init_from
    if source is None:
        return None
    try:
        found, weights = open_pretrained(source)
        if differ := differences(found, shape):
            theirs, ours = (", ".join(f"{k}={v[i]}" for k, v in differ.items()) for i in (0, 1))
            raise ValueError(
                f"it has {theirs}, and the model {ours}; give model_tag={source} and in model_kwargs nothing else."
            )
        state = adapted(found, weights, shape, config.seed)
    except ValueError as error:
        raise ValueError(f"init_from={source} cannot be used: {error}") from error
    notes += [*what_is_kept(source, found, shape), *notes_on_continuing(config, highest_lr=2e-3, usual_lr="1e-3")]
    return state


def what_is_kept(source: str, found: PotentialConfig, shape: PotentialConfig) -> list[str]:
    """Sentences for the log: what of a pretrained model the model begins with, and what is new."""
    old = [element for element in shape.elements if element in found.elements]
    new = [element for element in shape.elements if element not in found.elements]

    def told(name: str) -> str:
        values = getattr(shape, name)
        values = dict(zip(shape.elements, values, strict=True)) if isinstance(values, list) else {"": values}
        return ", ".join(f"{e} {v:.4f}".strip() for e, v in values.items() if e not in new)

    was = [named_numbers(one, old) for one in (found, shape)]
    changed = [name for name in MEASURED if was[0][name] != was[1][name]]
    kept = [f"{name} {told(name)}" for name in MEASURED if name not in changed]
    notes = [f"Step 0 is init_from={source}. Kept of it: elements {' '.join(old)}; {'; '.join(kept) or 'no number'}."]
    if changed:
        which = (
            "energies are not its own, but forces are"
            if changed == ["energy_shifts"]
            else "neither energies nor forces are its own"
        )
        notes.append(f"Other numbers by model_kwargs.{', '.join(changed)}, so {which}.")
    if new:
        shifts = ", ".join(f"{e} {shape.energy_shifts[shape.elements.index(e)]:.4f} eV" for e in new)
        notes.append(
            f"New elements: {' '.join(new)}; first weights by the seed, energy_shifts by least squares of what is "
            f"left of the energies ({shifts}), energy_scales the mean of the others'."
        )
    if left := [element for element in found.elements if element not in shape.elements]:
        notes.append(f"Left out of init_from, because model_kwargs.elements does not name them: {' '.join(left)}.")
    return notes


def named_numbers(config: PotentialConfig, elements: list[str]) -> dict[str, list[float]]:
    """`MEASURED` by name, of some elements."""
    found = {}
    for name in MEASURED:
        values = getattr(config, name)
        values = values if isinstance(values, list) else [values] * len(config.elements)
        found[name] = [values[config.elements.index(element)] for element in elements]
    return found
