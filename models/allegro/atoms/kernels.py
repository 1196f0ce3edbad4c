# SPDX-License-Identifier: Apache-2.0
"""The products of `tensor_product.py` on CPUs, by kernels that are compiled when first needed: `kernels.cpp`.

Each is an operator of PyTorch with two derivatives, so that autograd and torch.compile know it. Shapes as there.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from atoms import cue_products
from atoms.tensor_product import TORCH, Products
from common.compile_cpp import compiled


SOURCE = Path(__file__).with_suffix(".cpp")
VALUE, FIRST, SECOND = range(3)


@cache
def library() -> ctypes.CDLL:
    """Raises RuntimeError as `compiled` does."""
    return compiled(SOURCE)


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    kinds = {int: ctypes.c_int64, type(None): ctypes.c_void_p}
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else kinds[type(x)](x) for x in arguments)
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_bool
    if not function(*passed, ctypes.c_int64(torch.get_num_threads())):
        raise RuntimeError(f"{name} in {SOURCE.name} has no such l")


# ---- sums over the edges of an atom, of neighbours' features times couplings times weights


def _edge_sum(order: int, inputs: tuple, others: tuple, outputs: tuple) -> None:
    x, weights, coupling, path, centre, neighbor, row = inputs
    (_, i, u), k, p = x.shape, coupling.shape[2], weights.shape[1]
    sizes = (coupling.shape[0], i, k, p, u, weights.stride(0))
    indices = (
        path.contiguous(),
        centre.contiguous(),
        neighbor.contiguous(),
        None if row is None else row.contiguous(),
    )
    tensors = (
        x.contiguous(),
        weights,
        coupling.contiguous(),
        *(None if t is None else t.contiguous() for t in others),
    )
    assert weights.stride()[1:] == (u, 1) or weights.numel() == 0, weights.stride()
    _call("edge_sum", x.dtype, order, *sizes, *indices, *tensors, *outputs)


def _rows(weights: Tensor) -> Tensor:
    """With rows that are whole; they may lie apart."""
    return weights if weights.stride()[1:] == (weights.shape[2], 1) else weights.contiguous()


@torch.library.custom_op("atoms::edge_sum", mutates_args=())
def edge_sum(x: Tensor, weights: Tensor, coupling: Tensor, path: Tensor, centre: Tensor, neighbor: Tensor,
             row: Tensor | None, num_atoms: int) -> Tensor:  # fmt: skip
    """Of x [N, I, U], weights [rows, P, U], coupling [E, I, K]: [A, K, U]."""
    out = x.new_zeros(num_atoms, coupling.shape[2], x.shape[2])
    _edge_sum(VALUE, (x, _rows(weights), coupling, path, centre, neighbor, row), 4 * (None,), (out, None, None, None))
    return out


@edge_sum.register_fake
def _(x, weights, coupling, path, centre, neighbor, row, num_atoms):
    return x.new_empty(num_atoms, coupling.shape[2], x.shape[2])


@torch.library.custom_op("atoms::edge_sum_first", mutates_args=())
def edge_sum_first(g: Tensor, x: Tensor, weights: Tensor, coupling: Tensor, path: Tensor, centre: Tensor,
                   neighbor: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By `g` [A, K, U], the gradient of the sum: gradients of x, weights and couplings."""
    outputs = tuple(torch.zeros(t.shape, dtype=t.dtype) for t in (x, weights, coupling))
    inputs = (x, _rows(weights), coupling, path, centre, neighbor, row)
    _edge_sum(FIRST, inputs, (g, None, None, None), (None, *outputs))
    return outputs


@edge_sum_first.register_fake
def _(g, x, weights, coupling, path, centre, neighbor, row):
    return tuple(t.new_empty(t.shape) for t in (x, weights, coupling))


@torch.library.custom_op("atoms::edge_sum_second", mutates_args=())
def edge_sum_second(ax: Tensor, aw: Tensor, ac: Tensor, g: Tensor, x: Tensor, weights: Tensor, coupling: Tensor,
                    path: Tensor, centre: Tensor, neighbor: Tensor, row: Tensor | None,
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By gradients of what `edge_sum_first` gives: those of g, x, weights and couplings."""
    outputs = tuple(torch.zeros(t.shape, dtype=t.dtype) for t in (g, x, weights, coupling))
    inputs = (x, _rows(weights), coupling, path, centre, neighbor, row)
    _edge_sum(SECOND, inputs, (g, ax, aw, ac), outputs)
    return outputs


@edge_sum_second.register_fake
def _(ax, aw, ac, g, x, weights, coupling, path, centre, neighbor, row):
    return tuple(t.new_empty(t.shape) for t in (g, x, weights, coupling))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor) or t is None))


def _edge_sum_backward(ctx, g):
    return *edge_sum_first(g, *ctx.saved_tensors), *5 * (None,)


def _edge_sum_first_backward(ctx, ax, aw, ac):
    return *edge_sum_second(ax, aw, ac, *ctx.saved_tensors), *4 * (None,)


edge_sum.register_autograd(_edge_sum_backward, setup_context=_save)
edge_sum_first.register_autograd(_edge_sum_first_backward, setup_context=_save)


# ---- edges' features through matrices of their centres


def _centre_product(order: int, inputs: tuple, others: tuple, outputs: tuple) -> None:
    x, matrices, centre = (t.contiguous() for t in inputs)
    _, i, k, u = matrices.shape
    tensors = (None if t is None else t.contiguous() for t in others)
    _call("centre_product", x.dtype, order, x.shape[0], i, k, u, centre, x, matrices, *tensors, *outputs)


@torch.library.custom_op("atoms::centre_product", mutates_args=())
def centre_product(x: Tensor, matrices: Tensor, centre: Tensor) -> Tensor:
    """Of x [E, I, U], matrices [A, I, K, U]: [E, K, U]."""
    out = x.new_empty(x.shape[0], matrices.shape[2], x.shape[2])
    _centre_product(VALUE, (x, matrices, centre), (None, None, None), (out, None, None))
    return out


@centre_product.register_fake
def _(x, matrices, centre):
    return x.new_empty(x.shape[0], matrices.shape[2], x.shape[2])


@torch.library.custom_op("atoms::centre_product_first", mutates_args=())
def centre_product_first(g: Tensor, x: Tensor, matrices: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """By `g` [E, K, U], the gradient of the product: gradients of x and of the matrices."""
    outputs = torch.empty(x.shape, dtype=x.dtype), torch.zeros(matrices.shape, dtype=x.dtype)
    _centre_product(FIRST, (x, matrices, centre), (g, None, None), (None, *outputs))
    return outputs


@centre_product_first.register_fake
def _(g, x, matrices, centre):
    return x.new_empty(x.shape), matrices.new_empty(matrices.shape)


@torch.library.custom_op("atoms::centre_product_second", mutates_args=())
def centre_product_second(ax: Tensor, am: Tensor, g: Tensor, x: Tensor, matrices: Tensor, centre: Tensor,
                          ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By gradients of what `centre_product_first` gives: those of g, x and the matrices."""
    outputs = *(torch.empty(t.shape, dtype=t.dtype) for t in (g, x)), torch.zeros(matrices.shape, dtype=x.dtype)
    _centre_product(SECOND, (x, matrices, centre), (g, ax, am), outputs)
    return outputs


@centre_product_second.register_fake
def _(ax, am, g, x, matrices, centre):
    return tuple(t.new_empty(t.shape) for t in (g, x, matrices))


def _centre_product_backward(ctx, g):
    return *centre_product_first(g, *ctx.saved_tensors), None


def _centre_product_first_backward(ctx, ax, am):
    return *centre_product_second(ax, am, *ctx.saved_tensors), None


centre_product.register_autograd(_centre_product_backward, setup_context=_save)
centre_product_first.register_autograd(_centre_product_first_backward, setup_context=_save)


# ---- as `tensor_product.py` has them


def neighbor_product(x: Tensor, weights: Tensor, coupling: Tensor, path: Tensor, edges: Tensor, row: Tensor | None):
    """Sums of neighbours' features."""
    return edge_sum(x, weights, coupling, path, edges[0], edges[1], row, x.shape[0])


def environment(weights: Tensor, harmonics: Tensor, path: Tensor, centre: Tensor, num_atoms: int) -> Tensor:
    """The sum without neighbours: all are the same, and 1."""
    one = weights.new_ones(1, 1, weights.shape[2])
    nobody = torch.zeros_like(centre)
    return edge_sum(one, weights, harmonics.unsqueeze(1), path, centre, nobody, None, num_atoms)


CPP = Products(neighbor_product, environment, centre_product)


def products(layer_backend: str, device: torch.device) -> tuple[Products, str, str | None]:
    """Those of `cpp`, `cue` or `torch`, which of them it is where `auto` was asked for, and why not the faster one.

    Raises ValueError where `cpp` or `cue` is asked for and cannot be had.
    """
    if layer_backend == "cue":
        if device.type != "cuda":
            raise ValueError(f"layer_backend=cue needs an NVIDIA GPU, and this is {device.type}; give torch or auto.")
        if name := cue_products.missing():
            raise ValueError(f"layer_backend=cue needs the package {name}: {cue_products.INSTALL}.")
        return cue_products.products_by("uniform_1d"), "cue", None
    if layer_backend == "torch" or (layer_backend == "auto" and device.type != "cpu"):
        return TORCH, "torch", None
    try:
        if device.type != "cpu":
            raise RuntimeError(f"its kernels are for CPUs, and this is {device.type}")
        library()
    except RuntimeError as error:
        if layer_backend == "cpp":
            raise ValueError(f"layer_backend=cpp is impossible because {error}; give torch or auto.") from error
        return TORCH, "torch", f"Kernels for CPUs cannot be compiled ({error}); layers are slower without."
    return CPP, "cpp", None
