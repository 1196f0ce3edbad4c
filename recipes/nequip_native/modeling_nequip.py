# SPDX-License-Identifier: Apache-2.0
"""NequIP (Batzner et al. 2022): messages of equivariant features between atoms, gated by scalars.

A: atoms, E: edges, U: channels. Its numbers are those of the package `nequip` 0.19 with the same weights.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoms.irreps import SCALAR, Irrep, harmonics
from atoms.potential import Graph, Potential, PotentialConfig
from atoms.radial import Bessel, ScalarMLP
from atoms.spherical_harmonics import spherical_harmonics
from atoms.tensor_product import (
    ElementLinear,
    Features,
    Linear,
    Paths,
    couplings,
    path_of_component,
)


# S to XL are those of the published potentials: no parity, 32 numbers for an element, radial networks of 128.
SIZES = {
    "nequip_XS": {"num_layers": 2, "num_features": [64, 32], "num_element_features": 16, "radial_width": 64},
    "nequip_S": {"num_layers": 2, "num_features": [128, 64]},
    "nequip_M": {"num_layers": 4, "num_features": [128, 64, 32]},
    "nequip_L": {"num_layers": 6, "num_features": [128, 64, 32, 32]},
    "nequip_XL": {"num_layers": 6, "num_features": [320, 96, 64, 32, 32]},
}
# What keeps the second moment of a normal variable, as e3nn has them, which drew a million of them.
SILU_SCALE, TANH_SCALE = 1.6791767923989418, 1.5937334472592695


@dataclass(kw_only=True)
class NequIPConfig(PotentialConfig):
    """`num_features` are channels for l = 0, 1, ...; with `parity` each l comes even and odd."""

    model_type = "nequip"

    num_layers: int = 4
    num_features: list[int] = field(default_factory=lambda: [32, 32])
    parity: bool = False
    num_element_features: int = 32
    radial_depth: int = 1
    radial_width: int = 128
    num_bessels: int = 8
    train_bessels: bool = False
    cutoff_power: int = 6
    readout_depth: int = 0
    readout_width: int | None = None

    @property
    def l_max(self) -> int:
        return len(self.num_features) - 1


def layer_irreps(config: NequIPConfig, pruned: bool = True) -> list[dict[Irrep, int]]:
    """Irreps and channels before each layer and after the last.

    The package also keeps irreps from which no scalar can come any more; here they are left out (`pruned`).
    """
    edge = harmonics(config.l_max)
    hidden = {
        Irrep(l, p): number
        for l, number in enumerate(config.num_features)  # noqa: E741
        for p in ((1, -1) if config.parity else ((-1) ** l,))
    }
    found = [{SCALAR: config.num_element_features}]
    for i in range(config.num_layers):
        wanted = hidden if i < config.num_layers - 1 else {SCALAR: config.num_features[0]}
        reached = {out for ir in found[-1] for e in edge for out in ir.times(e)}
        found.append({ir: number for ir, number in wanted.items() if ir in reached})
    for i in reversed(range(config.num_layers if pruned else 0)):
        used = {ir for ir in found[i] for e in edge for out in ir.times(e) if out in found[i + 1]}
        found[i] = {ir: number for ir, number in found[i].items() if ir in used}
    return found


def activation(x: Tensor, irrep: Irrep) -> Tensor:
    """Of scalars: one that keeps their parity."""
    return SILU_SCALE * F.silu(x) if irrep.p == 1 else TANH_SCALE * torch.tanh(x)


class Convolution(nn.Module):
    """One layer: mix channels, sum messages over neighbours, mix again, add the atom's own, gate."""

    def __init__(self, config: NequIPConfig, before: dict[Irrep, int], after: dict[Irrep, int], first: bool):
        super().__init__()
        dtype, edge = config.torch_dtype, harmonics(config.l_max)
        self.after = after
        self.gated = {ir: number for ir, number in self.after.items() if ir.l}
        # One scalar more for each channel to be gated.
        mixed = self.after | {SCALAR: self.after[SCALAR] + sum(self.gated.values())}
        self.paths, self.sizes, summed = [], [], {}
        for ir, number in before.items():
            pairs = tuple((e, out) for e in edge for out in ir.times(e) if out in mixed)
            for _, out in pairs:
                summed[out] = summed.get(out, 0) + number
            self.paths.append(Paths(ir, pairs))
            self.sizes.append(number * len(pairs))
        self.linear_1 = Linear(before, before, dtype)
        widths = [config.num_bessels, *config.radial_depth * [config.radial_width], sum(self.sizes)]
        self.radial_mlp = ScalarMLP(widths, dtype)
        self.linear_2 = Linear(summed, mixed, dtype)
        # Not in the first layer: an atom without neighbours must come out as nothing.
        self.own = None if first else ElementLinear(before, config.num_element_features, mixed, dtype)

    def forward(self, x: Features, norm, elements: Tensor, graph: Graph, radial: Tensor, coupled: dict) -> Features:
        y, summed = self.linear_1(x), {}
        for paths, weights in zip(self.paths, self.radial_mlp(radial).split(self.sizes, 1), strict=True):
            weights = weights.view(weights.shape[0], len(paths.pairs), y[paths.first].shape[2])
            path = path_of_component(paths.pairs, weights.device)
            sent = y[paths.first] * norm
            product = graph.products.neighbor(sent, weights, coupled[paths], path, graph.edges, graph.row)
            for (_, out), part in zip(paths.pairs, product.split([o.dim for _, o in paths.pairs], 1), strict=True):
                summed.setdefault(out, []).append(part)
        y = self.linear_2({ir: torch.cat(parts, 2) for ir, parts in summed.items()})
        if self.own is not None:
            for ir, own in self.own(x, elements, graph.types).items():
                y[ir] = y[ir] + own
        scalars, *gates = y[SCALAR].split([self.after[SCALAR], *self.gated.values()], 2)
        y[SCALAR] = scalars
        found = {ir: activation(y[ir], ir) for ir in self.after if ir.l == 0}
        return found | {ir: y[ir] * activation(g, SCALAR) for ir, g in zip(self.gated, gates, strict=True)}


class NequIP(Potential):
    """Energies of atoms; see `Potential` for the rest."""

    def __init__(self, config: NequIPConfig):
        super().__init__(config)
        dtype = config.torch_dtype
        self.elements = nn.Parameter(torch.empty(len(config.elements), config.num_element_features, dtype=dtype))
        self.bessel = Bessel(config.num_bessels, config.cutoff_power, config.train_bessels, dtype)
        irreps = layer_irreps(config)
        self.layers = nn.ModuleList(
            Convolution(config, before, after, first=i == 0) for i, (before, after) in enumerate(pairwise(irreps))
        )
        width = config.readout_width or config.num_features[0]
        self.readout = ScalarMLP([config.num_features[0], *config.readout_depth * [width], 1], dtype)

    def network(self, graph: Graph) -> Tensor:
        config = self.config
        radial = self.bessel(graph.x) * (2 * pi / config.cutoff**2)  # the published models' scale
        edge = spherical_harmonics(graph.directions, config.l_max).to(config.torch_dtype)
        # Layers with the same paths share their matrices.
        coupled = {p: couplings(p, edge, config.l_max) for p in {p for layer in self.layers for p in layer.paths}}
        norm = self.neighbor_norm(graph.types)
        features = {SCALAR: self.elements[graph.types].unsqueeze(1)}
        for layer in self.layers:
            features = layer(features, norm, self.elements, graph, radial, coupled)
        return self.readout(features[SCALAR].squeeze(1)).squeeze(1)
