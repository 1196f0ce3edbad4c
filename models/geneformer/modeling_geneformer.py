# SPDX-License-Identifier: Apache-2.0
"""Geneformer, the model of cells by Theodoris et al. 2023 (doi:10.1038/s41586-023-06139-9), padded and packed.

Shapes: B cells, S padded length, T packed tokens of all cells; N is either `B, S` (padded) or `T` (packed). W selected
tokens (those with a label, and a few), E the width, V the vocabulary, P the vocabulary padded to a multiple of 64.

It computes what `transformers.BertForMaskedLM` computes, or with `norm="pre"` `MegatronBertForMaskedLM`, which is how
BioNeMo's models are built; `convert_geneformer.py` translates the weights both ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from common.weights import random_normal
from tokens import masked_lm
from tokens.backends import layer_class, resolve_layer_backend
from tokens.dropout import FED, draw_seed, drop
from tokens.layers import ACTIVATIONS, Form, attention_inputs
from tokens.lora import add_adapters, first_value, is_adapter
from tokens.masked_lm import ForMaskedLM, TokenModel


def _size(
    num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int, positions: int, vocabulary: str,
    dropout: float, **others,
) -> dict:  # fmt: skip
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": positions,
        "vocabulary": vocabulary,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    } | others


_BIONEMO = {"norm": "pre", "hidden_act": "gelu", "attention_probs_dropout_prob": 0.1}

# `GeneformerConfig(**SIZES[name])`. The first is ours, for laptops and tests; then those of the published checkpoints,
# by the names of their folders on the hub; then BioNeMo's, and the largest of its recipes.
SIZES = {
    "geneformer_1M": _size(4, 128, 4, 256, 2048, "V1", 0.02),
    "Geneformer-V1-10M": _size(6, 256, 4, 512, 2048, "V1", 0.02),
    "gf-12L-30M-i2048": _size(12, 512, 8, 1024, 2048, "V1", 0.02),
    "gf-12L-95M-i4096": _size(12, 512, 8, 1024, 4096, "V2", 0.02),
    "gf-20L-95M-i4096": _size(20, 896, 14, 1792, 4096, "V2", 0.02),
    "Geneformer-V2-104M": _size(12, 768, 12, 3072, 4096, "V2", 0.1),
    "Geneformer-V2-316M": _size(18, 1152, 18, 4608, 4096, "V2", 0.1),
    "geneformer_10M": _size(6, 256, 4, 512, 2048, "BioNeMo", 0.02, **_BIONEMO),
    "geneformer_106M": _size(12, 768, 12, 3072, 2048, "BioNeMo", 0.02, **_BIONEMO),
    "geneformer_1B": _size(48, 1280, 20, 5120, 2048, "BioNeMo", 0.02, **_BIONEMO),
    "geneformer_4b": _size(36, 2560, 40, 10240, 2048, "V1", 0.02),
}


class GeneformerConfig(PreTrainedConfig):
    """Shape of the model; the defaults that remain are common to all published sizes.

    `vocabulary` names the tokens: V1, V2, BioNeMo, or a file (vocabulary.py). `task` is one of TASKS, and `classes`
    are the names of what cells or genes are told apart by. `lora` is what tokens/lora.py makes of the section `lora`.
    """

    model_type = "geneformer_native"

    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 512
    vocab_size: int = 25426
    max_position_embeddings: int = 2048
    type_vocab_size: int = 2
    norm: str = "post"
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.02
    attention_probs_dropout_prob: float = 0.02
    pad_token_id: int = 0
    mask_token_id: int = 1
    initializer_range: float = 0.02
    vocabulary: str = "V1"
    task: str = "masked_lm"
    classes: list[str] | None = None
    lora: dict | None = None
    layer_backend: str = "auto"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # An even number: kernels that turn pairs of channels take these models too.
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not give num_attention_heads {self.num_attention_heads} an even "
                f"number of channels each; it must be a multiple of {2 * self.num_attention_heads}."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1.")
        choices = {"task": tuple(TASKS), "norm": ("post", "pre"), "hidden_act": ("relu", "gelu"),
                   "layer_backend": ("auto", "te", "cpp", "torch")}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(known)}.")

    @property
    def head_dim(self) -> int:
        """Channels of each head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix units want a number that many powers of two divide."""
        return -(-self.vocab_size // 64) * 64

    @property
    def form(self) -> Form:
        """Of the layers."""
        return Form(activation=self.hidden_act, post_norm=self.norm == "post")


class Embeddings(nn.Module):
    """The sum of a token's, its position's and the one type's embedding, where `norm` is post a norm, and dropout.

    A token's position is its rank in the cell: the gene that is expressed most against its median comes first.
    """

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm == "post" else None
        self.dropout = config.hidden_dropout_prob

    def forward(self, input_ids_N: Tensor, positions_N: Tensor, words_N: Tensor | None) -> Tensor:
        """[N] and [N], or [S] of padded ones, to [N, E]; by `words_N` numbers are dropped (tokens/dropout.py)."""
        x_NE = self.word_embeddings(input_ids_N) + self.token_type_embeddings.weight[0]
        x_NE = x_NE + self.position_embeddings(positions_N)
        if self.layer_norm is not None:
            x_NE = self.layer_norm(x_NE)
        return drop(x_NE, words_N, FED, self.dropout) if self.dropout and self.training else x_NE


class LMHead(nn.Module):
    """Dense, activation, norm, and the word embedding as the decoder."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x_NE: Tensor, embedding_PE: Tensor) -> Tensor:
        """[N, E] to logits [N, V]."""
        x_NE = self.layer_norm(self.activation(self.dense(x_NE)))
        return F.linear(x_NE, embedding_PE)[..., : len(self.bias)] + self.bias


class GeneformerPreTrainedModel(TokenModel):
    """What all models share towards `transformers`."""

    config_class = GeneformerConfig
    base_model_prefix = "geneformer"

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Biases 0, norm weights 1, matrices normal with deviation `initializer_range`, as `BertPreTrainedModel` has.

        The embedding of padding and of the tokens that do not exist is 0, with `norm="pre"` that of types too, which
        BioNeMo's models do not have.
        """
        if is_adapter(name):
            return first_value(name.removeprefix("geneformer."), shape, seed)
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        # The encoder's weights do not depend on what is around it.
        value = random_normal(shape, self.config.initializer_range, seed, name.removeprefix("geneformer."))
        if name.endswith("word_embeddings.weight"):
            value[self.config.pad_token_id] = 0.0
            value[self.config.vocab_size :] = 0.0
        if name.endswith("token_type_embeddings.weight") and self.config.norm == "pre":
            value.zero_()
        return value


class GeneformerModel(GeneformerPreTrainedModel):
    """The encoder: ranked genes in, one vector of width E per token out."""

    # tokens.context_parallel.ContextParallel: each rank goes on with its part of the packed tokens
    context_parallel = None

    def __init__(self, config: GeneformerConfig):
        super().__init__(config)
        self.backend = resolve_layer_backend(config.layer_backend, config.head_dim)
        make_layer = layer_class(self.backend, config.form.post_norm)
        options = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
        options += (config.hidden_dropout_prob, config.form, config.attention_probs_dropout_prob)
        self.embeddings = Embeddings(config)
        self.layer = nn.ModuleList(make_layer(*options) for _ in range(config.num_hidden_layers))
        self.norm = None if config.form.post_norm else nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Hook of transformers."""
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seq_lens: list[int] | None = None,
        selected_W: Tensor | None = None,
    ) -> BaseModelOutput:
        """Padded: `input_ids` [B, S], `attention_mask` [B, S] (None: no padding). Packed: [T], with `cu_seqlens`.

        The longest cell and all lengths, where they are given, need not be read from the device. `selected_W`: the
        tokens whose vectors are asked for, by their numbers in the flattened `input_ids` (with `context_parallel` in
        this rank's part of them), int64 and rising. The output is then [W, E], and most of what only the others would
        need in the last layer is not computed. Raises ValueError for cells longer than there are positions.
        """
        mask_BS = None if attention_mask is None else attention_mask.bool()
        no_angles_R = torch.zeros(self.config.head_dim // 2, device=input_ids.device)
        borders = (cu_seqlens, max_seqlen, seq_lens)
        drops = self.training and (self.config.hidden_dropout_prob or self.config.attention_probs_dropout_prob)
        seed = draw_seed() if drops else None
        inputs = attention_inputs(input_ids, mask_BS, *borders, no_angles_R, self.context_parallel, False, seed)
        if inputs.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"a cell of {inputs.max_seqlen} tokens is longer than max_position_embeddings "
                f"{self.config.max_position_embeddings}; cut it to its first genes."
            )
        positions_N = inputs.positions_T
        if positions_N is None:
            positions_N = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.context_parallel:
            input_ids, positions_N = self.context_parallel.part(input_ids), self.context_parallel.part(positions_N)
        x_NE = self.embeddings(input_ids, positions_N, inputs.at(0).own_words_N)
        *others, last = self.layer
        for number, layer in enumerate(others, 1):
            x_NE = layer(x_NE, inputs.at(number))
        x_NE = last(x_NE, inputs.at(len(self.layer)), selected_W)
        return BaseModelOutput(last_hidden_state=x_NE if self.norm is None else self.norm(x_NE))


class GeneformerForMaskedLM(ForMaskedLM, GeneformerPreTrainedModel):
    """The encoder with the head that predicts masked genes."""

    def __init__(self, config: GeneformerConfig):
        super().__init__(config)
        self.geneformer = GeneformerModel(config)
        self.lm_head = LMHead(config)
        self.post_init()

    def predict(self, x_NE: Tensor) -> Tensor:
        """[N, E] to logits [N, V]."""
        # Not a second Parameter but the same one, used in the forward pass of the module that owns both.
        return self.lm_head(x_NE, self.geneformer.embeddings.word_embeddings.weight)


class GeneformerForClasses(ForMaskedLM, GeneformerPreTrainedModel):
    """The encoder with what tells classes apart: of cells, by their first token through BERT's pooler, or of genes.

    `labels` are classes, of cells at their first tokens: all else is as in masked-language modelling.
    """

    def __init__(self, config: GeneformerConfig):
        super().__init__(config)
        self.geneformer = GeneformerModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.task == "cells" else None
        self.classifier = nn.Linear(config.hidden_size, len(config.classes))
        self.post_init()

    def predict(self, x_NE: Tensor) -> Tensor:
        """[N, E] to logits of each class."""
        if self.pooler is not None:
            x_NE = torch.tanh(self.pooler(x_NE))
        return self.classifier(F.dropout(x_NE, self.config.hidden_dropout_prob, self.training))


class RegressionHead(nn.Module):
    """Of BioNeMo 2's `MegatronRegressionMLPHead`: linear map, activation, linear map to one number."""

    def __init__(self, config: GeneformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, 1)

    def forward(self, x_BE: Tensor) -> Tensor:
        """[B, E] to [B], at least in FP32: lengths are thousands."""
        with torch.autocast(x_BE.device.type, enabled=False):
            x_BE = x_BE.to(torch.promote_types(x_BE.dtype, torch.float32))
            return self.fc2(self.activation(self.fc1(x_BE))).squeeze(-1)


@dataclass
class LengthOutput(masked_lm.MaskedLMOutput):
    """Also how many tokens each cell is found to have, [B]."""

    found_lengths: Tensor | None = None


class GeneformerForLength(GeneformerForMaskedLM):
    """Also tells how many tokens a cell has, by its first one; the loss is both, as BioNeMo 2's (B cells)."""

    def __init__(self, config: GeneformerConfig):
        super().__init__(config)
        self.regression_head = RegressionHead(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        selected: Tensor | None = None, counts: Mapping[str, float] | None = None, firsts: Tensor | None = None,
        lengths: Tensor | None = None, **borders,
    ) -> LengthOutput:  # fmt: skip
        """As `ForMaskedLM.forward`; `firsts` [B] are the numbers of the first tokens, which `selected` has too."""
        if firsts is None:
            return super().forward(input_ids, attention_mask, labels, selected=selected, counts=counts, **borders)
        x_WE = self.geneformer(input_ids, attention_mask, selected_W=selected, **borders).last_hidden_state
        labels_W, logits_WV = labels.flatten()[selected], self.predict(x_WE)
        found_B = self.regression_head(x_WE[torch.searchsorted(selected, firsts)])
        at_least_fp32 = torch.promote_types(logits_WV.dtype, torch.float32)
        parts = {
            "masked_lm": F.cross_entropy(logits_WV.to(at_least_fp32), labels_W, reduction="sum")
            / max(counts["labels"], 1),
            "length": (found_B - lengths.to(found_B.dtype)).square().sum() / max(counts["cells"], 1),
        }
        loss = sum(parts.values())
        return LengthOutput(loss=loss, logits=logits_WV, parts=parts, labels=labels_W, found_lengths=found_B)


# What a model may be for; `length` is BioNeMo 2's FineTuneSeqLenBioBertConfig.
TASKS = {
    "masked_lm": GeneformerForMaskedLM,
    "cells": GeneformerForClasses,
    "genes": GeneformerForClasses,
    "length": GeneformerForLength,
}


def model_for(config: GeneformerConfig) -> ForMaskedLM:
    """The model of this configuration's task, with the adapters that it names."""
    model = TASKS[config.task](config)
    if config.lora:
        add_adapters(model, config.lora, model.base_model.backend)
    return model


def training_flops(config: GeneformerConfig, counts: Mapping[str, int], layer_backend: str | None = None) -> float:
    """Floating-point operations of one training step, as tokens/masked_lm.py counts them."""
    width, feed_forward = config.hidden_size, 2 * config.hidden_size * config.intermediate_size
    head = width**2 + width * config.padded_vocab_size
    return masked_lm.training_flops(counts, config.num_hidden_layers, width, feed_forward, head, layer_backend)
