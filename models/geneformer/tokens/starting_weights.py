# SPDX-License-Identifier: Apache-2.0
"""Weights that exist: of a folder in any format of a model's family, of the hub, or of a checkpoint."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import Tensor

from common.config import notes_on_continuing
from common.kept_steps import fingerprint
from common.step_folder import complete_steps, damage, read_weights
from common.weights import LazyTensors, listed, local_folder, named_tensors, read
from tokens.lora import merged


SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


class Family(NamedTuple):
    """What a recipe knows of its models.

    `read_folder(folder, strict)` gives configuration, our weights and the names that are not ours; `adopt(shape,
    found)` takes over what no key says; `to_ours(weights, base, config)` names a checkpoint's weights as ours, with
    those of `base` that it leaves out. `of_vocabulary` are the tensors that have a row a token. `more_positions` are
    those that a configuration counts beyond the longest sequence. `start`, instead of `open_pretrained`, gives the
    weights to start from, where some are new.
    """

    config: type
    model: type
    read_folder: Callable
    of_vocabulary: tuple[str, ...]
    adopt: Callable
    to_ours: Callable
    more_positions: int = 0
    start: Callable | None = None


def first_line(error: Exception) -> str:
    """What an error says, without what libraries add below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def empty_model(family: Family, config):
    """A model of this size without storage."""
    with torch.device("meta"):
        return family.model(family.config(**config.to_dict() | {"layer_backend": "torch"}))


def shapes(family: Family, config) -> dict[str, torch.Size]:
    """Of our tensors for a model of this size."""
    return {name: tensor.shape for name, tensor in named_tensors(empty_model(family, config)).items()}


def joined_weights(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], config=None) -> LazyTensors:
    """Those of `base` where `weights` has none."""
    return LazyTensors({name: read(weights if name in weights else base, name) for name in {**base, **weights}})


def start_weights(family: Family, init_from: str, shape, partial: bool, seed: int) -> tuple:
    """As `open_pretrained`, with what the family makes anew."""
    if family.start:
        return family.start(init_from, shape, partial, seed)
    return open_pretrained(family, init_from, shape, partial, seed)


def open_step(family: Family, folder: Path, merge: bool = True) -> tuple:
    """Configuration and weights of a checkpoint `step_<n>`; what it leaves out as frozen is read from its `init_from`.

    LoRA's adapters are added to the weights, unless `merge` is false. Raises ValueError for a checkpoint that is not
    whole, or whose `init_from` is not what it was.
    """
    if reason := damage(folder):
        raise ValueError(f"{folder} is no whole checkpoint: {reason}; give a step_<n> folder that is.")
    run = json.loads((folder / "run.json").read_text())
    config, base = family.config(**run["model"]), {}
    if run.get("base"):
        start = run["config"]
        base, _ = start_weights(family, start["init_from"], config, start["init_from_partial"], start["seed"])
        fingerprint(base, run["base"], f"init_from={start['init_from']}")
    weights = family.to_ours(read_weights(folder), base, config)
    return without_adapters(config, weights) if merge else (config, weights)


def without_adapters(config, weights: Mapping[str, Tensor]) -> tuple:
    """Configuration and weights of the same model without LoRA."""
    if not getattr(config, "lora", None):
        return config, weights
    weights = merged(weights, config.lora, config.num_attention_heads)
    return type(config)(**config.to_dict() | {"lora": None}), weights


def find_model(source: str) -> Path:
    """The folder that a user means: of a model, a checkpoint, or a run, whose newest checkpoint it is; or the hub's.

    Raises ValueError where there is none.
    """
    folder = local_folder(source)
    if (folder / "config.json").exists() or (folder / ".metadata").exists():
        return folder
    if steps := complete_steps(folder):
        return folder / f"step_{steps[-1]}"
    return folder / "final_model" if (folder / "final_model").exists() else folder


def open_model(family: Family, source: str, strict: bool = True) -> tuple:
    """Configuration, our weights, and the names in the source that are not ours; not `strict`: what there is of ours.

    Raises ValueError for what is of another family.
    """
    try:
        folder = find_model(source)
        if (folder / ".metadata").exists():
            return *open_step(family, folder), []
        return family.read_folder(folder, strict)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(first_line(error)) from error


def ours_in(family: Family, config, weights: Mapping[str, Tensor], strict: bool) -> tuple:
    """As `read_folder`, for weights under our names. Raises ValueError where `strict` and not all are there."""
    ours = shapes(family, config)
    missing, unknown = ours.keys() - weights.keys(), [name for name in weights if name not in ours]
    if strict and (missing or unknown):
        raise ValueError(f"missing {listed(missing)}; unexpected {listed(unknown)}.")
    return config, LazyTensors({name: read(weights, name) for name in weights if name in ours}), unknown


def open_pretrained(family: Family, init_from: str, shape, partial: bool = False, seed: int = 0) -> tuple:
    """Weights to start a model of this shape from, and a sentence on what is new where `partial` lets some be so.

    Sets in `shape` what no key says. Raises ValueError for weights that do not fit.
    """
    try:
        folder = str(find_model(init_from))
    except ValueError as error:
        raise ValueError(f"init_from={error}") from error
    try:
        found, weights, unknown = open_model(family, folder, strict=not partial)
        differ = [k for k in (*SHAPE, "vocab_size") if getattr(found, k) != getattr(shape, k)]
        if [k for k in differ if not partial or k not in ("num_hidden_layers", "vocab_size")]:
            theirs, ours = (", ".join(f"{k}={getattr(c, k)}" for k in differ) for c in (found, shape))
            raise ValueError(
                f"it has {theirs}, and the model {ours}; give the model_tag or model_kwargs of that size."
            )
    except ValueError as error:
        way_out = "" if partial else " (init_from_partial=true takes what fits.)"
        raise ValueError(f"init_from={init_from} cannot be used: {error}{way_out}") from error
    family.adopt(shape, found)
    if not partial:
        return weights, None
    ours, theirs, model = shapes(family, shape), shapes(family, found), empty_model(family, shape)
    fits = [k for k in ours if k in weights and (k in family.of_vocabulary or ours[k] == theirs[k])]
    new, left = [k for k in ours if k not in fits], unknown + [k for k in weights if k not in fits]

    def first(name: str) -> Tensor:
        value = model.initial_value(name, ours[name], seed)
        if name in fits:
            rows = min(shape.vocab_size, found.vocab_size) if name in family.of_vocabulary else len(value)
            value[:rows] = weights[name][:rows]
        return value

    note = f"Of init_from={init_from} {len(fits)} of {len(ours)} tensors are taken; "
    note += f"new, from the seed: {listed(new)}; left out: {listed(left)}."
    if shape.vocab_size != found.vocab_size:
        note += f" Of its {found.vocab_size} tokens the first {min(shape.vocab_size, found.vocab_size)} are taken."
    return LazyTensors({name: lambda name=name: first(name) for name in ours}), note


def read_pretrained(family: Family, config: DictConfig, shape, notes: list[str]) -> LazyTensors | None:
    """The weights that `init_from` names; `notes` gets what there is to say of them. Raises ValueError as above."""
    if config.init_from is None:
        return None
    weights, note = start_weights(family, config.init_from, shape, config.init_from_partial, config.seed)
    rates = (1e-2, "1e-3") if getattr(shape, "lora", None) else ()
    notes += [*notes_on_continuing(config, *rates), *([note] if note else [])]
    return weights


def trained_length(family: Family, config, run: dict | None = None) -> int:
    """Tokens of the longest sequences that a model, or the `run` of a checkpoint and its start, was trained on."""
    known = config.max_position_embeddings - family.more_positions
    if run is None:
        return known
    own = run["config"]["dataset"]["max_seq_length"]
    return max(own, known) if run["config"]["init_from"] else own


def ways_in(family: Family) -> list[Callable]:
    """`open_step`, `open_model`, `open_pretrained`, `read_pretrained`, `shapes` and `trained_length` of one family."""
    ways = (open_step, open_model, open_pretrained, read_pretrained, shapes, trained_length)
    return [partial(way, family) for way in ways]
