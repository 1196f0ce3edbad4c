# SPDX-License-Identifier: Apache-2.0
"""The transformer layer of `layers.py` made by TransformerEngine; importing this file imports TransformerEngine.

Written for TransformerEngine 2.20. Shapes as in `layers.py`.
"""

from functools import partial

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tokens.layers import USUAL, AttentionInputs, Form, rotate, take_selected


# FP8 state has to be put back before a layer is recomputed; only TransformerEngine's own function does that.
checkpoint = partial(te.checkpoint, use_reentrant=False)


class TransformerLayer(GradientCheckpointingLayer, te.TransformerLayer):
    """Pre-norm encoder layer, or post-norm as `form` says, with dropout as in `layers.py`. Padding is on the right."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float, hidden_dropout: float = 0.0,
        form: Form = USUAL, attention_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(
            hidden_size,
            intermediate_size,
            num_heads,
            layernorm_epsilon=eps,
            hidden_dropout=hidden_dropout,
            attention_dropout=attention_dropout,
            self_attn_mask_type="padding",
            fuse_qkv_params=True,
            normalization=form.normalization,
            activation=form.activation,
            bias=form.bias,
            apply_residual_connection_post_layernorm=form.post_norm,
            output_layernorm=form.post_norm,
            params_dtype=torch.float32,
            # A string: TransformerEngine compares it with "meta". It ignores `with torch.device(...)` by itself.
            device=torch.get_default_device().type,
        )
        self.inputs: AttentionInputs | None = None
        core = self.self_attention.core_attention
        core.register_forward_pre_hook(self._tokens_to_heads, with_kwargs=True)
        core.register_forward_hook(self._heads_to_tokens)

    def _tokens_to_heads(self, core, args, kwargs):
        """With context parallelism, between the projection and attention; as `layers.SelfAttention` does."""
        context_parallel = self.inputs.context_parallel
        if context_parallel is None:
            return None
        packed = kwargs.pop("qkv_layer", None)  # q, k, v in one tensor, or apart
        if packed is None:
            qkv_PHC = torch.cat(args[:3], dim=-1)
        else:
            qkv_PHC = packed.movedim(kwargs.pop("qkv_interleave_dim"), -2).flatten(-2)
        q_TKD, k_TKD, v_TKD = context_parallel.tokens_to_heads(qkv_PHC).chunk(3, dim=-1)
        core.num_gqa_groups_per_partition = q_TKD.shape[1]  # it compares
        turned = (rotate(q_TKD, self.inputs).contiguous(), rotate(k_TKD, self.inputs).contiguous())
        return (*turned, v_TKD.contiguous(), *args[3:]), kwargs

    def _heads_to_tokens(self, core, args, output):
        """[T, K D] to [P, E]."""
        context_parallel = self.inputs.context_parallel
        if context_parallel is None:
            return None
        context_TKD = output.unflatten(-1, (core.num_gqa_groups_per_partition, -1))
        return context_parallel.heads_to_tokens(context_TKD, self.self_attention.num_attention_heads).flatten(-2)

    def forward(self, x_NE: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None) -> Tensor:
        """[N, E] to [N, E], or of selected tokens [W, E]; the others are computed all the same."""
        return take_selected(self._all_tokens(x_NE, inputs), selected_W)

    def _all_tokens(self, x_NE: Tensor, inputs: AttentionInputs) -> Tensor:
        self.inputs = inputs
        angles_S11D = inputs.angles_SD[:, None, None] if inputs.turns and not inputs.context_parallel else None
        if inputs.cu_seqlens is not None:
            self.self_attention.qkv_format = "thd"
            return super().forward(
                x_NE,
                self_attn_mask_type="padding",
                rotary_pos_emb=angles_S11D,
                cu_seqlens_q=inputs.cu_seqlens,
                max_seqlen_q=inputs.max_seqlen,
            )
        self.self_attention.qkv_format = "bshd"
        if inputs.mask_B11S is None:
            return super().forward(x_NE, self_attn_mask_type="no_mask", rotary_pos_emb=angles_S11D)
        # Here True stands for a token to leave out.
        return super().forward(x_NE, ~inputs.mask_B11S, self_attn_mask_type="padding", rotary_pos_emb=angles_S11D)


PostNormLayer = TransformerLayer
