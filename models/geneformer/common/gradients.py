# SPDX-License-Identifier: Apache-2.0
"""The gradients of one step: forward and backward passes over this rank's micro-batches."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from common.batch import Batch
from common.distributed import Distributed
from common.random_numbers import seed_micro_batch


class Strategy(NamedTuple):
    """Where the ways to distribute a model differ in the step.

    `forward` is a context for each forward pass, `accumulate` one for all but the last micro-batch of a step; losses
    are multiplied by `gradient_scale`, which undoes an average over ranks.
    """

    forward: Callable
    gradient_scale: float
    accumulate: Callable


def add_gradients(
    model: torch.nn.Module, batches: list[Batch], counts: dict[str, int], strategy: Strategy,
    distributed: Distributed, seed: int, **arguments,
) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """Add up the gradients of this rank's micro-batches; `counts` are those of the whole step, over all ranks.

    `arguments` are further ones of the model, the same in the whole step: coefficients of loss terms, say. Returns
    what each micro-batch contributes to the step's `loss`, and to the `parts` of it that the model names, as scalars
    on the device.
    """
    losses = []
    for batch in batches:
        seed_micro_batch(seed, batch.name, distributed.group_rank)
        inputs = batch.to(distributed.device).inputs
        with nullcontext() if batch is batches[-1] else strategy.accumulate():
            with strategy.forward():
                output = model(**inputs, counts=counts, **arguments)
            (output.loss * strategy.gradient_scale).backward()
        losses.append({"loss": output.loss.detach(), **{k: v.detach() for k, v in (output.parts or {}).items()}})
    return losses


def clip_grad_norm_(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Clip in place and return the norm of all gradients before clipping, as a plain scalar on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
