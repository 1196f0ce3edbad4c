# SPDX-License-Identifier: Apache-2.0
"""AMPLIFY's weights that exist: published, EuroBERT's or native ones of a folder or the hub, or of a checkpoint."""

from pathlib import Path

from common.weights import LazyTensors, open_weights
from convert_amplify import from_native, read_config, to_native, with_prefix
from modeling_amplify import AmplifyConfig, AmplifyForMaskedLM
from tokens.starting_weights import Family, joined_weights, ours_in, ways_in


def read_folder(folder: Path, strict: bool) -> tuple[AmplifyConfig, LazyTensors, list[str]]:
    """Configuration, our weights and the names that are not ours. Raises ValueError for what is no AMPLIFY."""
    weights, (config, kind) = open_weights(folder), read_config(folder)
    if kind == "native":
        return ours_in(FAMILY, config, weights, strict)
    weights, known = with_prefix(weights) if kind == "eurobert" else weights, set(from_native({}, config, kind))
    return config, to_native(weights, config, kind, strict), [name for name in weights if name not in known]


def adopt(shape: AmplifyConfig, found: AmplifyConfig) -> None:
    """The length that weights were trained at, which no key says."""
    shape.max_position_embeddings = found.max_position_embeddings


OF_VOCABULARY = ("amplify.embeddings.weight", "decoder.weight", "decoder.bias")
FAMILY = Family(AmplifyConfig, AmplifyForMaskedLM, read_folder, OF_VOCABULARY, adopt, joined_weights)
open_step, open_model, open_pretrained, read_pretrained, shapes, trained_length = ways_in(FAMILY)
