# SPDX-License-Identifier: Apache-2.0
"""Structures laid end to end; every two atoms of a structure are neighbours."""

import numpy as np
import torch

from common.batch import Batch


def collate(sample: dict) -> Batch:
    """`positions` and `forces` [A, 3] and `energy` [S] in float64, `edges` [2, E], `structure` [A]."""
    positions = [np.array(item["positions"]).reshape(-1, 3) for item in sample["items"]]
    starts = np.cumsum([0, *map(len, positions)])
    edges = [start + np.argwhere(~np.eye(len(p), dtype=bool)).T for start, p in zip(starts, positions, strict=False)]
    inputs = {
        "positions": np.concatenate(positions),
        "forces": np.concatenate([np.array(item["forces"]).reshape(-1, 3) for item in sample["items"]]),
        "energy": np.array([item["energy"] for item in sample["items"]]),
        "edges": np.concatenate(edges, axis=1),
        "structure": np.repeat(np.arange(len(positions)), np.diff(starts)),
    }
    counts = {"structures": len(positions), "atoms": int(starts[-1]), "force_components": 3 * int(starts[-1])}
    return Batch({k: torch.from_numpy(v) for k, v in inputs.items()}, sample["name"], counts, int(starts[-1]))
