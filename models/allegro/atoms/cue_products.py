# SPDX-License-Identifier: Apache-2.0
"""The products of `tensor_product.py` by NVIDIA's cuEquivariance, whose kernels gather, multiply and sum in one go.

They need a GPU, and have not been run on one. Their slow form in plain PyTorch gives the same numbers in tests.
Each product is a polynomial of rows of channels: a path multiplies one row of each operand. Shapes as there.
"""

import importlib.util
from functools import cache

from torch import Tensor

from atoms.tensor_product import Products


PACKAGES = ("cuequivariance_torch", "cuequivariance_ops_torch")
INSTALL = "pip install -r requirements-cue.txt"


def missing() -> str | None:
    """The first package that is not installed."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), None)


@cache
def polynomial(method: str, operands: tuple[tuple[int, bool], ...], paths: tuple[tuple[int, ...], ...], channels: int):
    """Sum over `paths` of the product of one segment of each operand into one of the last.

    An operand is how many segments it has, and whether each is a row of channels or one number.
    """
    import cuequivariance as cue
    import cuequivariance_torch

    product = cue.SegmentedTensorProduct.from_subscripts(",".join("u" if row else "" for _, row in operands))
    for i, (number, row) in enumerate(operands):
        product.add_segments(i, number * [(channels,) if row else ()])
    for path in paths:
        product.add_path(*path, c=1.0)
    return cuequivariance_torch.SegmentedPolynomial(cue.SegmentedPolynomial.eval_last_operand(product), method=method)


@cache
def entries(path: Tensor) -> tuple[int, ...]:
    """Of a tensor that is kept, so that it comes from the GPU only once."""
    return tuple(path.tolist())


def flat(values: Tensor) -> Tensor:
    """A row for each edge, atom or length."""
    return values.flatten(1).contiguous()


def products_by(method: str) -> Products:
    """`uniform_1d` are the kernels, `naive` is plain PyTorch."""

    def neighbor(x: Tensor, weights: Tensor, coupling: Tensor, path: Tensor, edges: Tensor, row: Tensor | None):
        _, i, k = coupling.shape
        operands = ((weights.shape[1], True), (i, True), (i * k, False), (k, True))
        paths = tuple((p, a, a * k + b, b) for b, p in enumerate(entries(path)) for a in range(i))
        f = polynomial(method, operands, paths, x.shape[2])
        where = {1: edges[1].contiguous()} | ({} if row is None else {0: row})
        (found,) = f([flat(weights), flat(x), flat(coupling)], where, {0: x.new_empty(x.shape[0], 1)},
                     {0: edges[0].contiguous()})  # fmt: skip
        return found.view(x.shape[0], k, x.shape[2])

    def environment(weights: Tensor, harmonics: Tensor, path: Tensor, centre: Tensor, num_atoms: int) -> Tensor:
        _, number, channels = weights.shape
        j = harmonics.shape[1]
        paths = tuple((p, a, a) for a, p in enumerate(entries(path)))
        f = polynomial(method, ((number, True), (j, False), (j, True)), paths, channels)
        (found,) = f([flat(weights), harmonics], {}, {0: weights.new_empty(num_atoms, 1)}, {0: centre.contiguous()})
        return found.view(num_atoms, j, channels)

    def centre(x: Tensor, matrices: Tensor, centre: Tensor) -> Tensor:
        _, i, k, channels = matrices.shape
        paths = tuple((a, a * k + b, b) for a in range(i) for b in range(k))
        f = polynomial(method, ((i, True), (i * k, True), (k, True)), paths, channels)
        (found,) = f([flat(x), flat(matrices)], {1: centre.contiguous()})
        return found.view(-1, k, channels)

    return Products(neighbor, environment, centre)
