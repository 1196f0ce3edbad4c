# SPDX-License-Identifier: Apache-2.0
"""Masked-language modelling, whatever the encoder: the model around it, and what is measured.

Shapes: B sequences, S padded length, T packed tokens of all sequences; N is either `B, S` (padded) or `T` (packed).
W selected tokens (those with a label, and a few), E the width, V the vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, modeling_outputs

from common.batch import Batch
from common.weights import fill, named_tensors
from tokens.layout import IGNORED, select_tokens


# ---- the model


@dataclass
class MaskedLMOutput(modeling_outputs.MaskedLMOutput):
    """`loss` is the only part there is; `labels` are those of the tokens that `logits` belong to."""

    parts: dict[str, Tensor] | None = None
    labels: Tensor | None = None


class TokenModel(PreTrainedModel):
    """What encoders, and models around them, share towards `transformers`; `backend` is the encoder's layers'."""

    supports_gradient_checkpointing = True

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """A parameter's first value."""
        raise NotImplementedError

    def initialize_weights(self):
        """Fill what has no value yet: everything after construction, what the checkpoint lacked after loading."""
        new = {name: x for name, x in named_tensors(self).items() if not getattr(x, "_is_hf_initialized", False)}
        fill(new, lambda name: self.initial_value(name, new[name].shape, torch.initial_seed()))
        for x in new.values():
            x._is_hf_initialized = True

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if self.base_model.backend == "te":
            from tokens.layers_te import checkpoint as gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


def init_parameters(model: TokenModel, seed: int) -> None:
    """Fill `model`, which may be sharded, with initial values that depend on `seed` and the names only.

    One full tensor at a time is made on the CPU, on every rank alike, so nothing is communicated.
    """
    tensors = named_tensors(model)
    fill(tensors, lambda name: model.initial_value(name, tensors[name].shape, seed))


class ForMaskedLM(TokenModel):
    """An encoder, the `base_model`, with what predicts masked tokens."""

    def predict(self, x_NE: Tensor) -> Tensor:
        """[N, E] to logits [N, V]."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seq_lens: list[int] | None = None,
        selected: Tensor | None = None,
        counts: Mapping[str, float] | None = None,
    ) -> MaskedLMOutput:
        """Inputs as the encoder takes them; `labels` like `input_ids`, -100 where nothing is to be predicted.

        Without labels: logits [N, V]. With labels: logits [W, V] and labels [W] of the `selected` tokens (None: read
        off the labels), which are all that have a label and a few that have not; and the cross-entropy of the former
        in nats, summed in FP32 and divided by `counts["labels"]` (None: by how many they are). No label at all gives a
        loss of 0 that still reaches every parameter, because ranks must agree on what they reduce. With
        `context_parallel` all three are of this rank's tokens alone. Raises ValueError for labels of another shape.
        """
        encoder, batch = self.base_model, (input_ids, attention_mask, cu_seqlens, max_seqlen, seq_lens)
        if labels is None:
            return MaskedLMOutput(logits=self.predict(encoder(*batch).last_hidden_state))
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels {list(labels.shape)} must have the shape of input_ids, {list(input_ids.shape)}.")
        if encoder.context_parallel and cu_seqlens is not None:  # a padded batch is refused by the encoder
            labels = encoder.context_parallel.part(labels)
        if selected is None:
            selected = torch.from_numpy(select_tokens(labels.cpu().numpy())).to(labels.device)
        labels_W = labels.flatten()[selected]
        logits_WV = self.predict(encoder(*batch, selected).last_hidden_state)
        num_labels = max(counts["labels"], 1) if counts else (labels_W != IGNORED).sum().clamp(min=1)
        at_least_fp32 = torch.promote_types(logits_WV.dtype, torch.float32)
        loss = F.cross_entropy(logits_WV.to(at_least_fp32), labels_W, reduction="sum") / num_labels
        return MaskedLMOutput(loss=loss, logits=logits_WV, labels=labels_W)


def training_flops(
    counts: Mapping[str, int], num_layers: int, width: int, mlp_weights: int, head_weights: int, backend: str | None
) -> float:
    """Floating-point operations of one training step: three times those of the forward pass.

    Forward: layers * [2 (4 E^2 + M) T + 4 E sum(length^2)] + 2 K L, with M weights in a layer's feed-forward part and
    K in the head, over T real `tokens`, L `labels` and the `token_pairs` within sequences. Recomputation and padding
    do not count. This is the usual count. With the layers' `backend` torch or cpp it is without what the last layer
    need not compute of tokens without a label: 2 (E^2 + M) (T - L), and their share of its attention.
    """
    num_tokens, num_labels = counts["tokens"], counts["labels"]
    products = 2 * (4 * width**2 + mlp_weights) * num_tokens
    attention = 4 * width * counts["token_pairs"]
    forward = num_layers * (products + attention) + 2 * head_weights * num_labels
    if backend in ("torch", "cpp") and num_tokens:
        num_others = num_tokens - num_labels
        forward -= 2 * (width**2 + mlp_weights) * num_others + attention * num_others / num_tokens
    return 3.0 * forward


# ---- what is measured: a recipe's metrics.py takes these over

UNIT = "tokens"  # of `Batch.counts`, by which throughput and progress go
LOSS_NAME = "Masked-LM loss, nats"
BETTER = {"loss": min, "perplexity": min, "accuracy": max}  # by which a best checkpoint can be kept


@torch.no_grad()
def batch_sums(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Of one batch, or of this rank's part of it: loss (nats), right guesses and labels, all summed over labels."""
    output = model(**batch.inputs, counts={"labels": 1})
    return {
        "loss": output.loss,
        "num_correct": (output.logits.argmax(-1) == output.labels).sum(),
        "num_labels": (output.labels >= 0).sum(),
    }


def summary(sums: dict[str, float]) -> dict:
    """`loss` (nats a masked residue), `perplexity`, `accuracy`, `num_labels`."""
    num_labels = max(sums["num_labels"], 1)
    loss = sums["loss"] / num_labels
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "accuracy": sums["num_correct"] / num_labels,
        "num_labels": int(num_labels),
    }
