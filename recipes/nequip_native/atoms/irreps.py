# SPDX-License-Identifier: Apache-2.0
"""Irreducible representations of O(3), and the numbers that couple two of them to a third.

The real basis is e3nn's: components m = -l..l about the y axis, so that l = 1 is (x, y, z).
"""

from functools import cache
from math import factorial, sqrt
from typing import NamedTuple

import torch


class Irrep(NamedTuple):
    """Degree `l`, and parity `p`: 1 is even, -1 is odd."""

    l: int  # noqa: E741 (the field's name)
    p: int

    @property
    def name(self) -> str:
        """As in e3nn: 1o is a vector, 1e a pseudovector."""
        return f"{self.l}{'e' if self.p == 1 else 'o'}"

    @property
    def dim(self) -> int:
        return 2 * self.l + 1

    def times(self, other: "Irrep") -> "list[Irrep]":
        """What the product of the two falls into."""
        return [Irrep(l, self.p * other.p) for l in range(abs(self.l - other.l), self.l + other.l + 1)]  # noqa: E741


SCALAR = Irrep(0, 1)


def harmonics(l_max: int) -> list[Irrep]:
    """Those of spherical harmonics: 0e, 1o, 2e, ..."""
    return [Irrep(l, (-1) ** l) for l in range(l_max + 1)]  # noqa: E741


def su2_coefficient(j1: int, m1: int, j2: int, m2: int, j3: int, m3: int) -> float:
    """<j1 m1 j2 m2 | j3 m3> by Racah's formula, in whole numbers up to the last root."""
    if m1 + m2 != m3:
        return 0.0
    f = factorial
    under = (2 * j3 + 1) * f(j3 + j1 - j2) * f(j3 - j1 + j2) * f(j1 + j2 - j3)
    under *= f(j3 + m3) * f(j3 - m3) * f(j1 - m1) * f(j1 + m1) * f(j2 - m2) * f(j2 + m2)
    total = 0.0
    for k in range(max(0, j2 - j3 - m1, j1 - j3 + m2), min(j1 + j2 - j3, j1 - m1, j2 + m2) + 1):
        parts = (k, j1 + j2 - j3 - k, j1 - m1 - k, j2 + m2 - k, j3 - j2 + m1 + k, j3 - j1 - m2 + k)
        below = 1
        for part in parts:
            below *= f(part)
        total += (-1) ** k / below
    return sqrt(under / f(j1 + j2 + j3 + 1)) * total


def real_to_complex(l: int) -> torch.Tensor:  # noqa: E741
    """Unitary: complex harmonics (rows) of the real ones (columns)."""
    matrix = torch.zeros(2 * l + 1, 2 * l + 1, dtype=torch.complex128, device="cpu")
    matrix[l, l] = 1
    for m in range(1, l + 1):
        matrix[l - m, l + m], matrix[l - m, l - m] = sqrt(0.5), -1j * sqrt(0.5)
        matrix[l + m, l + m], matrix[l + m, l - m] = (-1) ** m * sqrt(0.5), 1j * (-1) ** m * sqrt(0.5)
    return (-1j) ** l * matrix  # with this phase, what couples real harmonics is real


@cache
def wigner_3j(l1: int, l2: int, l3: int) -> torch.Tensor:
    """The one invariant of three real irreps, of norm 1: [2 l1 + 1, 2 l2 + 1, 2 l3 + 1] in float64, on the CPU."""
    shape = (2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1)
    values = [
        su2_coefficient(l1, m1, l2, m2, l3, m3)
        for m1 in range(-l1, l1 + 1) for m2 in range(-l2, l2 + 1) for m3 in range(-l3, l3 + 1)
    ]  # fmt: skip
    table = torch.tensor(values, dtype=torch.complex128, device="cpu").view(shape)
    q1, q2, q3 = (real_to_complex(l) for l in (l1, l2, l3))  # noqa: E741
    table = torch.einsum("ij,kl,mn,ikm->jln", q1, q2, q3.conj(), table)
    assert table.imag.abs().max() < 1e-12
    return table.real / table.real.norm()
