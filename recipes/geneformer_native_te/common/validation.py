# SPDX-License-Identifier: Apache-2.0
"""Metrics over a fixed set: every row once, whatever the number of ranks."""

from collections.abc import Callable
from itertools import islice

import torch
from torch.nn.parallel import DistributedDataParallel

from common.batch import Batch
from common.distributed import Distributed
from common.epoch_plan import EpochPlan
from common.loader import read


MAXIMUM = "max_"


class Validator:
    """Runs a model over the rows of `plan` (None: never), at the end and every `every_n_steps`.

    `metrics` is the recipe's metrics.py, or an object: `batch_sums(model, batch)` gives what one batch adds up, as
    tensors on the device, of the same shapes in all batches, and `summary(sums)` what the sums of all rows mean, as
    numbers or arrays. Of what is named `max_...` the largest is taken, which is 0 at least. `evaluate.py` also calls
    `report(distributed, summary, source, folder)`, where there is one, for tables and plots.
    """

    def __init__(
        self,
        distributed: Distributed,
        plan: EpochPlan | None,
        collate: Callable[[dict], Batch] | None,
        metrics,
        every_n_steps: int | None,
    ):
        self.distributed, self.plan, self.collate = distributed, plan, collate
        self.metrics, self.every_n_steps = metrics, every_n_steps
        self.facts: list[str] = []  # what is read, and from where

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to validate after this step."""
        due = step == last_step or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        return self.plan is not None and due

    def report(self, model: torch.nn.Module, forward_context, ema, logger, step: int, due: bool) -> None:
        """Validate the weights, or their running average, and log it, if it is due."""
        if due and self.plan is not None:
            with logger.paused(), ema.applied(model):
                logger.log_validation(step, self.run(model, forward_context))

    def run(self, model: torch.nn.Module, forward_context) -> dict:
        """The summary, the same on all ranks."""
        rank, num_ranks = self.distributed.data_rank, self.distributed.num_data_ranks
        model.eval()
        # Not through DDP: after a forward pass with gradients, as forces need, it would average the next step's first
        # micro-batch by itself, and so round otherwise.
        asked = model.module if isinstance(model, DistributedDataParallel) else model
        totals: dict[str, torch.Tensor] = {}
        micro_batches = self.plan.epoch(0)
        while group := list(islice(micro_batches, num_ranks)):
            # Sharded models need every rank in every forward pass: one that has no rows left repeats the last.
            batch = self.collate(read(self.plan.source, group[min(rank, len(group) - 1)]))
            with forward_context():
                sums = self.metrics.batch_sums(asked, batch.to(self.distributed.device))
            for name, value in sums.items():
                value = value.detach().double()
                value = value if rank < len(group) else torch.zeros_like(value)
                so_far = totals.get(name, torch.zeros_like(value))
                totals[name] = torch.maximum(so_far, value) if name.startswith(MAXIMUM) else so_far + value
        model.train()
        values = torch.cat([value.reshape(-1) for value in totals.values()]).cpu()  # the one wait for the device
        sums = torch.tensor(self.distributed.sum(*values.numpy()), dtype=torch.float64)
        if any(name.startswith(MAXIMUM) for name in totals):
            largest = torch.stack(self.distributed.gather(values)).amax(0)
        found, at = {}, 0
        for name, value in totals.items():
            of_all = (largest if name.startswith(MAXIMUM) else sums)[at : at + value.numel()].numpy()
            found[name] = of_all.reshape(value.shape) if value.dim() else float(of_all[0])
            at += value.numel()
        return self.metrics.summary(found)
