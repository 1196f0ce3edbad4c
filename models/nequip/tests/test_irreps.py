# SPDX-License-Identifier: Apache-2.0
"""Tables of the rotation group, by what defines them, and against e3nn where that is installed."""

import numpy as np
import pytest
import torch

from atoms.irreps import wigner_3j
from atoms.spherical_harmonics import spherical_harmonics


TRIPLES = [(a, b, c) for a in range(5) for b in range(5) for c in range(abs(a - b), min(a + b, 4) + 1)]


def directions(number=400):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(number, 3)))
    return x / x.norm(dim=1, keepdim=True)


def rotations(q: torch.Tensor, l_max: int) -> list[torch.Tensor]:
    """How each l turns under `q`, solved for from harmonics of turned directions."""
    x = directions()
    before, after = spherical_harmonics(x, l_max), spherical_harmonics(x @ q.T, l_max)
    parts = [slice(l**2, (l + 1) ** 2) for l in range(l_max + 1)]  # noqa: E741
    return [torch.linalg.lstsq(before[:, part], after[:, part]).solution.T for part in parts]


def test_harmonics():
    y = spherical_harmonics(directions(), 4)
    for l in range(5):  # noqa: E741
        part = y[:, l**2 : (l + 1) ** 2]
        torch.testing.assert_close(part.square().sum(1), torch.full((len(y),), 2.0 * l + 1, dtype=torch.float64))
    torch.testing.assert_close(y[:, 1:4], 3**0.5 * directions())


def test_coupling_is_invariant():
    q = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).normal(size=(3, 3))))[0]
    d = rotations(q * torch.linalg.det(q), 4)
    for a, b, c in TRIPLES:
        table = wigner_3j(a, b, c)
        assert float(table.norm()) == pytest.approx(1)
        turned = torch.einsum("ijk,il,jm,kn->lmn", table, d[a], d[b], d[c])
        torch.testing.assert_close(turned, table, rtol=0, atol=1e-9)


def test_signs_are_those_of_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    for triple in TRIPLES:
        torch.testing.assert_close(wigner_3j(*triple), o3.wigner_3j(*triple, dtype=torch.float64), rtol=0, atol=1e-12)
    x = directions()
    theirs = o3.spherical_harmonics(list(range(5)), x, normalize=True, normalization="component")
    torch.testing.assert_close(spherical_harmonics(x, 4), theirs, rtol=0, atol=1e-12)
