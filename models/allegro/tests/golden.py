# SPDX-License-Identifier: Apache-2.0
"""What a potential says of two small structures, in numbers that a file can hold: energies, forces, stress, gradients.

The same structures and weights go through our models and, by make_golden.py, through the packages they follow.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


ELEMENTS = ["H", "C", "O"]
COMMON = {
    "elements": ELEMENTS, "cutoff": 4.5, "num_neighbors": 17.0, "energy_scales": [1.1, 0.7, 2.0],
    "energy_shifts": [-1.0, 2.0, 3.0], "dtype": "float64",
}  # fmt: skip


def neighbors(positions: np.ndarray, cell: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """All edges by brute force, sorted by centre: [2, E], and whole cells [E, 3]. A zero cell has no images."""
    reach = 2 if cell.any() else 0
    shifts = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    vectors = positions[None, :, None] - positions[:, None, None] + shifts @ cell
    distance = np.linalg.norm(vectors, axis=-1)
    centre, neighbor, image = np.nonzero((distance < cutoff) & (distance > 1e-9))
    return np.stack([centre, neighbor]), shifts[image].astype(float)


def batch(structures: list[tuple[np.ndarray, np.ndarray, np.ndarray]], cutoff: float) -> dict[str, Tensor]:
    """`structures` are positions, cell and types; what a model takes, without labels."""
    edges, shifts, starts = [], [], np.cumsum([0, *(len(types) for _, _, types in structures)])
    for start, (positions, cell, _) in zip(starts, structures, strict=False):
        found, images = neighbors(positions, cell, cutoff)
        edges.append(found + start)
        shifts.append(images)
    arrays = {
        "positions": np.concatenate([s[0] for s in structures]), "types": np.concatenate([s[2] for s in structures]),
        "cell": np.stack([s[1] for s in structures]), "edges": np.concatenate(edges, 1),
        "shifts": np.concatenate(shifts),
        "structure": np.repeat(np.arange(len(structures)), np.diff(starts)),
    }  # fmt: skip
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def two_structures() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A skewed cell of eight atoms at least 1 A apart, and a molecule of five."""
    random, found = np.random.default_rng(3), []
    for number, cell in ((8, np.diag([5.5, 5.8, 6.1]) + random.normal(size=(3, 3)) * 0.3), (5, np.zeros((3, 3)))):
        positions: list[np.ndarray] = []
        while len(positions) < number:
            new = random.random(3) @ (cell if cell.any() else np.eye(3) * 3.5)
            trial = np.array([*positions, new])
            edges, _ = neighbors(trial, cell, 1.0)
            if not edges.size:
                positions.append(new)
        found.append((np.array(positions), cell, random.integers(0, 3, number)))
    return found


def labelled(dtype: torch.dtype = torch.float64, cutoff: float = COMMON["cutoff"]) -> dict[str, Tensor]:
    """The two structures with labels that are waves; the molecule has no stress."""
    inputs = batch(two_structures(), cutoff)
    n = inputs["positions"].shape[0]
    inputs["energy"] = torch.tensor([3.0, -2.0], dtype=torch.float64)
    inputs["forces"] = torch.sin(torch.arange(3.0 * n, dtype=torch.float64)).view(n, 3)
    inputs["stress"] = torch.full((2, 3, 3), torch.nan, dtype=torch.float64)
    inputs["stress"][0] = 0.1 * torch.cos(torch.arange(9.0, dtype=torch.float64)).view(3, 3)
    return inputs


def wave(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Numbers of variance 1 that are the same everywhere, by a tensor's name (splitmix64: whole numbers alone)."""
    start = sum((i + 1) * ord(letter) for i, letter in enumerate(name))
    z = (np.arange(1, torch.Size(shape).numel() + 1, dtype=np.uint64) + np.uint64(start << 32)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return torch.from_numpy((2 * uniform - 1) * 3**0.5).view(shape).to(dtype)


def set_waves(model: torch.nn.Module) -> None:
    """Give each parameter its wave; what training adds to fixed numbers, a small one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = name.rpartition(".")[2] in ("added_scales", "added_shifts", "moved")
            parameter.copy_(wave(name, parameter.shape, parameter.dtype) * (0.1 if small else 1.0))


def digest(energies: Tensor, forces: Tensor, stress: Tensor, gradients: Mapping[str, Tensor]) -> dict:
    """For JSON; of each gradient its norm and its product with a wave."""
    return {
        "energies": energies.detach().double().flatten().tolist(), "forces": forces.detach().double().tolist(),
        "stress": stress.detach().double().tolist(),
        "gradients": {
            name: [float(g.double().norm()), float((g.double() * wave(name + "!", g.shape, torch.float64)).sum())]
            for name, g in gradients.items()
        },
    }  # fmt: skip


def worst(found: dict, expected: dict) -> dict[str, float]:
    """The largest difference of each kind, over the largest number of that kind (of a gradient, its norm)."""
    result = {}
    for kind in ("energies", "forces", "stress"):
        a, b = np.array(found[kind]), np.array(expected[kind])
        result[kind] = float(np.abs(a - b).max() / np.abs(b).max())
    assert found["gradients"].keys() == expected["gradients"].keys()
    result["gradients"] = max(
        float(np.abs(np.array(values) - expected["gradients"][name]).max() / max(expected["gradients"][name][0], 1e-3))
        for name, values in found["gradients"].items()
    )
    return result


WEIGHTS = {"energy_weight": 1.0, "forces_weight": 2.0, "stress_weight": 3.0}


def our_digest(model: torch.nn.Module) -> dict:
    """Of a model of ours, with a squared loss of all three labels, the weights as above."""
    from atoms.losses import loss_terms

    model.losses = loss_terms(model.config.elements, **WEIGHTS)
    inputs = labelled()
    counts = {"energies": 2, "force_components": inputs["forces"].numel(), "stress_components": 9}
    output = model.train()(**inputs, counts=counts)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.loss, parameters)
    return digest(output.energies, output.forces, output.stress, dict(zip(names, gradients, strict=True)))
