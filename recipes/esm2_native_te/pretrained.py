# SPDX-License-Identifier: Apache-2.0
"""ESM-2's weights that exist: of a folder in either format, of the hub, or of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import EsmConfig

from common.weights import LazyTensors, named_type, open_weights
from convert import DECODER, DERIVED_NAMES, EMBEDDING, hf_to_native, native_config, native_to_hf, sources, with_prefix
from modeling_esm2 import Esm2Config, Esm2ForMaskedLM
from tokens.starting_weights import Family, joined_weights, ours_in, ways_in


def model_type(folder: Path) -> str:
    """Whose format a checkpoint folder has: `esm` is Hugging Face's. Raises ValueError for neither."""
    kind = named_type(folder)
    if kind not in ("esm", Esm2Config.model_type):
        raise ValueError(f"its model_type is {kind}, not esm.")
    return kind


def read_config(folder: Path, weights: Mapping[str, Tensor] | None = None) -> Esm2Config:
    """The configuration in a checkpoint folder; the weights, if given, tell how rotary frequencies were rounded."""
    if model_type(folder) == "esm":
        return native_config(EsmConfig.from_pretrained(folder), weights)
    return Esm2Config.from_pretrained(folder)


def read_folder(folder: Path, strict: bool) -> tuple[Esm2Config, LazyTensors, list[str]]:
    """Configuration, our weights and the names that are not ours. Raises ValueError for what is no ESM-2."""
    weights = open_weights(folder)
    config = read_config(folder, weights)
    if model_type(folder) != "esm":
        return ours_in(FAMILY, config, weights, strict)
    weights = with_prefix(weights)
    used = {DECODER, *(name for some in sources(config).values() for name in some)}
    unknown = [name for name in weights if name not in used and not DERIVED_NAMES.fullmatch(name)]
    return config, hf_to_native(weights, config, strict), unknown


def adopt(shape: Esm2Config, found: Esm2Config) -> None:
    """How rotary frequencies are rounded, and the length that weights were trained at, which no key says."""
    shape.rope_inv_freq_dtype = found.rope_inv_freq_dtype
    shape.max_position_embeddings = found.max_position_embeddings


def to_ours(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], config: Esm2Config) -> LazyTensors:
    """A checkpoint's weights under our names, also those of Hugging Face's own layers."""
    if config.layer_backend != "transformers":
        return joined_weights(weights, base)
    base = {k: v for k, v in native_to_hf(base, config).items() if k != DECODER} if base else {}
    return hf_to_native({**base, **weights}, config)


FAMILY = Family(Esm2Config, Esm2ForMaskedLM, read_folder, (EMBEDDING, "lm_head.bias"), adopt, to_ours, 2)
open_step, open_model, open_pretrained, read_pretrained, shapes, trained_length = ways_in(FAMILY)
