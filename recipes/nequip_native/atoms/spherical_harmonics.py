# SPDX-License-Identifier: Apache-2.0
"""Real spherical harmonics of directions, in the basis of irreps.py; |Y_l|^2 = 2 l + 1 (e3nn: component)."""

from functools import cache
from math import sqrt

import torch
from torch import Tensor

from atoms.irreps import wigner_3j


@cache
def step_up(l: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # noqa: E741
    """What makes Y_l of the products of Y_{l-1} and Y_1: [(2 l - 1) 3, 2 l + 1]."""
    table = wigner_3j(l - 1, 1, l)
    # Along y all is in the middle component, which is the root of 2 l + 1 there.
    factor = sqrt((2 * l + 1) / (3 * (2 * l - 1))) / table[l - 1, 1, l]
    return (factor * table).flatten(0, 1).to(device, dtype)


def spherical_harmonics(directions: Tensor, l_max: int) -> Tensor:
    """Y_0 .. Y_l_max of unit vectors [E, 3], side by side: [E, (l_max + 1)^2]."""
    found = [torch.ones_like(directions[:, :1])]
    if l_max:
        vector = sqrt(3) * directions
        found.append(vector)
    for l in range(2, l_max + 1):  # noqa: E741
        products = (found[-1].unsqueeze(2) * vector.unsqueeze(1)).flatten(1)
        found.append(products @ step_up(l, directions.dtype, directions.device))
    return torch.cat(found, 1)
