# SPDX-License-Identifier: Apache-2.0
"""From a model's name to a model: ours, or Hugging Face's own `EsmForMaskedLM` as the reference."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from safetensors import SafetensorError
from transformers import EsmConfig, EsmForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from context_parallel import ContextParallel
from convert import DECODER, hf_config, hf_to_native, local_folder, native_config, native_to_hf, open_weights
from modeling_esm2 import SIZES, Esm2Config, Esm2ForMaskedLM, copy_parameters, init_parameters, named_tensors


class ReferenceEsmForMaskedLM(EsmForMaskedLM):
    """Hugging Face's layers called like ours: packed batches are padded, the loss is given its denominator."""

    def __init__(self, config: EsmConfig):
        super().__init__(config)
        del self.lm_head.decoder  # tied by use below: tied Parameters come apart when a sharded model gets its storage
        self.esm.contact_head.requires_grad_(False)  # no part of the loss

    def tables(self) -> dict[str, torch.Tensor]:
        """Buffers that are in no checkpoint."""
        name, table = "esm.embeddings.position_ids", self.esm.embeddings.position_ids
        return {name: torch.arange(table.shape[-1], device="cpu").expand(table.shape)}

    def forward(self, input_ids, attention_mask=None, labels=None, cu_seqlens=None, max_seqlen=None,
                num_items_in_batch=None):  # fmt: skip
        """As `Esm2ForMaskedLM.forward` with labels: `logits` are those of the labelled positions."""
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()
            attention_mask = (torch.arange(max_seqlen, device=lengths.device) < lengths[:, None]).long()
            padded = [torch.full_like(attention_mask, fill) for fill in (self.config.pad_token_id, -100)]
            for target, source in zip(padded, (input_ids, labels), strict=True):
                target[attention_mask.bool()] = source
            input_ids, labels = padded
        hidden = self.esm(input_ids, attention_mask=attention_mask).last_hidden_state[labels != -100]
        hidden = self.lm_head.layer_norm(F.gelu(self.lm_head.dense(hidden)))
        logits = F.linear(hidden, self.esm.embeddings.word_embeddings.weight) + self.lm_head.bias
        loss = F.cross_entropy(logits.float(), labels[labels != -100], reduction="sum")
        return MaskedLMOutput(loss=loss / num_items_in_batch, logits=logits)


def model_config(
    model_tag: str,
    layer_backend: str,
    *,
    hidden_size: PositiveInt | None = None,
    num_hidden_layers: PositiveInt | None = None,
    num_attention_heads: PositiveInt | None = None,
    intermediate_size: PositiveInt | None = None,
    token_dropout: bool | None = None,
    initializer_range: NonNegativeFloat | None = None,
) -> Esm2Config:
    """The configuration of a published size (no network is asked) or of a local folder, with what is overridden.

    Raises ValueError for a name that is neither, and for heads that do not divide the width.
    """
    overrides = {k: v for k, v in locals().items() if k not in ("model_tag", "layer_backend") and v is not None}
    name = model_tag.rpartition("/")[2]
    if Path(model_tag).is_dir():
        try:
            config = read_config(Path(model_tag)).to_dict()
        except (OSError, ValueError) as error:
            raise ValueError(f"model_tag={model_tag} is no folder of an ESM-2: {first_line(error)}") from error
    elif name in SIZES:
        config = SIZES[name]
    else:
        raise ValueError(f"model_tag={model_tag}: no local folder and none of {', '.join(SIZES)}.")
    return Esm2Config(**{**config, "layer_backend": layer_backend, **overrides})


def is_reference(model_tag: str) -> bool:
    """Whether the tag asks for Hugging Face's own implementation: `facebook/esm2_...`."""
    return model_tag.startswith("facebook/")


def build_model(
    model_tag: str, config: Esm2Config, context_parallel: ContextParallel | None = None
) -> Esm2ForMaskedLM | ReferenceEsmForMaskedLM:
    """The model without storage; `fill_model` gives it its numbers once it is split over the ranks.

    Raises ValueError if the ranks that share a micro-batch are more than its heads.
    """
    if context_parallel and context_parallel.size > config.num_attention_heads:
        raise ValueError(
            f"cp_size={context_parallel.size} must be at most the number of heads, {config.num_attention_heads}."
        )
    with torch.device("meta"):
        if is_reference(model_tag):
            return ReferenceEsmForMaskedLM(hf_config(config))
        model = Esm2ForMaskedLM(config)
    model.esm.context_parallel = context_parallel
    return model


def model_type(folder: Path) -> str:
    """Whose format a checkpoint folder has: `esm` is Hugging Face's. Raises OSError or ValueError for neither."""
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in ("esm", Esm2Config.model_type):
        raise ValueError(f"its model_type is {kind}, not esm.")
    return kind


def read_config(folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> Esm2Config:
    """The configuration in a checkpoint folder; the weights, if given, tell how rotary frequencies were rounded."""
    if model_type(folder) == "esm":
        return native_config(EsmConfig.from_pretrained(folder), weights)
    return Esm2Config.from_pretrained(folder)


def first_line(error: Exception) -> str:
    """What an error says, without what libraries add below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_pretrained(init_from: str, config: Esm2Config) -> Mapping[str, torch.Tensor]:
    """A public checkpoint's weights under our names, each read when it is asked for; from a folder or the hub.

    Sets `config.rope_inv_freq_dtype` to the checkpoint's. Raises ValueError for a missing one or another size.
    """
    try:
        folder = local_folder(init_from)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those of its names ValueErrors
        reason = f"no local folder, and the hub does not give it: {first_line(error)}"
        raise ValueError(f"init_from={init_from} is {reason}") from error
    try:
        weights = open_weights(folder)
        found = read_config(folder, weights)
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
            if getattr(found, key) != getattr(config, key):
                raise ValueError(
                    f"it has {key}={getattr(found, key)}, and the model {getattr(config, key)}; give the model_tag or "
                    "model_kwargs of that size."
                )
        config.rope_inv_freq_dtype = found.rope_inv_freq_dtype
        return hf_to_native(weights, config) if model_type(folder) == "esm" else weights
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"init_from={init_from} cannot be used: {first_line(error)}") from error


def fill_model(
    model: torch.nn.Module, config: Esm2Config, seed: int, pretrained: Mapping[str, torch.Tensor] | None
) -> None:
    """Give the model its first weights: the pretrained ones, or random ones that depend on the seed alone."""
    if isinstance(model, ReferenceEsmForMaskedLM):
        if pretrained is None:  # the same numbers as our own model gets
            own = Esm2ForMaskedLM(config)
            init_parameters(own, seed)
            pretrained = {name: tensor.detach() for name, tensor in named_tensors(own).items()}
        weights = native_to_hf(pretrained, config)
        copy_parameters(model, {k: weights[k] for k in weights if k != DECODER} | model.tables())
    elif pretrained is None:
        init_parameters(model, seed)
    else:
        copy_parameters(model, pretrained)
