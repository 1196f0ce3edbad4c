# SPDX-License-Identifier: Apache-2.0
"""Geneformer's weights that exist: of a folder in either format, of the hub, or of a checkpoint."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from common.weights import LazyTensors, listed, open_weights, read
from convert_geneformer import DERIVED_NAMES, TIED, read_config, sources, to_native, with_prefix
from modeling_geneformer import GeneformerConfig, model_for
from tokens.starting_weights import Family, empty_model, joined_weights, ours_in, ways_in


def read_folder(folder: Path, strict: bool) -> tuple[GeneformerConfig, LazyTensors, list[str]]:
    """Configuration, our weights and the names that are not ours. Raises ValueError for what is no Geneformer."""
    weights, (config, kind) = open_weights(folder), read_config(folder)
    if kind == "native":
        return ours_in(FAMILY, config, weights, strict)
    weights, used = with_prefix(weights), {*TIED, *(name for some in sources(config).values() for name in some)}
    unknown = [name for name in weights if name not in used and not DERIVED_NAMES.fullmatch(name)]
    return config, to_native(weights, config, strict), unknown


def adopt(shape: GeneformerConfig, found: GeneformerConfig) -> None:
    """Nothing: keys say all. Raises ValueError where those of the weights are others."""
    for name in ("norm", "hidden_act", "pad_token_id", "max_position_embeddings", "type_vocab_size"):
        if getattr(found, name) != getattr(shape, name):
            raise ValueError(
                f"init_from has {name}={getattr(found, name)}, and the model {getattr(shape, name)}; give the "
                "model_tag of that kind, or the folder as model_tag too."
            )


OF_VOCABULARY = ("geneformer.embeddings.word_embeddings.weight", "lm_head.bias")


def to_ours(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], config: GeneformerConfig) -> LazyTensors:
    """Those of `base` where `weights` has none, as far as the model's task needs them."""
    found = joined_weights(weights, base)
    return LazyTensors({name: found.makers[name] for name in found if name in shapes(config)})


FAMILY = Family(GeneformerConfig, model_for, read_folder, OF_VOCABULARY, adopt, to_ours)
open_step, open_model, open_pretrained, _read_pretrained, shapes, trained_length = ways_in(FAMILY)


def read_pretrained(config: DictConfig, shape: GeneformerConfig, notes: list[str]) -> LazyTensors | None:
    """The weights that `init_from` names, for another task with a new head; `notes` gets what there is to say.

    Raises ValueError for weights that do not fit.
    """
    if config.init_from is None:
        return None
    try:
        found, _, _ = open_model(config.init_from, strict=False)
    except ValueError:
        return _read_pretrained(config, shape, notes)  # which says it in full
    if (found.task, found.classes) == (shape.task, shape.classes):
        return _read_pretrained(config, shape, notes)
    as_found = GeneformerConfig(**shape.to_dict() | {"task": found.task, "classes": found.classes})
    weights = _read_pretrained(config, as_found, notes)
    ours, model = shapes(shape), empty_model(FAMILY, shape)
    fits = {name for name in ours if name in weights and weights[name].shape == ours[name]}
    new = ours.keys() - fits
    left = listed(weights.keys() - fits)
    notes.append(f"For model_kwargs.task={shape.task}, new, from the seed: {listed(new)}; left out: {left}.")
    first = {name: partial(model.initial_value, name, ours[name], config.seed) for name in new}
    return LazyTensors({name: read(weights, name) for name in fits} | first)
