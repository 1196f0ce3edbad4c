# SPDX-License-Identifier: Apache-2.0
"""The transformer layer in plain PyTorch, with TransformerEngine's parameter names, shapes and semantics.

Shapes: B sequences, S padded length, T packed tokens of all sequences; N is either `B, S` (padded) or `T` (packed).
H heads of D channels, E = H * D the width, F the feed-forward width. W tokens are selected in the last layer: those
with a label, and a few. It computes no projection and no feed-forward part of the others; all stay keys and values.

Every matrix product goes through the attribute `matmul(x, weight, bias)` of its module (`layernorm_qkv`, `proj`,
`layernorm_mlp`), `F.linear` unless replaced: that is where another precision comes in.
"""

import copy
from collections.abc import Callable
from functools import cache, cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_layers import GradientCheckpointingLayer

from tokens.dropout import ATTENDED, FED, Dropped, attention_of_rows, drop, fold, token_words


class Form(NamedTuple):
    """In what the layers of two models may differ. RMSNorm has no bias, whatever `bias` says.

    With `swiglu` the feed-forward part's first map is twice as wide: the gate's rows, then those that it lets through.
    With `post_norm` sums are normalized, as in BERT (arXiv:1810.04805), and not what goes into attention.
    """

    normalization: str = "LayerNorm"  # or RMSNorm (arXiv:1910.07467)
    activation: str = "gelu"  # or relu, or swiglu (arXiv:2002.05202)
    bias: bool = True
    post_norm: bool = False


USUAL = Form()


def parameter(*shape: int, present: bool = True) -> nn.Parameter | None:
    """One without values, or none."""
    return nn.Parameter(torch.empty(shape)) if present else None


def swiglu(x_NF: Tensor) -> Tensor:
    """[N, 2 F] to [N, F]: SiLU of the first half times the second."""
    gate_NF, up_NF = x_NF.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swiglu": swiglu}


@cache
def first_cosine() -> None:
    """On several threads, the first of a process may be off by 1.5e-4 on one of them (MKL's, with torch 2.13)."""
    torch.ones(1, dtype=torch.float32, device="cpu").cos()


class AttentionInputs:
    """What all layers of one forward pass share: rotary angles and the borders of the sequences.

    `angles_SD` are FP32, for positions 0 ... longest sequence - 1, the D/2 frequencies twice; where nothing `turns`
    they are 0, for kernels that turn all the same. `mask_B11S` is True for real tokens, None where no padding is.
    Packed input has `cu_seqlens` (int32, from 0 to T) instead; with `context_parallel` (context_parallel.py) a rank
    has T / ranks tokens of it, and all of some heads in attention. `words_N` are what dropout.py draws by, None where
    nothing is dropped; `own_words_N` those of this rank's tokens.
    """

    words_N = own_words_N = None

    # Not a dataclass: FSDP2 casts the float tensors in those to BF16 on the way into a layer, and an angle of 1,000
    # radians would be off by up to 2.

    def __init__(
        self,
        angles_SD: Tensor,
        mask_B11S: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions_T: Tensor | None = None,
        max_seqlen: int | None = None,
        context_parallel=None,
        seq_lens: list[int] | None = None,
        turns: bool = True,
    ):
        self.context_parallel, self.turns, self.positions_T = context_parallel, turns, positions_T
        if seq_lens is not None:
            self.seq_lens = seq_lens
        self.angles_SD, self.mask_B11S, self.cu_seqlens, self.max_seqlen = angles_SD, mask_B11S, cu_seqlens, max_seqlen
        first_cosine()
        cos_SD, sin_SD = angles_SD.cos(), angles_SD.sin()
        num_angles = angles_SD.shape[1] // 2
        self.cos_SR, self.sin_SR = cos_SD[:, :num_angles].contiguous(), sin_SD[:, :num_angles].contiguous()
        if positions_T is not None:
            cos_SD, sin_SD = cos_SD[positions_T], sin_SD[positions_T]
        self.cos_N1D, self.sin_N1D = cos_SD.unsqueeze(-2), sin_SD.unsqueeze(-2)

    def at(self, layer: int) -> "AttentionInputs":
        """The inputs with the words of a layer, which count from 1; those of 0 are the embeddings'."""
        if self.words_N is None:
            return self
        inputs = copy.copy(self)
        inputs.words_N = inputs.own_words_N = fold(self.words_N, layer)
        if self.context_parallel:
            inputs.own_words_N = self.context_parallel.part(inputs.words_N)
        return inputs

    @cached_property
    def seq_lens(self) -> list[int]:
        """Lengths of the packed sequences, if they were not given; on a GPU, reading them waits for it."""
        return self.cu_seqlens.diff().tolist()


def sequence_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The number of the sequence that each packed token belongs to, [T]."""
    tokens_T = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(tokens_T, cu_seqlens[1:], right=True)


def attention_inputs(
    input_ids: Tensor, mask_BS: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None,
    seq_lens: list[int] | None, inv_freq_R: Tensor, context_parallel=None, turns: bool = True,
    seed: Tensor | None = None,
) -> AttentionInputs:  # fmt: skip
    """Positions, from 0 in every sequence, and borders: made once for all layers. R = D / 2 frequencies, FP32.

    Not `turns`: attention does not know of positions, and all frequencies are 0. `seed`: of what is dropped, if any.

    Raises ValueError for a batch that is neither padded nor packed, and a padded one with context parallelism.
    """
    if (input_ids.ndim == 1) != (cu_seqlens is not None):
        raise ValueError(
            f"input_ids of {input_ids.ndim} dimension(s) {'with' if cu_seqlens is not None else 'without'} "
            "cu_seqlens is neither a padded batch [B, S] nor a packed one [T] with cu_seqlens."
        )
    if context_parallel and cu_seqlens is None:
        raise ValueError("Context parallelism takes packed batches only: [T], with cu_seqlens.")
    mask_B11S = positions_T = None
    if cu_seqlens is None:
        max_seqlen = input_ids.shape[1]
        sequences_N, positions_N = (torch.arange(n, device=input_ids.device) for n in input_ids.shape)
        sequences_N = sequences_N[:, None]
        if mask_BS is not None:
            # A row of padding only attends to itself: a softmax over nothing is NaN in some kernels.
            mask_B11S = (mask_BS | ~mask_BS.any(-1, keepdim=True))[:, None, None]
    else:
        max_seqlen = max_seqlen or int(cu_seqlens.diff().max())
        sequences_N = sequence_index(cu_seqlens, len(input_ids))
        positions_N = positions_T = torch.arange(len(input_ids), device=input_ids.device) - cu_seqlens[sequences_N]
    angles_SD = torch.arange(max_seqlen, device=input_ids.device)[:, None] * inv_freq_R.repeat(2)
    inputs = AttentionInputs(
        angles_SD, mask_B11S, cu_seqlens, positions_T, max_seqlen, context_parallel, seq_lens, turns
    )
    if seed is not None:
        inputs.words_N = token_words(seed, sequences_N, positions_N)
    return inputs


def rotate(x_NHD: Tensor, inputs: AttentionInputs) -> Tensor:
    """Rotary position embedding in FP32, the first half of the channels paired with the second (arXiv:2104.09864)."""
    if not inputs.turns:
        return x_NHD
    first, second = x_NHD.chunk(2, dim=-1)
    turned_NHD = torch.cat((-second, first), dim=-1)
    return (x_NHD * inputs.cos_N1D + turned_NHD * inputs.sin_N1D).to(x_NHD.dtype)


def attention(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, inputs: AttentionInputs, dropped: Dropped | None = None
) -> Tensor:
    """Softmax attention of every token to the real tokens of its own sequence."""
    if inputs.cu_seqlens is None:
        by_head = (x.transpose(1, 2) for x in (q_NHD, k_NHD, v_NHD))
        return attention_of_rows(*by_head, inputs.mask_B11S, dropped).transpose(1, 2)
    # The kernel behind varlen_attn takes these only.
    in_16_bits = q_NHD.is_cuda and q_NHD.dtype in (torch.bfloat16, torch.float16)
    if in_16_bits and q_NHD.shape[-1] % 8 == 0 and not dropped:
        cu_seqlens, max_seqlen = inputs.cu_seqlens, inputs.max_seqlen
        return varlen_attn(q_NHD, k_NHD, v_NHD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return attention_by_sequence(q_NHD, k_NHD, v_NHD, inputs.seq_lens, dropped)


@torch.compiler.disable  # It would be compiled again for every new list of lengths.
def attention_by_sequence(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, lengths: list[int], dropped: Dropped | None
) -> Tensor:
    """Attention of packed sequences, one call a sequence."""
    # [1, H, length, D]: without the leading 1, the CPU falls back to a kernel that takes two to four times as long.
    by_head = (x.unsqueeze(0).transpose(1, 2).split(lengths, dim=2) for x in (q_THD, k_THD, v_THD))
    of_each = dropped.split(lengths) if dropped else [None] * len(lengths)
    contexts_1HSD = [attention_of_rows(*qkv, None, own) for *qkv, own in zip(*by_head, of_each, strict=True)]
    return torch.cat(contexts_1HSD, dim=2).transpose(1, 2).squeeze(0)


def take_selected(x_NE: Tensor, selected_W: Tensor | None, token_dims: int = 1) -> Tensor:
    """[N, E] to [W, E]: the tokens selected, numbered through all sequences. None: all, as they are.

    The last `token_dims` dimensions are those of one token: 2 for [N, H, D].
    """
    return x_NE if selected_W is None else x_NE.flatten(0, -1 - token_dims).index_select(0, selected_W)


class Kernels:
    """What other backends compute in another way."""

    def attention(
        self, qkv_NHC: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None,
        dropped: Dropped | None = None,
    ) -> Tensor:  # fmt: skip
        """q, k and v of each head [N, H, 3 D], not turned yet, to [N, H, D], or of selected tokens [W, H, D]."""
        q_NHD, k_NHD, v_NHD = qkv_NHC.chunk(3, dim=-1)
        context_NHD = attention(rotate(q_NHD, inputs), rotate(k_NHD, inputs), v_NHD, inputs, dropped)
        return take_selected(context_NHD, selected_W, token_dims=2)

    def drop(self, x_NE: Tensor, words_N: Tensor, place: int, rate: float) -> Tensor:
        """As dropout.py's."""
        return drop(x_NE, words_N, place, rate)

    def layer_norm(self, x_NE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> Tensor:
        """[N, E] to [N, E]; without a bias RMSNorm."""
        if bias_E is None:
            return F.rms_norm(x_NE, x_NE.shape[-1:], weight_E, eps)
        return F.layer_norm(x_NE, x_NE.shape[-1:], weight_E, bias_E, eps)

    def norm_of_sum(
        self, x_NE: Tensor, added_NE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float
    ) -> Tensor:
        """Both [N, E], to [N, E]."""
        return self.layer_norm(x_NE + added_NE, weight_E, bias_E, eps)

    def mlp(self, x_NE: Tensor, part: "LayerNormMLP") -> Tensor:
        """[N, E] to [N, E]."""
        x_NF = part.activation(part.matmul(x_NE, part.fc1_weight, part.fc1_bias))
        return part.matmul(x_NF, part.fc2_weight, part.fc2_bias)


class LayerNormLinear(nn.Module):
    """Norm, then a linear map."""

    kernels = Kernels()

    def __init__(self, in_features: int, out_features: int, eps: float, form: Form):
        super().__init__()
        self.layer_norm_weight = parameter(in_features)
        self.layer_norm_bias = parameter(in_features, present=form.normalization == "LayerNorm")
        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features, present=form.bias)
        self.eps = eps
        self.matmul = F.linear

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N, in_features] to [N, out_features]."""
        x_NE = self.kernels.layer_norm(x_NE, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return self.matmul(x_NE, self.weight, self.bias)


class Linear(nn.Module):
    """A linear map."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features, present=bias)
        self.matmul = F.linear

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N, in_features] to [N, out_features]."""
        return self.matmul(x_NE, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Norm, multi-head attention with rotary positions, projection."""

    kernels = Kernels()

    def __init__(self, hidden_size: int, num_heads: int, eps: float, form: Form, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.post_norm, self.dropout = num_heads, form.post_norm, dropout
        if form.post_norm:
            self.qkv = Linear(hidden_size, 3 * hidden_size, form.bias)
        else:
            self.layernorm_qkv = LayerNormLinear(hidden_size, 3 * hidden_size, eps, form)
        self.proj = Linear(hidden_size, hidden_size, form.bias)

    def forward(self, x_NE: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None) -> Tensor:
        """[N, E] to [N, E], or of selected tokens [W, E]; the residual not added."""
        to_qkv = self.qkv if self.post_norm else self.layernorm_qkv
        # TransformerEngine's order of rows: q, k and v of the first head, then those of the second, ...
        qkv_NHC = to_qkv(x_NE).unflatten(-1, (self.num_heads, -1))
        context_parallel, dropped = inputs.context_parallel, None
        if self.dropout and self.training:
            assert inputs.words_N is not None, "attention_inputs was given no seed"
            first_head = context_parallel.first_head(self.num_heads) if context_parallel else 0
            dropped = Dropped(inputs.words_N, self.dropout, first_head)
        if context_parallel is None:
            return self.proj(self.kernels.attention(qkv_NHC, inputs, selected_W, dropped).flatten(-2))
        context_TKD = self.kernels.attention(context_parallel.tokens_to_heads(qkv_NHC), inputs, dropped=dropped)
        context_NHD = context_parallel.heads_to_tokens(context_TKD, self.num_heads)
        return self.proj(take_selected(context_NHD.flatten(-2), selected_W))


class LayerNormMLP(nn.Module):
    """Norm, linear map, erf-GELU, ReLU or SwiGLU, linear map."""

    kernels = Kernels()

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float, form: Form):
        super().__init__()
        self.activation = ACTIVATIONS[form.activation]
        wide = 2 * intermediate_size if form.activation == "swiglu" else intermediate_size
        self.layer_norm_weight = parameter(hidden_size)
        self.layer_norm_bias = parameter(hidden_size, present=form.normalization == "LayerNorm")
        self.fc1_weight = parameter(wide, hidden_size)
        self.fc1_bias = parameter(wide, present=form.bias)
        self.fc2_weight = parameter(hidden_size, intermediate_size)
        self.fc2_bias = parameter(hidden_size, present=form.bias)
        self.eps = eps
        self.matmul = F.linear

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N, E] to [N, E], the residual not added."""
        x_NE = self.kernels.layer_norm(x_NE, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return self.kernels.mlp(x_NE, self)


class PostNormMLP(LayerNormMLP):
    """Of a sum."""

    def forward(self, x_NE: Tensor, added_NE: Tensor) -> tuple[Tensor, Tensor]:
        """[N, E] and what is to be added to it: the norm of their sum, and this module's own part [N, E]."""
        norm = (self.layer_norm_weight, self.layer_norm_bias, self.eps)
        y_NE = self.kernels.norm_of_sum(x_NE, added_NE, *norm)
        return y_NE, self.kernels.mlp(y_NE, self)


class NormOfSum(nn.Module):
    """The norm at the end of a post-norm layer, with the names that TransformerEngine's has."""

    kernels = Kernels()

    def __init__(self, hidden_size: int, eps: float, form: Form):
        super().__init__()
        self.weight = parameter(hidden_size)
        self.bias = parameter(hidden_size, present=form.normalization == "LayerNorm")
        self.eps = eps

    def forward(self, x_NE: Tensor, added_NE: Tensor) -> Tensor:
        """Both [N, E], to [N, E]."""
        return self.kernels.norm_of_sum(x_NE, added_NE, self.weight, self.bias, self.eps)


# The base class answers to `gradient_checkpointing_enable()`. It recomputes `forward` and not `__call__`, so that
# FSDP2's hooks, which cast the inputs, stay outside.
class TransformerLayer(GradientCheckpointingLayer):
    """Pre-norm encoder layer, with dropout of what is added to the residual stream, and of attention's softmax."""

    mlp_class = LayerNormMLP

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float, hidden_dropout: float = 0.0,
        form: Form = USUAL, attention_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.self_attention = SelfAttention(hidden_size, num_heads, eps, form, attention_dropout)
        self.layernorm_mlp = self.mlp_class(hidden_size, intermediate_size, eps, form)
        self.hidden_dropout = hidden_dropout

    def drop(self, x_NE: Tensor, inputs: AttentionInputs, place: int, selected_W: Tensor | None = None) -> Tensor:
        """Of [N, E], or of selected tokens [W, E], what one part of the layer adds."""
        if not self.hidden_dropout or not self.training:
            return x_NE
        words_N = take_selected(inputs.own_words_N, selected_W, token_dims=0)
        return self.self_attention.kernels.drop(x_NE, words_N, place, self.hidden_dropout)

    def forward(self, x_NE: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None) -> Tensor:
        """[N, E] to [N, E], or of selected tokens [W, E]."""
        attended_NE = self.drop(self.self_attention(x_NE, inputs, selected_W), inputs, ATTENDED, selected_W)
        x_NE = take_selected(x_NE, selected_W) + attended_NE
        return x_NE + self.drop(self.layernorm_mlp(x_NE), inputs, FED, selected_W)


class PostNormLayer(TransformerLayer):
    """Post-norm encoder layer, as BERT's: the norm of a sum goes on, and is what the next part is added to."""

    mlp_class = PostNormMLP

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float, hidden_dropout: float = 0.0,
        form: Form = USUAL, attention_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(hidden_size, intermediate_size, num_heads, eps, hidden_dropout, form, attention_dropout)
        self.layernorm = NormOfSum(hidden_size, eps, form)

    def forward(self, x_NE: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None) -> Tensor:
        """[N, E] to [N, E], or of selected tokens [W, E]."""
        attended_NE = self.drop(self.self_attention(x_NE, inputs, selected_W), inputs, ATTENDED, selected_W)
        x_NE, added_NE = self.layernorm_mlp(take_selected(x_NE, selected_W), attended_NE)
        return self.layernorm(x_NE, self.drop(added_NE, inputs, FED, selected_W))
