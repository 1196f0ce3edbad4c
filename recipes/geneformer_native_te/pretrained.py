# SPDX-License-Identifier: Apache-2.0
"""Geneformer's weights that exist: of a folder in either format, of the hub, or of a checkpoint."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from common.weights import LazyTensors, listed, open_weights, read
from convert_geneformer import DERIVED_NAMES, TIED, read_config, read_weights, sources, to_native, with_prefix
from modeling_geneformer import GeneformerConfig, model_for
from tokens.lora import is_adapter
from tokens.starting_weights import Family, empty_model, joined_weights, ours_in, ways_in


def read_folder(folder: Path, strict: bool) -> tuple[GeneformerConfig, LazyTensors, list[str]]:
    """Configuration, our weights and the names that are not ours. Raises ValueError for what is no Geneformer."""
    config, kind = read_config(folder)
    if kind == "adapter":
        return config, read_weights(folder, config, kind, strict), []
    weights = open_weights(folder)
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


def start(init_from: str, shape: GeneformerConfig, in_part: bool, seed: int) -> tuple[LazyTensors, str | None]:
    """The weights that `init_from` names, for another task with a new head, for LoRA with adapters; and what is new.

    Raises ValueError for weights that do not fit.
    """
    try:
        found, _, _ = open_model(init_from, strict=False)
    except ValueError:
        return open_pretrained(init_from, shape, in_part, seed)  # which says it in full
    is_same = (found.task, found.classes) == (shape.task, shape.classes)
    if is_same and not shape.lora:
        return open_pretrained(init_from, shape, in_part, seed)
    as_found = shape.to_dict() | {"task": found.task, "classes": found.classes, "lora": None}
    weights, note = open_pretrained(init_from, GeneformerConfig(**as_found), in_part, seed)
    ours, model = shapes(shape), empty_model(FAMILY, shape)
    fits = {name for name in ours if name in weights and weights[name].shape == ours[name]}
    new, left = ours.keys() - fits, listed(weights.keys() - fits)
    if not is_same:
        head = listed(name for name in new if not is_adapter(name))
        note = (
            f"{note or ''} For model_kwargs.task={shape.task}, new, from the seed: {head}; left out: {left}.".strip()
        )
    first = {name: partial(model.initial_value, name, ours[name], seed) for name in new}
    return LazyTensors({name: read(weights, name) for name in fits} | first), note


FAMILY = Family(GeneformerConfig, model_for, read_folder, OF_VOCABULARY, adopt, to_ours, start=start)
open_step, open_model, open_pretrained, read_pretrained, shapes, trained_length = ways_in(FAMILY)
