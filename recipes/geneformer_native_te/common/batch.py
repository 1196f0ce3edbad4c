# SPDX-License-Identifier: Apache-2.0
"""A micro-batch: what the model takes, and what the loop counts."""

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass
class Batch:
    """One micro-batch, as a collator makes it.

    `inputs` are the model's keyword arguments. `name` tells it from all others of a run: (epoch, window, number).
    `counts` are what losses are divided by and what the log adds up, e.g. `labels` and `tokens`, or `structures`,
    `atoms` and `force_components`; the first is what the loss of a micro-batch is reported by. `num_slots` is how many
    of the log's unit it takes up, padding included.
    """

    inputs: dict
    name: tuple
    counts: dict[str, int]
    num_slots: int

    # From a worker as numpy, through a pipe: each tensor would open a file in shared memory and a connection.
    def __getstate__(self) -> dict:
        arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return self.__dict__ | {"inputs": arrays}

    def __setstate__(self, state: dict) -> None:
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state["inputs"].items()}
        self.__dict__ = state | {"inputs": tensors}

    def to(self, device: torch.device) -> "Batch":
        moved = {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in self.inputs.items()
        }
        return replace(self, inputs=moved)

    def pin_memory(self) -> "Batch":
        pinned = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=pinned)

    def uncounted(self) -> "Batch":
        """The same with all counts 0: for a rank that shares the micro-batch with one that counts it."""
        return replace(self, counts=dict.fromkeys(self.counts, 0), num_slots=0)
