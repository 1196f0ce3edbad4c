# SPDX-License-Identifier: Apache-2.0
"""Functions of the distance, and networks of scalars. `x` is a distance over its cutoff, [E] in float64."""

from itertools import pairwise
from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def polynomial_cutoff(x: Tensor, p: int = 6) -> Tensor:
    """1 at 0; at 1 it is 0 with two derivatives, and stays so (Gasteiger et al. 2020, eq. 8)."""
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    power = x**p
    return (1 - a * power + b * power * x - c * power * x * x) * (x < 1)


class Bessel(nn.Module):
    """sin(n pi x) / (pi x) times the cutoff, n = 1 .. `number`: [E, number] in `dtype`.

    If `trainable`, the n move; what they moved by is a parameter, so that all parameters have one type.
    """

    def __init__(self, number: int, p: int, trainable: bool, dtype: torch.dtype):
        super().__init__()
        self.number, self.p, self.dtype = number, p, dtype
        self.moved = nn.Parameter(torch.zeros(number, dtype=dtype)) if trainable else None

    def forward(self, x: Tensor) -> Tensor:
        n = torch.arange(1.0, self.number + 1, dtype=x.dtype, device=x.device)
        if self.moved is not None:
            n = n + self.moved.to(x.dtype)
        basis = torch.sinc(x.unsqueeze(1) * n) * n
        return basis.to(self.dtype) * polynomial_cutoff(x, self.p).to(self.dtype).unsqueeze(1)


class Spline(nn.Module):
    """For each ordered pair of elements `num_channels` splines of x that end at the cutoff: [E, num_channels]."""

    def __init__(self, num_pairs: int, num_channels: int, number: int, span: int, dtype: torch.dtype):
        super().__init__()
        self.number, self.span, self.dtype = number, span, dtype
        self.weight = nn.Parameter(torch.empty(num_pairs, num_channels, number, dtype=dtype))
        self.bound = sqrt(3 / span)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        start = torch.arange(-self.span, self.number - self.span, dtype=x.dtype, device=x.device) / self.number
        width = (self.span + 1) / self.number
        phase = 2 * pi / width * (torch.clamp(x.unsqueeze(1), min=start, max=start + width) - start)
        basis = 0.25 * (1 - torch.cos(phase)).square()
        return torch.bmm(self.weight[pairs], basis.to(self.dtype).unsqueeze(2)).squeeze(2)


class ScalarMLP(nn.Module):
    """Linear layers without bias and SiLU between them; weights of variance 1 are scaled in use."""

    def __init__(self, sizes: list[int], dtype: torch.dtype):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(n, m, dtype=dtype)) for n, m in pairwise(sizes))
        # The root of 2 stands for what the SiLU before the layer takes away.
        self.scales = [(sqrt(2) if i else 1.0) / sqrt(n) for i, n in enumerate(sizes[:-1])]

    def forward(self, x: Tensor) -> Tensor:
        for i, (weight, scale) in enumerate(zip(self.weights, self.scales, strict=True)):
            x = (F.silu(x) if i else x) @ (weight * scale)
        return x
