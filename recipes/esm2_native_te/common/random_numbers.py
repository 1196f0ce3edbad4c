# SPDX-License-Identifier: Apache-2.0
"""Random numbers inside a model (dropout, noise) belong to the seed and the micro-batch, not to a rank's stream."""

import hashlib

import torch


def seed_from(*key: int | str) -> int:
    """A seed of 64 bits for a key; neighbouring keys give unrelated ones."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, key)).encode()).digest()[:8], "little")


def seed_micro_batch(seed: int, name: tuple, part: int = 0) -> None:
    """Let all that the model draws from here on, on the CPU and on GPUs, follow from the run's seed and this name.

    `part` tells the GPUs apart that share the micro-batch; the CPU's stream is the same on all of these ranks. Called
    before each forward pass, so a micro-batch draws the same on any rank, after a resume, and when its step is
    computed again.
    """
    torch.manual_seed(seed_from(seed, *name, 0))
    if part:
        torch.cuda.manual_seed_all(seed_from(seed, *name, part))
