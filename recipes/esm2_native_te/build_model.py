# SPDX-License-Identifier: Apache-2.0
"""From a model's name to a model: ours, or Hugging Face's own `EsmForMaskedLM` as the reference."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from omegaconf import DictConfig
from pydantic import NonNegativeFloat, PositiveInt
from transformers import EsmConfig, EsmForMaskedLM

import modeling_esm2
from common.batch import Batch
from common.distributed import Distributed
from common.weights import copy_parameters, named_tensors
from convert import DECODER, hf_config, native_to_hf
from dataset import open_validation
from modeling_esm2 import SIZES, Esm2Config, Esm2ForMaskedLM
from pretrained import open_model, read_config
from tokens.context_parallel import ContextParallel
from tokens.layers import sequence_index
from tokens.low_precision import LowPrecision, build_precision
from tokens.masked_lm import MaskedLMOutput, init_parameters
from tokens.starting_weights import SHAPE, first_line


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

    def forward(self, input_ids, labels, selected, counts, attention_mask=None, cu_seqlens=None, max_seqlen=None,
                seq_lens=None):  # fmt: skip
        """As `Esm2ForMaskedLM.forward` with labels."""
        labels_W = labels.flatten()[selected]
        if cu_seqlens is not None:
            sequence_T = sequence_index(cu_seqlens, len(input_ids))
            position_T = torch.arange(len(input_ids), device=input_ids.device) - cu_seqlens[sequence_T]
            padded = input_ids.new_full((len(seq_lens), max_seqlen), self.config.pad_token_id)
            attention_mask = torch.zeros_like(padded)
            padded[sequence_T, position_T], attention_mask[sequence_T, position_T] = input_ids, 1
            selected = (sequence_T * max_seqlen + position_T)[selected]
            input_ids = padded
        hidden = self.esm(input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, selected)
        hidden = self.lm_head.layer_norm(F.gelu(self.lm_head.dense(hidden)))
        logits = F.linear(hidden, self.esm.embeddings.word_embeddings.weight) + self.lm_head.bias
        loss = F.cross_entropy(logits.float(), labels_W, reduction="sum") / max(counts["labels"], 1)
        return MaskedLMOutput(loss=loss, logits=logits, labels=labels_W)


def model_config(
    model_tag: str,
    layer_backend: str,
    *,
    hidden_size: PositiveInt | None = None,
    num_hidden_layers: Annotated[int, Gt(0), Le(1000)] | None = None,
    num_attention_heads: PositiveInt | None = None,
    intermediate_size: PositiveInt | None = None,
    token_dropout: bool | None = None,
    hidden_dropout_prob: NonNegativeFloat | None = None,
    initializer_range: NonNegativeFloat | None = None,
) -> Esm2Config:
    """The configuration of a published size (no network is asked) or of a local folder, with what is overridden.

    `facebook/esm2_...` is Hugging Face's own implementation: its `layer_backend` is `transformers`. Raises ValueError
    for a name that is neither, and for heads that do not divide the width.
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
    if model_tag.startswith("facebook/"):
        layer_backend = "transformers"
    return Esm2Config(**{**config, "layer_backend": layer_backend, **overrides})


def reference_config(shape: Esm2Config) -> EsmConfig:
    """Of the public implementation, for `AutoModelForMaskedLM.from_config`: what speed is measured beside."""
    return hf_config(shape)


def build_model(shape: Esm2Config, distributed: Distributed) -> Esm2ForMaskedLM | ReferenceEsmForMaskedLM:
    """The model without storage; `materialize` gives it its numbers once it is split over the ranks.

    Raises ValueError if the ranks that share a micro-batch are more than its heads.
    """
    if distributed.group_size > shape.num_attention_heads:
        raise ValueError(
            f"cp_size={distributed.group_size} must be at most the number of heads, {shape.num_attention_heads}."
        )
    with torch.device("meta"):
        if shape.layer_backend == "transformers":
            return ReferenceEsmForMaskedLM(hf_config(shape))
        model = Esm2ForMaskedLM(shape)
    if distributed.group:
        model.esm.context_parallel = ContextParallel(distributed.group)
    return model


def sharded_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is split over the ranks, and gathered, as one: each layer, and at the end the model with all the rest."""
    return [*model.esm.encoder.layer, model]


def prepare(model: torch.nn.Module, config: DictConfig, precision: LowPrecision) -> None:
    """What the layers do in another way before the model is split: number formats, recomputation, compilation."""
    *layers, _ = sharded_parts(model)
    precision.prepare(layers)
    if config.use_activation_checkpointing:
        model.activation_checkpointing_enable()
    if config.use_torch_compile:
        for layer in layers:
            layer.compile(dynamic=True)


def materialize(
    model: torch.nn.Module, shape: Esm2Config, seed: int, pretrained: Mapping[str, torch.Tensor] | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Give the model storage and its first weights: the pretrained ones, or random ones that depend on the seed alone.

    It may be split already: then each rank has its part only.
    """
    model.to_empty(device=device)
    if isinstance(model, ReferenceEsmForMaskedLM):
        if pretrained is None:  # the same numbers as our own model gets
            own = Esm2ForMaskedLM(Esm2Config(**shape.to_dict() | {"layer_backend": "torch"}))
            init_parameters(own, seed)
            pretrained = {name: tensor.detach() for name, tensor in named_tensors(own).items()}
        weights = native_to_hf(pretrained, shape)
        copy_parameters(model, {k: weights[k] for k in weights if k != DECODER} | model.tables())
    elif pretrained is None:
        init_parameters(model, seed)
    else:
        copy_parameters(model, pretrained)


def open_evaluation(config: DictConfig, source: str, distributed: Distributed) -> tuple:
    """For `evaluate.py`: a model that is there, what `config.validation` names, and how a forward pass is made."""
    size = config.cp_size
    distributed = distributed.in_groups("cp_size", 1 if distributed.num_ranks % size else size)
    shape, weights, _ = open_model(source)
    shape.layer_backend = config.layer_backend
    precision = build_precision(config, shape, distributed)
    multiple = precision.multiple * distributed.group_size
    validator = open_validation(distributed, config.use_sequence_packing, multiple, **config.validation)
    model = build_model(shape, distributed)
    prepare(model, config, precision)
    materialize(model, shape, config.seed, weights, distributed.device)
    return model, validator, partial(precision.forward, autocast=True)


def facts(shape: Esm2Config, saved: dict | None = None) -> dict:
    """What checkpoints say of the model, all that `export.py` needs to know.

    With what the checkpoint of a run that goes on says (`saved`): raises ValueError if that is another model, and
    takes over how rotary frequencies were rounded, and the length at which `init_from` was trained: no key says them.
    """
    if saved:
        now = shape.to_dict()
        if wrong := [key for key in SHAPE if now[key] != saved[key]]:
            changes = ", ".join(f"{key} was {saved[key]} and is {now[key]}" for key in wrong)
            raise ValueError(f"{changes}; give model_tag or model_kwargs of that size")
        shape.rope_inv_freq_dtype = saved["rope_inv_freq_dtype"]
        shape.max_position_embeddings = saved["max_position_embeddings"]
    return shape.to_dict()


def harmless_keys(config: Mapping) -> tuple[str, ...]:
    """Keys of this recipe alone whose change on resume moves the trajectory by rounding at most.

    `config` is what the run goes on with, flat: `section.key`.
    """
    if config.get("model_kwargs.hidden_dropout_prob") and torch.cuda.is_available():
        return ()  # TransformerEngine's layers drop by the shape of what passes through them, so by these too
    return ("use_sequence_packing", "layer_backend", "cp_size")


def training_flops(shape: Esm2Config, batch: Batch, backend: str | None = None) -> float:
    """Floating-point operations of one training step on this batch, without those that the backend leaves out."""
    return modeling_esm2.training_flops(shape, batch.counts, backend)
