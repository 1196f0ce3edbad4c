# SPDX-License-Identifier: Apache-2.0
"""What a run of masked-language modelling counts and reports."""

import math

import torch

from common.batch import Batch


UNIT = "tokens"  # of `Batch.counts`, by which throughput and progress go
LOSS_NAME = "Masked-LM loss, nats"


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
