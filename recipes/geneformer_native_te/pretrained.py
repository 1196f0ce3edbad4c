# SPDX-License-Identifier: Apache-2.0
"""Geneformer's weights that exist: of a folder in either format, of the hub, or of a checkpoint."""

from pathlib import Path

from common.weights import LazyTensors, open_weights
from convert_geneformer import DERIVED_NAMES, TIED, read_config, sources, to_native, with_prefix
from modeling_geneformer import GeneformerConfig, GeneformerForMaskedLM
from tokens.starting_weights import Family, joined_weights, ours_in, ways_in


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
FAMILY = Family(GeneformerConfig, GeneformerForMaskedLM, read_folder, OF_VOCABULARY, adopt, joined_weights)
open_step, open_model, open_pretrained, read_pretrained, shapes, trained_length = ways_in(FAMILY)
