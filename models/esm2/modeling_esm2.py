# SPDX-License-Identifier: Apache-2.0
"""ESM-2, the protein language model of Lin et al. 2023 (doi:10.1126/science.ade2574), for padded and packed batches.

Shapes: B sequences, S padded length, T packed tokens of all sequences; N is either `B, S` (padded) or `T` (packed).
W selected tokens (those with a label, and a few), E the width, V the 33 tokens, P the vocabulary padded to 64 rows.

It computes what `transformers.EsmForMaskedLM` computes; `convert.py` translates the weights both ways.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from common.weights import random_normal
from tokens import masked_lm
from tokens.backends import layer_class, resolve_layer_backend
from tokens.dropout import draw_seed
from tokens.layers import AttentionInputs, attention_inputs, sequence_index
from tokens.masked_lm import ForMaskedLM, TokenModel


def _size(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "intermediate_size": 4 * hidden_size,
    }


# `Esm2Config(**SIZES[name])`. The first is ours, for laptops and tests; the others are the published ones.
SIZES = {
    "esm2_t4_1M": _size(4, 128, 4),
    "esm2_t6_8M_UR50D": _size(6, 320, 20),
    "esm2_t12_35M_UR50D": _size(12, 480, 20),
    "esm2_t30_150M_UR50D": _size(30, 640, 20),
    "esm2_t33_650M_UR50D": _size(33, 1280, 20),
    "esm2_t36_3B_UR50D": _size(36, 2560, 40),
    "esm2_t48_15B_UR50D": _size(48, 5120, 40),
}


class Esm2Config(PreTrainedConfig):
    """Shape of the model; the defaults that remain are common to all published sizes."""

    model_type = "esm2_native"

    hidden_size: int = 320
    num_hidden_layers: int = 6
    num_attention_heads: int = 20
    intermediate_size: int = 1280
    vocab_size: int = 33
    padded_vocab_size: int = 64
    max_position_embeddings: int = 1026
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # The published checkpoints were trained with frequencies rounded to float16, and carry them; see convert.py.
    rope_inv_freq_dtype: str = "float32"
    token_dropout: bool = True
    hidden_dropout_prob: float = 0.0
    cls_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    mask_token_id: int = 32
    initializer_range: float = 0.02
    layer_backend: str = "auto"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not give num_attention_heads {self.num_attention_heads} an even "
                f"number of channels each; it must be a multiple of {2 * self.num_attention_heads}."
            )
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size {self.padded_vocab_size} must be at least vocab_size {self.vocab_size}."
            )
        if not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"hidden_dropout_prob {self.hidden_dropout_prob} must be at least 0 and below 1.")
        backends = ("auto", "te", "cpp", "torch", "transformers")
        if self.layer_backend not in backends:
            raise ValueError(f"layer_backend {self.layer_backend!r} must be one of {', '.join(backends)}.")

    @property
    def head_dim(self) -> int:
        """Channels of each head."""
        return self.hidden_size // self.num_attention_heads


def rope_inv_freq(config: Esm2Config, dtype: str, device: torch.device | None = None) -> Tensor:
    """Rotary frequencies in radians per position, FP32 [D/2], after rounding to `dtype`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return (1.0 / config.rope_theta**exponents).to(getattr(torch, dtype)).float()


class Embeddings(nn.Module):
    """Token embedding with ESM's token dropout: a `<mask>` is zero, and what is left is scaled up."""

    def __init__(self, config: Esm2Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size, config.pad_token_id)
        self.token_dropout = config.token_dropout
        self.mask_token_id = config.mask_token_id

    def forward(
        self, input_ids_N: Tensor, mask_BS: Tensor | None, cu_seqlens: Tensor | None, context_parallel=None
    ) -> Tensor:
        """Tokens [N] to [N, E], 0 where `mask_BS` is False; with `context_parallel` this rank's part of them only."""
        part = context_parallel.part if context_parallel else lambda x_N: x_N
        x_NE = self.word_embeddings(part(input_ids_N))
        if self.token_dropout:
            is_mask_N = input_ids_N == self.mask_token_id  # of whole sequences: it is their share of masks that counts
            if cu_seqlens is None:
                lengths_B = input_ids_N.shape[1] if mask_BS is None else mask_BS.sum(-1).clamp(min=1)
                scale_B = token_dropout_scale(is_mask_N.sum(-1), lengths_B)
                scale_N = scale_B.unsqueeze(-1)
            else:
                num_masks_before = F.pad(is_mask_N.cumsum(0), (1, 0))[cu_seqlens]
                scale_B = token_dropout_scale(num_masks_before.diff(), cu_seqlens.diff().clamp(min=1))
                scale_N = scale_B[sequence_index(cu_seqlens, len(input_ids_N))]
            x_NE = x_NE.masked_fill(part(is_mask_N).unsqueeze(-1), 0.0)
            x_NE = (x_NE * part(scale_N).unsqueeze(-1)).to(x_NE.dtype)
        return x_NE if mask_BS is None else x_NE * mask_BS.unsqueeze(-1)


def token_dropout_scale(num_masks_B: Tensor, lengths_B: Tensor | int) -> Tensor:
    """Usual over observed share of tokens that are not `<mask>`: 15% are chosen in training, 80% of those masked."""
    return (1 - 0.15 * 0.8) / (1 - num_masks_B / lengths_B)


class Encoder(nn.Module):
    """The stack of layers and the last norm."""

    def __init__(self, config: Esm2Config):
        super().__init__()
        self.backend = resolve_layer_backend(config.layer_backend, config.head_dim)
        make_layer = layer_class(self.backend)
        options = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
        options += (config.hidden_dropout_prob,)
        self.layer = nn.ModuleList(make_layer(*options) for _ in range(config.num_hidden_layers))
        self.emb_layer_norm_after = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_NE: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None) -> Tensor:
        """[N, E] to [N, E], or of selected tokens [W, E]."""
        *others, last = self.layer
        for number, layer in enumerate(others, 1):
            x_NE = layer(x_NE, inputs.at(number))
        return self.emb_layer_norm_after(last(x_NE, inputs.at(len(self.layer)), selected_W))


class ContactRegression(nn.Module):
    """Weights of the published contact predictor, carried along and not trained: buffers."""

    def __init__(self, config: Esm2Config):
        super().__init__()
        self.register_buffer("weight", torch.empty(1, config.num_hidden_layers * config.num_attention_heads))
        self.register_buffer("bias", torch.empty(1))


class LMHead(nn.Module):
    """Dense, erf-GELU, norm, and the word embedding as the decoder."""

    def __init__(self, config: Esm2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x_NE: Tensor, embedding_PE: Tensor) -> Tensor:
        """[N, E] to logits [N, V]."""
        x_NE = self.layer_norm(F.gelu(self.dense(x_NE)))
        # Matrix units want a multiple of 8 rows: multiply by all 64, then cut.
        return F.linear(x_NE, embedding_PE)[..., : len(self.bias)] + self.bias


class Esm2PreTrainedModel(TokenModel):
    """What both models share towards `transformers`."""

    config_class = Esm2Config
    base_model_prefix = "esm"

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Biases 0, norm weights 1, matrices normal with deviation `initializer_range`, as `EsmPreTrainedModel` has.

        The embedding of padding and of the tokens that do not exist is 0.
        """
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        # The encoder's weights do not depend on whether there is a head around it.
        value = random_normal(shape, self.config.initializer_range, seed, name.removeprefix("esm."))
        if name.endswith("word_embeddings.weight"):
            value[self.config.pad_token_id] = 0.0
            value[self.config.vocab_size :] = 0.0
        return value


class Esm2Model(Esm2PreTrainedModel):
    """The encoder: tokens in, one vector of width E per token out."""

    context_parallel = (
        None  # tokens.context_parallel.ContextParallel: each rank goes on with its part of the packed tokens
    )

    def __init__(self, config: Esm2Config):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.contact_head = nn.ModuleDict({"regression": ContactRegression(config)})
        self.post_init()

    @property
    def backend(self) -> str:
        """The layers'."""
        return self.encoder.backend

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

        The longest sequence and all lengths, where they are given, need not be read from the device. `selected_W`:
        the tokens whose vectors are asked for, by their numbers in the flattened `input_ids` (with `context_parallel`
        in this rank's part of them), int64 and rising. The output is then [W, E], and most of what only the others
        would need in the last layer is not computed.
        """
        mask_BS = None if attention_mask is None else attention_mask.bool()
        inv_freq_R = rope_inv_freq(self.config, self.config.rope_inv_freq_dtype, input_ids.device)
        borders = (cu_seqlens, max_seqlen, seq_lens)
        seed = draw_seed() if self.training and self.config.hidden_dropout_prob else None
        inputs = attention_inputs(input_ids, mask_BS, *borders, inv_freq_R, self.context_parallel, seed=seed)
        x_NE = self.embeddings(input_ids, mask_BS, cu_seqlens, self.context_parallel)
        x_NE = self.encoder(x_NE, inputs, selected_W)
        return BaseModelOutput(last_hidden_state=x_NE)


class Esm2ForMaskedLM(ForMaskedLM, Esm2PreTrainedModel):
    """The encoder with the head that predicts masked tokens."""

    def __init__(self, config: Esm2Config):
        super().__init__(config)
        self.esm = Esm2Model(config)
        self.lm_head = LMHead(config)
        self.post_init()

    def predict(self, x_NE: Tensor) -> Tensor:
        """[N, E] to logits [N, V]."""
        # Not a second Parameter but the same one, used in the forward pass of the module that owns both (FSDP2: the
        # root), so keep the embedding in one sharding group with the head.
        return self.lm_head(x_NE, self.esm.embeddings.word_embeddings.weight)


def training_flops(config: Esm2Config, counts: Mapping[str, int], layer_backend: str | None = None) -> float:
    """Floating-point operations of one training step, as tokens/masked_lm.py counts them."""
    width, feed_forward = config.hidden_size, config.intermediate_size
    head = width**2 + width * config.padded_vocab_size
    return masked_lm.training_flops(
        counts, config.num_hidden_layers, width, 2 * width * feed_forward, head, layer_backend
    )
