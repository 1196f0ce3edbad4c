# SPDX-License-Identifier: Apache-2.0
"""Products of features with geometry over edges that are sorted by their centre.

Features are dictionaries by irrep of [A, 2 l + 1, U]: channels lie last, so that everything is a product of matrices
or a long row. A: atoms, E: edges, U: channels, I and K: components before and after, P: paths.
"""

from collections.abc import Callable
from functools import cache
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atoms.irreps import Irrep, wigner_3j


Features = dict[Irrep, Tensor]


class Paths(NamedTuple):
    """All ways in which one irrep of an atom's neighbours couples with an edge's harmonics."""

    first: Irrep
    pairs: tuple[tuple[Irrep, Irrep], ...]  # of the edge, and what comes out


@cache
def path_of_component(pairs: tuple[tuple[Irrep, Irrep], ...], device: torch.device) -> Tensor:
    """To which path each component of the result belongs: [K]."""
    return torch.repeat_interleave(torch.tensor([out.dim for _, out in pairs])).to(device)


@cache
def coupling_table(paths: Paths, l_max: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What makes [I, K] matrices of an edge's harmonics, paths side by side: [(l_max + 1)^2, I K]."""
    rows = []
    for edge, out in paths.pairs:
        table = torch.zeros((l_max + 1) ** 2, paths.first.dim, out.dim, dtype=torch.float64, device="cpu")
        table[edge.l**2 : (edge.l + 1) ** 2] = sqrt(out.dim) * wigner_3j(paths.first.l, edge.l, out.l).transpose(0, 1)
        rows.append(table)
    return torch.cat(rows, 2).flatten(1).to(device, dtype)


def couplings(paths: Paths, harmonics: Tensor, l_max: int) -> Tensor:
    """By which components of neighbours turn into those of messages: [E, I, K]."""
    table = coupling_table(paths, l_max, harmonics.dtype, harmonics.device)
    return (harmonics @ table).view(harmonics.shape[0], paths.first.dim, table.shape[1] // paths.first.dim)


def sum_at_centre(values: Tensor, centre: Tensor, num_atoms: int) -> Tensor:
    """Sums over the edges of each atom: [E, ...] to [A, ...]."""
    zeros = torch.zeros((num_atoms, *values.shape[1:]), dtype=values.dtype, device=values.device)
    return zeros.index_add(0, centre, values)


def neighbor_product(x: Tensor, weights: Tensor, coupling: Tensor, path: Tensor, edges: Tensor, row: Tensor | None):
    """Sum over each atom's edges of weights [rows, P, U] times coupling [E, I, K] times the neighbour's x: [A, K, U].

    `row` says which weights are an edge's; None: there is a row for each.
    """
    neighbors = x.index_select(0, edges[1])
    weights = weights if row is None else weights.index_select(0, row)
    if x.shape[1] == 1:  # scalars are weighted before they are spread over components
        messages = coupling.transpose(1, 2) * (neighbors * weights).index_select(1, path)
    else:
        messages = (coupling.transpose(1, 2) @ neighbors) * weights.index_select(1, path)
    return sum_at_centre(messages, edges[0], x.shape[0])


def environment(weights: Tensor, harmonics: Tensor, path: Tensor, centre: Tensor, num_atoms: int) -> Tensor:
    """Sum over each atom's edges of weights [E, P, U] times harmonics [E, J]: [A, J, U]."""
    return sum_at_centre(weights.index_select(1, path) * harmonics.unsqueeze(2), centre, num_atoms)


def centre_product(x: Tensor, matrices: Tensor, centre: Tensor) -> Tensor:
    """Each edge's x [E, I, U] through the matrices of its centre [A, I, K, U]: [E, K, U]."""
    return (x.unsqueeze(2) * matrices.index_select(0, centre)).sum(1)


class Products(NamedTuple):
    """The three above, or others that do the same faster."""

    neighbor: Callable
    environment: Callable
    centre: Callable


TORCH = Products(neighbor_product, environment, centre_product)


class Linear(nn.Module):
    """Mixes the channels of each irrep that both sides have; weights of variance 1 are scaled in use."""

    def __init__(self, before: dict[Irrep, int], after: dict[Irrep, int], dtype: torch.dtype):
        super().__init__()
        self.irreps = [ir for ir in before if ir in after]
        self.weights = nn.ParameterDict(
            {ir.name: nn.Parameter(torch.empty(before[ir], after[ir], dtype=dtype)) for ir in self.irreps}
        )

    def forward(self, x: Features) -> Features:
        found = {}
        for ir in self.irreps:
            weight = self.weights[ir.name]
            found[ir] = x[ir] @ (weight / sqrt(weight.shape[0]))
        return found


class ElementLinear(nn.Module):
    """As `Linear`, with a matrix for each element, which is linear in the element's embedding [types, C]."""

    def __init__(self, before: dict[Irrep, int], embedding: int, after: dict[Irrep, int], dtype: torch.dtype):
        super().__init__()
        self.irreps = [ir for ir in before if ir in after]
        self.weights = nn.ParameterDict(
            {ir.name: nn.Parameter(torch.empty(before[ir], embedding, after[ir], dtype=dtype)) for ir in self.irreps}
        )

    def forward(self, x: Features, embedding: Tensor, types: Tensor) -> Features:
        found = {}
        num_types, width = embedding.shape
        for ir in self.irreps:
            weight = self.weights[ir.name]
            u, _, w = weight.shape
            weight = weight / sqrt(u * width)
            if num_types <= width:  # all elements' matrices, and of the results each atom's own
                matrices = torch.einsum("tc,ucw->utw", embedding, weight)
                all_types = (x[ir] @ matrices.flatten(1)).view(*x[ir].shape[:2], num_types, w)
                index = types.view(-1, 1, 1, 1).expand(-1, ir.dim, 1, w)
                found[ir] = all_types.gather(2, index).squeeze(2)
            else:
                pairs = x[ir].unsqueeze(3) * embedding[types].view(types.shape[0], 1, 1, width)
                found[ir] = pairs.flatten(2) @ weight.flatten(0, 1)
        return found
