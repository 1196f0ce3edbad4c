# SPDX-License-Identifier: Apache-2.0
"""The transformer layer of `layers.py` made by TransformerEngine; importing this file imports TransformerEngine.

Written for TransformerEngine 2.20. Shapes as in `layers.py`.
"""

from functools import partial

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from layers import AttentionInputs


# FP8 state has to be put back before a layer is recomputed; only TransformerEngine's own function does that.
checkpoint = partial(te.checkpoint, use_reentrant=False)


class TransformerLayer(GradientCheckpointingLayer, te.TransformerLayer):
    """Pre-norm encoder layer without dropout. Padding has to be on the right."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float):
        super().__init__(
            hidden_size,
            intermediate_size,
            num_heads,
            layernorm_epsilon=eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="padding",
            fuse_qkv_params=True,
            params_dtype=torch.float32,
            # A string: TransformerEngine compares it with "meta". It ignores `with torch.device(...)` by itself.
            device=torch.get_default_device().type,
        )

    def forward(self, x_NE: Tensor, inputs: AttentionInputs) -> Tensor:
        """[N, E] to [N, E]."""
        angles_S11D = inputs.angles_SD[:, None, None]
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
