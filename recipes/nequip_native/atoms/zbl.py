# SPDX-License-Identifier: Apache-2.0
"""The universal repulsion of two nuclei (Ziegler, Biersack, Littmark 1985), with the constants of LAMMPS."""

import torch
from torch import Tensor

from atoms.radial import polynomial_cutoff


COULOMB = {"metal": 14.399645, "real": 332.06371}  # e^2 / (4 pi eps_0): eV A, and kcal/mol A


def zbl_energy(distance: Tensor, x: Tensor, z_centre: Tensor, z_neighbor: Tensor, units: str) -> Tensor:
    """Energy of each directed edge [E], half of the pair's; `distance` in A, `x` the same over the cutoff."""
    reduced = (z_centre.pow(0.23) + z_neighbor.pow(0.23)) * distance / 0.46850
    terms = ((0.02817, 0.20162), (0.28022, 0.40290), (0.50986, 0.94229), (0.18175, 3.19980))
    screening = sum(share * torch.exp(-rate * reduced) for share, rate in terms)
    return 0.5 * COULOMB[units] * z_centre * z_neighbor / distance * screening * polynomial_cutoff(x)
