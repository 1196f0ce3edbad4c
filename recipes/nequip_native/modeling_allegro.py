# SPDX-License-Identifier: Apache-2.0
"""Allegro (Musaelian et al. 2023): features of directed edges that never leave the neighbourhood of their centre.

A: atoms, E: edges, U: channels. Its numbers are those of the package `nequip-allegro` 0.8 with the same weights.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from atoms.irreps import SCALAR, Irrep, harmonics, wigner_3j
from atoms.potential import Graph, Potential, PotentialConfig
from atoms.radial import Bessel, ScalarMLP, Spline
from atoms.spherical_harmonics import spherical_harmonics
from atoms.tensor_product import Products, sum_at_centre


# The package has no sizes of its own; these are steps of about four in cost.
SIZES = {
    "allegro_S": {"l_max": 1, "num_layers": 2, "num_scalars": 64, "num_tensors": 32, "mlp_width": 64},
    "allegro_M": {"l_max": 2, "num_layers": 2, "num_scalars": 64, "num_tensors": 64, "mlp_width": 128},
    "allegro_L": {"l_max": 3, "num_layers": 2, "num_scalars": 128, "num_tensors": 64, "mlp_width": 256},
    "allegro_XL": {"l_max": 3, "num_layers": 3, "num_scalars": 128, "num_tensors": 128, "mlp_width": 512},
}


@dataclass(kw_only=True)
class AllegroConfig(PotentialConfig):
    """`num_scalars` and `num_tensors` are channels of the two tracks of each edge."""

    model_type = "allegro"

    l_max: int = 2
    num_layers: int = 2
    parity: bool = True
    num_scalars: int = 64
    num_tensors: int = 16
    radial: Literal["bessel", "spline"] = "bessel"
    radial_features: int | None = None
    num_bessels: int = 8
    train_bessels: bool = False
    cutoff_power: int = 6
    num_splines: int = 16
    spline_span: int = 12
    embedding_depth: int = 1
    embedding_width: int = 64
    mlp_depth: int = 1
    mlp_width: int = 64
    readout_depth: int = 1
    readout_width: int = 32
    coupled_paths: bool = True


def tensor_tracks(config: AllegroConfig) -> list[list[Irrep]]:
    """The irreps before each layer and after the last, without those from which no scalar can be made."""
    edge = harmonics(config.l_max)
    allowed = [Irrep(l, p) for l in range(config.l_max + 1) for p in (1, -1)] if config.parity else edge  # noqa: E741
    tracks = [edge]
    for i in range(config.num_layers):
        kept = [SCALAR] if i == config.num_layers - 1 else allowed
        tracks.append([ir for ir in kept if any(ir in a.times(e) for a in tracks[-1] for e in edge)])
    for i in reversed(range(config.num_layers)):
        tracks[i] = [ir for ir in tracks[i] if any(out in tracks[i + 1] for e in edge for out in ir.times(e))]
    return tracks


def l_of_component(irreps: list[Irrep]) -> list[int]:
    """The place of each component's irrep in the list."""
    return [i for i, ir in enumerate(irreps) for _ in range(ir.dim)]


class TensorProduct(nn.Module):
    """Each edge's tensors with the sum of its centre's; a weight for each path, and channel if `coupled`."""

    def __init__(
        self, before: list[Irrep], edge: list[Irrep], after: list[Irrep], channels: int, coupled: bool, dtype
    ):
        super().__init__()
        self.before, self.edge, self.after = before, edge, after
        self.paths = [(o, a, e) for o in after for a in before for e in edge if o in a.times(e)]
        self.weight = nn.Parameter(torch.empty(channels if coupled else 1, len(self.paths), dtype=dtype))
        self.bound = sqrt(3)

    def table(self, like: Tensor) -> Tensor:
        """Paths, and components before, at the centre, and after: [P, I, J, K]."""
        key = (like.dtype, like.device)
        if getattr(self, "_table", (None, None))[0] != key:
            starts = [
                {ir: sum(other.dim for other in irreps[:i]) for i, ir in enumerate(irreps)}
                for irreps in (self.before, self.edge, self.after)
            ]
            dims = [sum(ir.dim for ir in irreps) for irreps in (self.before, self.edge, self.after)]
            table = torch.zeros(len(self.paths), *dims, dtype=torch.float64, device="cpu")
            for p, (out, a, e) in enumerate(self.paths):
                i, j, k = starts[0][a], starts[1][e], starts[2][out]
                block = sqrt(out.dim) * wigner_3j(a.l, e.l, out.l)
                table[p, i : i + a.dim, j : j + e.dim, k : k + out.dim] = block
            self._table = (key, table.to(like.device, like.dtype))
        return self._table[1]

    def forward(self, x: Tensor, environment: Tensor, centre: Tensor, products: Products) -> Tensor:
        """`x` [E, I, U], `environment` [A, J, U]: [E, K, U]. The sum over paths and J is an atom's, not an edge's."""
        table = self.table(x)
        num_paths, i, j, k = table.shape
        mixed = self.weight @ table.transpose(2, 3).reshape(num_paths, -1)  # [U or 1, I K J]
        mixed = mixed.view(-1, i * k, j)
        if len(mixed) == 1:
            matrices = (mixed[0] @ environment).view(-1, i, k, environment.shape[2])
        else:
            matrices = torch.bmm(mixed, environment.permute(2, 1, 0)).permute(2, 1, 0)
            matrices = matrices.reshape(-1, i, k, environment.shape[2])
        return products.centre(x, matrices, centre)


class Allegro(Potential):
    """Energies of atoms, as sums over their edges; see `Potential` for the rest."""

    def __init__(self, config: AllegroConfig):
        super().__init__(config)
        dtype, number = config.torch_dtype, len(config.elements)
        s, u, embedded = config.num_scalars, config.num_tensors, config.radial_features or config.num_scalars
        self.edge, tracks = harmonics(config.l_max), tensor_tracks(config)
        weights = u * len(self.edge)
        if config.radial == "bessel":
            self.centre_elements = nn.Parameter(torch.empty(number, embedded // 2, dtype=dtype))
            self.neighbor_elements = nn.Parameter(torch.empty(number, embedded // 2, dtype=dtype))
            self.bessel = Bessel(config.num_bessels, config.cutoff_power, config.train_bessels, dtype)
            self.bessel_mlp = ScalarMLP([config.num_bessels, embedded], dtype)
        else:
            self.spline = Spline(number * number, embedded, config.num_splines, config.spline_span, dtype)
        widths = config.embedding_depth * [config.embedding_width]
        self.embedding_mlp = ScalarMLP([embedded, *widths, s], dtype)
        self.tensor_mlp = ScalarMLP([s, weights], dtype)
        self.environment_mlp = ScalarMLP([s, s + weights], dtype)
        self.products = nn.ModuleList(
            TensorProduct(before, self.edge, after, u, config.coupled_paths, dtype)
            for before, after in pairwise(tracks)
        )
        self.latent_mlps = nn.ModuleList()
        for i in range(config.num_layers):
            widths = [s * (i + 1) + u, *config.mlp_depth * [config.mlp_width]]
            self.latent_mlps.append(ScalarMLP([*widths, s + (weights if i < config.num_layers - 1 else 0)], dtype))
        widths = config.readout_depth * [config.readout_width]
        self.readout = ScalarMLP([s * (config.num_layers + 1), *widths, 1], dtype)

    def embed(self, graph: Graph) -> Tensor:
        """Distance and both elements: [E, features]."""
        centre, neighbor = graph.types[graph.edges[0]], graph.types[graph.edges[1]]
        if self.config.radial == "spline":
            x = graph.x if graph.row is None else graph.x.index_select(0, graph.row)
            return self.spline(x, centre * len(self.config.elements) + neighbor)
        elements = torch.cat([self.centre_elements[centre], self.neighbor_elements[neighbor]], 1)
        radial = self.bessel_mlp(self.bessel(graph.x))
        return elements * (radial if graph.row is None else radial.index_select(0, graph.row))

    def network(self, graph: Graph) -> Tensor:
        config, centre, num_atoms = self.config, graph.edges[0], graph.types.shape[0]
        s, norm = config.num_scalars, self.neighbor_norm(graph.types)
        harmonic = spherical_harmonics(graph.directions, config.l_max).to(config.torch_dtype)
        component = torch.tensor(l_of_component(self.edge), device=harmonic.device)

        def by_l(weights: Tensor) -> Tensor:
            return weights.view(-1, len(self.edge), config.num_tensors)

        embedded = self.embedding_mlp(self.embed(graph))
        tensors = by_l(self.tensor_mlp(embedded)).index_select(1, component) * harmonic.unsqueeze(2)
        scalars, weights = self.environment_mlp(embedded).split([s, len(self.edge) * config.num_tensors], 1)
        scalars = [scalars]
        kept = torch.tensor([d for d, i in enumerate(l_of_component(self.edge)) if self.edge[i] in
                             self.products[0].before], device=harmonic.device)  # fmt: skip
        tensors = tensors if len(kept) == harmonic.shape[1] else tensors.index_select(1, kept)
        for product, mlp in zip(self.products, self.latent_mlps, strict=True):
            summed = graph.products.environment(by_l(weights), harmonic, component, centre, num_atoms)
            tensors = product(tensors, summed * norm, centre, graph.products)
            latents = mlp(torch.cat([*scalars, tensors[:, 0]], 1))
            scalars.append(latents[:, :s])
            weights = latents[:, s:]
        energies = self.readout(torch.cat(scalars, 1))
        atoms = sum_at_centre(energies, centre, num_atoms) / sqrt(2)
        return (atoms * (norm.squeeze(2) if isinstance(norm, Tensor) else norm)).squeeze(1)
