# SPDX-License-Identifier: Apache-2.0
"""The transformer layer of `layers.py` on CPUs, with kernels that are compiled when first needed: `layers_cpp.cpp`.

Parameters are those of `layers.py`. Attention is compiled for packed batches; padded ones, and numbers that are
neither FP32 nor BF16, go the way of `layers.py`. Shapes as there; S positions, R = D / 2 rotary angles.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

import layers
from layers import AttentionInputs


SOURCE = Path(__file__).with_suffix(".cpp")
# Parts of -ffast-math. All of it would have the library switch the whole process to flushing denormal numbers to zero,
# and would not let a NaN through.
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math",
    "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math", "-fno-strict-aliasing", "-fopenmp", "-fPIC",
    "-shared",
)  # fmt: skip
SUMMED_ROWS = 64  # ROWS in the source


def folder() -> Path:
    """Where torch keeps extensions: `$TORCH_EXTENSIONS_DIR`, or below the user's cache."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home / "torch_extensions")


@cache
def library(head_dim: int) -> ctypes.CDLL:
    """The kernels for heads of so many channels; compiled once for each torch and kind of processor, in about 3 s.

    Raises RuntimeError with the reason where that does not work.
    """
    compiler = get_cxx_compiler()
    options = [*FLAGS, f"-DHEAD_DIM={head_dim}"]
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration) as error:
        raise RuntimeError("only Linux on x86 processors is supported") from error
    key = hashlib.sha256(repr((SOURCE.read_bytes(), options, compiler, torch.__version__, cpu)).encode())
    path = folder() / f"esm2_layers_{key.hexdigest()[:16]}.so"
    if not path.exists():
        options += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # ranks may compile side by side
                made = Path(scratch) / path.name
                command = [*shlex.split(compiler), *options, str(SOURCE), "-o", str(made), "-ltorch_cpu", "-lc10"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    told = done.stderr.strip().splitlines() or ["no reason"]
                    raise RuntimeError(f"{compiler} fails: {next((x for x in told if 'error' in x), told[-1])}")
                made.replace(path)
        except FileNotFoundError as error:
            raise RuntimeError(f"there is no C++ compiler ({compiler})") from error
        except OSError as error:
            raise RuntimeError(f"{path.parent}: {error.strerror}") from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded: {error}") from error


@cache
def has_bfloat16(head_dim: int) -> bool:
    """Whether this processor has the products that attention in BF16 takes."""
    return bool(_function(head_dim, "has_bfloat16", ctypes.c_bool)())


def _function(head_dim: int, name: str, result=None):
    function = getattr(library(head_dim), name)
    function.restype = result
    return function


def _call(head_dim: int, name: str, *arguments: Tensor | bool | int | float | None) -> None:
    """Tensors are contiguous and on the CPU."""
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else kinds[type(x)](x) for x in arguments)
    _function(head_dim, name)(*passed, ctypes.c_int64(torch.get_num_threads()))


def _name(*tensors: Tensor) -> str:
    return "_".join(str(x.dtype).removeprefix("torch.") for x in tensors)


def _checked(qkv_THC: Tensor, cos_SR: Tensor, sin_SR: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tables and borders as the kernels read them. Raises ValueError for borders that do not fit."""
    borders = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != qkv_THC.shape[0] or min(lengths) < 0 or max(lengths) > cos_SR.shape[0]:
        raise ValueError(
            f"cu_seqlens {borders} must rise from 0 to the {qkv_THC.shape[0]} tokens, by at most max_seqlen "
            f"{cos_SR.shape[0]} each."
        )
    return cos_SR.float().contiguous(), sin_SR.float().contiguous(), cu_seqlens.to("cpu", torch.int32).contiguous()


# ---- operators of PyTorch, so that autograd, torch.compile and the profiler know them


@torch.library.custom_op("esm2::attention", mutates_args=())
def attention(qkv_THC: Tensor, cos_SR: Tensor, sin_SR: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention within each sequence, with rotary positions: context [T, H, D].

    `qkv_THC` are q, k, v of each head, C = 3 D; `cu_seqlens` is int32. The second output is what the backward pass
    needs of the softmax: the log2-sum-exp2 of each token's scores, FP32 [T, H].
    """
    (_, num_heads, width), num_seqs = qkv_THC.shape, len(cu_seqlens) - 1
    qkv_THC, context, lse = qkv_THC.contiguous(), *_attention_outputs(qkv_THC)
    tables = _checked(qkv_THC, cos_SR, sin_SR, cu_seqlens)
    outputs = (context, lse, None, None)
    _call(width // 3, f"attention_{_name(qkv_THC)}", False, qkv_THC, *tables, num_seqs, num_heads, *outputs)
    return context, lse


@attention.register_fake
def _attention_outputs(qkv_THC: Tensor, *_) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, width = qkv_THC.shape
    return qkv_THC.new_empty(num_tokens, num_heads, width // 3), qkv_THC.new_empty(
        num_tokens, num_heads, dtype=torch.float32
    )


@torch.library.custom_op("esm2::attention_backward", mutates_args=())
def attention_backward(
    grad_THD: Tensor,
    qkv_THC: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    cu_seqlens: Tensor,
    context_THD: Tensor,
    lse_TH: Tensor,
) -> Tensor:
    """The gradient of `qkv_THC`."""
    (_, num_heads, width), num_seqs = qkv_THC.shape, len(cu_seqlens) - 1
    qkv_THC, grad_THD = qkv_THC.contiguous(), grad_THD.contiguous()
    grad_qkv_THC = torch.empty_like(qkv_THC)
    tables = _checked(qkv_THC, cos_SR, sin_SR, cu_seqlens)
    _call(
        width // 3, f"attention_{_name(qkv_THC)}", True, qkv_THC, *tables, num_seqs, num_heads, context_THD, lse_TH,
        grad_THD, grad_qkv_THC,
    )  # fmt: skip
    return grad_qkv_THC


@attention_backward.register_fake
def _(grad_THD: Tensor, qkv_THC: Tensor, *_) -> Tensor:
    return qkv_THC.new_empty(qkv_THC.shape)


def _save_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


attention.register_autograd(
    lambda ctx, grad, _: (attention_backward(grad, *ctx.saved_tensors), None, None, None),
    setup_context=_save_attention,
)


@torch.library.custom_op("esm2::layer_norm", mutates_args=())
def layer_norm(
    x_TE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, dtype: torch.dtype, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm in FP32, given in `dtype`; also means and inverse deviations [T]. Weight and bias are FP32."""
    (rows, width), x_TE = x_TE.shape, x_TE.contiguous()
    y_TE, mean_T, inverse_T = _layer_norm_outputs(x_TE, weight_E, bias_E, eps, dtype)
    _call(
        head_dim, f"layer_norm_{_name(x_TE, y_TE)}", False, x_TE, weight_E.contiguous(), bias_E.contiguous(), y_TE,
        mean_T, inverse_T, None, None, None, rows, width, eps,
    )  # fmt: skip
    return y_TE, mean_T, inverse_T


@layer_norm.register_fake
def _layer_norm_outputs(x_TE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, dtype: torch.dtype, *_):
    mean_T, inverse_T = (x_TE.new_empty(x_TE.shape[:1], dtype=torch.float32) for _ in range(2))
    return x_TE.new_empty(x_TE.shape, dtype=dtype), mean_T, inverse_T


@torch.library.custom_op("esm2::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad_TE: Tensor, x_TE: Tensor, weight_E: Tensor, mean_T: Tensor, inverse_T: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of weight and bias [2, E]."""
    (rows, width), x_TE, grad_TE = x_TE.shape, x_TE.contiguous(), grad_TE.contiguous()
    grad_x_TE, sums = torch.empty_like(x_TE), weight_E.new_empty(-(-rows // SUMMED_ROWS), 2, width)
    _call(
        head_dim, f"layer_norm_{_name(x_TE, grad_TE)}", True, x_TE, weight_E.contiguous(), None, None, mean_T,
        inverse_T, grad_TE, grad_x_TE, sums, rows, width, 0.0,
    )  # fmt: skip
    return grad_x_TE, sums.sum(0)


@layer_norm_backward.register_fake
def _(grad_TE: Tensor, x_TE: Tensor, weight_E: Tensor, *_):
    return x_TE.new_empty(x_TE.shape), weight_E.new_empty(2, *weight_E.shape)


def _save_layer_norm(ctx, inputs, output):
    x_TE, weight_E, _, _, _, ctx.head_dim = inputs
    ctx.save_for_backward(x_TE, weight_E, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _layer_norm_gradients(ctx, grad_TE, *_):
    grad_x_TE, (grad_weight_E, grad_bias_E) = layer_norm_backward(grad_TE, *ctx.saved_tensors, ctx.head_dim)
    return grad_x_TE, grad_weight_E, grad_bias_E, None, None, None


layer_norm.register_autograd(_layer_norm_gradients, setup_context=_save_layer_norm)


# ---- the layer


class TransformerLayer(layers.TransformerLayer):
    """Pre-norm encoder layer without dropout."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float):
        super().__init__(hidden_size, intermediate_size, num_heads, eps)
        kernels = Kernels(hidden_size // num_heads)
        for part in (self.self_attention, self.self_attention.layernorm_qkv, self.layernorm_mlp):
            part.kernels = kernels


class Kernels(layers.Kernels):
    """Those of this file where they fit, else those of PyTorch."""

    def __init__(self, head_dim: int):
        library(head_dim)  # compiled before anything runs
        self.head_dim = head_dim

    def _takes(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and (
            x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bfloat16(self.head_dim))
        )

    def attention(self, qkv_NHC: Tensor, inputs: AttentionInputs) -> Tensor:
        if inputs.cu_seqlens is None or not self._takes(qkv_NHC):
            return super().attention(qkv_NHC, inputs)
        return attention(qkv_NHC, inputs.cos_SR, inputs.sin_SR, inputs.cu_seqlens)[0]

    def layer_norm(self, x_NE: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_NE.dtype
        if not self._takes(x_NE) or dtype not in (x_NE.dtype, torch.bfloat16):
            return super().layer_norm(x_NE, weight_E, bias_E, eps)
        y_TE, *_ = layer_norm(x_NE.flatten(0, -2), weight_E.float(), bias_E.float(), eps, dtype, self.head_dim)
        return y_TE.view(x_NE.shape)
