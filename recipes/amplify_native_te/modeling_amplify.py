# SPDX-License-Identifier: Apache-2.0
"""AMPLIFY, the protein language model of Fournier et al. 2024 (doi:10.1101/2024.09.23.614603), padded and packed.

Shapes: B sequences, S padded length, T packed tokens of all sequences; N is either `B, S` (padded) or `T` (packed).
W selected tokens (those with a label, and a few), E the width, V the 27 tokens.

It computes what the published code computes, and `transformers.EuroBertForMaskedLM` with the same weights. Both turn
pairs of a head's channels by rotary angles: the published code channels 2j and 2j + 1, EuroBERT and we j and j + D/2.
So the rows of q and k stand in another order here; `convert_amplify.py` knows it, and the mathematics is the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from common.weights import random_uniform
from tokens import masked_lm
from tokens.backends import layer_class, resolve_layer_backend
from tokens.layers import Form, attention_inputs
from tokens.masked_lm import ForMaskedLM, TokenModel


FORM = Form(normalization="RMSNorm", activation="swiglu", bias=False)


def swiglu_width(intermediate_size: int) -> int:
    """The width inside of SwiGLU for the `intermediate_size` of the published configuration."""
    return 8 * -(-(2 * intermediate_size // 3) // 8)


def _size(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "intermediate_size": swiglu_width(4 * hidden_size),
    }


# `AmplifyConfig(**SIZES[name])`. The first two are ours, for laptops and tests; the others are the published ones.
SIZES = {
    "AMPLIFY_1M": _size(4, 128, 2),
    "AMPLIFY_10M": _size(6, 384, 6),
    "AMPLIFY_120M": _size(24, 640, 10),
    "AMPLIFY_350M": _size(32, 960, 15),
}


class AmplifyConfig(PreTrainedConfig):
    """Shape of the model; the defaults that remain are common to all published sizes.

    `intermediate_size` is the width inside of SwiGLU; the published configuration's, of the same name, is larger.
    """

    model_type = "amplify_native"

    hidden_size: int = 640
    num_hidden_layers: int = 24
    num_attention_heads: int = 10
    intermediate_size: int = 1712
    vocab_size: int = 27
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    pad_token_id: int = 0
    unk_token_id: int = 1
    mask_token_id: int = 2
    bos_token_id: int = 3
    eos_token_id: int = 4
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    layer_backend: str = "auto"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not give num_attention_heads {self.num_attention_heads} an even "
                f"number of channels each; it must be a multiple of {2 * self.num_attention_heads}."
            )
        backends = ("auto", "te", "cpp", "torch")
        if self.layer_backend not in backends:
            raise ValueError(f"layer_backend {self.layer_backend!r} must be one of {', '.join(backends)}.")

    @property
    def head_dim(self) -> int:
        """Channels of each head."""
        return self.hidden_size // self.num_attention_heads


def rope_inv_freq(config: AmplifyConfig, device: torch.device | None = None) -> Tensor:
    """Rotary frequencies in radians per position, FP32 [D/2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_theta**exponents


class AmplifyPreTrainedModel(TokenModel):
    """What both models share towards `transformers`."""

    config_class = AmplifyConfig
    base_model_prefix = "amplify"

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The bias 0, norm weights 1, matrices uniform in +-`initializer_range`, the embedding of padding included."""
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        # The encoder's weights do not depend on whether there is a head around it.
        return random_uniform(shape, self.config.initializer_range, seed, name.removeprefix("amplify."))


class AmplifyModel(AmplifyPreTrainedModel):
    """The encoder: tokens in, one vector of width E per token out."""

    # tokens.context_parallel.ContextParallel: each rank goes on with its part of the packed tokens
    context_parallel = None

    def __init__(self, config: AmplifyConfig):
        super().__init__(config)
        self.backend = resolve_layer_backend(config.layer_backend, config.head_dim)
        make_layer = layer_class(self.backend)
        options = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.rms_norm_eps)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layer = nn.ModuleList(make_layer(*options, form=FORM) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Hook of transformers."""
        return self.embeddings

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
        inv_freq_R, borders = rope_inv_freq(self.config, input_ids.device), (cu_seqlens, max_seqlen, seq_lens)
        inputs = attention_inputs(input_ids, mask_BS, *borders, inv_freq_R, self.context_parallel)
        x_NE = self.embeddings(self.context_parallel.part(input_ids) if self.context_parallel else input_ids)
        *others, last = self.layer
        for layer in others:
            x_NE = layer(x_NE, inputs)
        return BaseModelOutput(last_hidden_state=self.norm(last(x_NE, inputs, selected_W)))


class AmplifyForMaskedLM(ForMaskedLM, AmplifyPreTrainedModel):
    """The encoder with the linear map that predicts masked tokens."""

    def __init__(self, config: AmplifyConfig):
        super().__init__(config)
        self.amplify = AmplifyModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def predict(self, x_NE: Tensor) -> Tensor:
        """[N, E] to logits [N, V]."""
        return self.decoder(x_NE)


def training_flops(config: AmplifyConfig, counts: Mapping[str, int], layer_backend: str | None = None) -> float:
    """Floating-point operations of one training step, as tokens/masked_lm.py counts them."""
    width, feed_forward = config.hidden_size, 3 * config.hidden_size * config.intermediate_size
    head = width * config.vocab_size
    return masked_lm.training_flops(counts, config.num_hidden_layers, width, feed_forward, head, layer_backend)
