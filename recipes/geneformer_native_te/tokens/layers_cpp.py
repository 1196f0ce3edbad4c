# SPDX-License-Identifier: Apache-2.0
"""The transformer layer of `layers.py` on CPUs, with kernels that are compiled when first needed: `layers_cpp.cpp`.

Parameters are those of `layers.py`. There are kernels for attention of packed batches, dropout (in attention of padded
batches too) and layer norm in FP32 and BF16, and in BF16 for what lies between matrix products (GELU; ReLU and SwiGLU
are PyTorch's), if widths divide by 16; those products are then oneDNN's, in FP32 too where that is faster. All else
goes the way of `layers.py`.
Shapes as there; S positions, R = D / 2 rotary angles.
"""

import ctypes
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.compile_cpp import compiled
from tokens import layers
from tokens.dropout import ATTENDED, FED, Dropped, limit_of
from tokens.layers import AttentionInputs


SOURCE = Path(__file__).with_suffix(".cpp")
STRIP, VECTOR = 64, 16  # as in the source


@cache
def library(head_dim: int) -> ctypes.CDLL:
    """The kernels for heads of so many channels. Raises RuntimeError as `compiled` does."""
    return compiled(SOURCE, f"-DHEAD_DIM={head_dim}")


@cache
def has_bfloat16(head_dim: int) -> bool:
    """Whether processor and compiler have AVX-512 BF16, without which only layer norm is done in BF16 here."""
    return bool(_function(head_dim, "has_bfloat16", ctypes.c_bool)())


def _function(head_dim: int, name: str, result=None):
    function = getattr(library(head_dim), name)
    function.restype = result
    return function


def _call(head_dim: int, name: str, *arguments: Tensor | bool | int | float | None) -> None:
    """Tensors are contiguous and on the CPU. Raises RuntimeError where memory or oneDNN fails."""
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}
    passed = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else kinds[type(x)](x) for x in arguments)
    if not _function(head_dim, name, ctypes.c_bool)(*passed, ctypes.c_int64(torch.get_num_threads())):
        raise RuntimeError(f"{name} in {SOURCE.name} failed: no memory is left, or oneDNN refuses")


def _name(*tensors: Tensor) -> str:
    return "_".join(str(x.dtype).removeprefix("torch.") for x in tensors)


def _checked(qkv_THC: Tensor, cos_SR: Tensor, sin_SR: Tensor, cu_seqlens: Tensor, selected_W: Tensor | None) -> tuple:
    """What the kernel takes: tables, with rows that are whole vectors, borders, numbers of both, selected tokens.

    Raises ValueError for borders and tokens that do not fit.
    """
    borders = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != qkv_THC.shape[0] or min(lengths) < 0 or max(lengths) > cos_SR.shape[0]:
        raise ValueError(
            f"cu_seqlens {borders} must rise from 0 to the {qkv_THC.shape[0]} tokens, by at most max_seqlen "
            f"{cos_SR.shape[0]} each."
        )
    if selected_W is not None:
        selected_W = selected_W.to("cpu", torch.int64).contiguous()
        steps = selected_W.diff(prepend=torch.tensor([-1]), append=torch.tensor([len(qkv_THC)]))
        if not (steps > 0).all():
            at = min(int((steps > 0).int().argmin()), len(selected_W) - 1)
            raise ValueError(
                f"selected tokens must rise, from at least 0 to below {len(qkv_THC)}; they do not at number {at}, "
                f"which is {selected_W[at]}."
            )
    columns = _function(qkv_THC.shape[-1] // 3, "padded_half", ctypes.c_int64)()
    tables = (F.pad(x.float(), (0, columns - x.shape[-1])).contiguous() for x in (cos_SR, sin_SR))
    borders = cu_seqlens.to("cpu", torch.int32).contiguous()
    return *tables, borders, len(lengths), qkv_THC.shape[1], selected_W, -1 if selected_W is None else len(selected_W)


# ---- operators of PyTorch, so that autograd, torch.compile and the profiler know them


@torch.library.custom_op("tokens::attention", mutates_args=())
def attention(
    qkv_THC: Tensor, cos_SR: Tensor, sin_SR: Tensor, cu_seqlens: Tensor, selected_W: Tensor | None,
    words_T: Tensor | None = None, rate: float = 0.0, first_head: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention within each sequence, with rotary positions: [T, H, D], or of selected tokens [W, H, D].

    `qkv_THC` are q, k, v of each head, C = 3 D; `cu_seqlens` is int32. `selected_W` are the tokens that ask, int64 and
    rising (None: all). With `words_T` (dropout.py) weights are dropped at this rate; `first_head` is the number of the
    first head that is here. The second output is what the backward pass needs of the softmax: the log2-sum-exp2 of
    each asking token's scores, FP32 [T, H] or [W, H].
    """
    qkv_THC = qkv_THC.contiguous()
    context, lse = _attention_outputs(qkv_THC, cos_SR, sin_SR, cu_seqlens, selected_W)
    inputs = (qkv_THC, *_checked(qkv_THC, cos_SR, sin_SR, cu_seqlens, selected_W))
    _call(context.shape[-1], f"attention_{_name(qkv_THC)}", False, *inputs, *_dropout(words_T, rate), first_head,
          context, lse, None, None)  # fmt: skip
    return context, lse


@attention.register_fake
def _attention_outputs(
    qkv_THC: Tensor, cos_SR, sin_SR, cu_seqlens, selected_W: Tensor | None, *_
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, width = qkv_THC.shape
    num_asking = num_tokens if selected_W is None else selected_W.shape[0]
    context = qkv_THC.new_empty(num_asking, num_heads, width // 3)
    return context, qkv_THC.new_empty(num_asking, num_heads, dtype=torch.float32)


@torch.library.custom_op("tokens::attention_backward", mutates_args=())
def attention_backward(
    grad_NHD: Tensor,
    qkv_THC: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    cu_seqlens: Tensor,
    selected_W: Tensor | None,
    words_T: Tensor | None,
    context_NHD: Tensor,
    lse_NH: Tensor,
    rate: float,
    first_head: int,
) -> Tensor:
    """The gradient of `qkv_THC`; N is T, or W with `selected_W`."""
    qkv_THC, grad_NHD = qkv_THC.contiguous(), grad_NHD.contiguous()
    grad_qkv_THC = torch.empty_like(qkv_THC)
    inputs = (qkv_THC, *_checked(qkv_THC, cos_SR, sin_SR, cu_seqlens, selected_W))
    outputs = (context_NHD, lse_NH, grad_NHD, grad_qkv_THC)
    _call(context_NHD.shape[-1], f"attention_{_name(qkv_THC)}", True, *inputs, *_dropout(words_T, rate), first_head,
          *outputs)  # fmt: skip
    return grad_qkv_THC


@attention_backward.register_fake
def _(grad_NHD: Tensor, qkv_THC: Tensor, *_) -> Tensor:
    return qkv_THC.new_empty(qkv_THC.shape)


def _save_attention(ctx, inputs, output):
    *tensors, ctx.rate, ctx.first_head = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _attention_gradients(ctx, grad_NHD, _):
    if grad_NHD is None:
        return (None,) * 8
    return attention_backward(grad_NHD, *ctx.saved_tensors, ctx.rate, ctx.first_head), *(None,) * 7


attention.register_autograd(_attention_gradients, setup_context=_save_attention)


def _dropout(words_T: Tensor | None, rate: float) -> tuple[Tensor | None, int]:
    return None if words_T is None else words_T.contiguous(), limit_of(rate)


@torch.library.custom_op("tokens::drop", mutates_args=())
def drop(x_TE: Tensor, words_T: Tensor, place: int, rate: float, head_dim: int) -> Tensor:
    """As dropout.py's; and the gradient is dropped as the value is."""
    x_TE = x_TE.contiguous()
    y_TE = torch.empty_like(x_TE)
    _call(head_dim, f"drop_{_name(x_TE)}", x_TE, *_dropout(words_T, rate), place, y_TE, *x_TE.shape)
    return y_TE


@drop.register_fake
def _(x_TE: Tensor, *_) -> Tensor:
    return x_TE.new_empty(x_TE.shape)


def _save_drop(ctx, inputs, output):
    _, words_T, *ctx.options = inputs
    ctx.save_for_backward(words_T)


def _drop_gradients(ctx, grad_TE):
    return drop(grad_TE, *ctx.saved_tensors, *ctx.options), None, None, None, None


drop.register_autograd(_drop_gradients, setup_context=_save_drop)


def _normalize(x_TE, added_TE, weight_E, bias_E, eps: float, dtype: torch.dtype, head_dim: int):
    rows, width = x_TE.shape
    outputs = _layer_norm_outputs(x_TE, weight_E, bias_E, eps, dtype)
    sum_TE = None if added_TE is None else torch.empty_like(x_TE)
    bias_E = None if bias_E is None else bias_E.contiguous()
    _call(
        head_dim, f"layer_norm_{_name(x_TE, outputs[0])}", False, x_TE, added_TE, sum_TE, weight_E.contiguous(),
        bias_E, *outputs, None, None, None, None, None, rows, width, eps,
    )  # fmt: skip
    return sum_TE, *outputs


def _normalize_backward(grad_TE, grad_sum_TE, x_TE, weight_E, mean_T, inverse_T, grad_added_TE, head_dim: int):
    (rows, width), grad_TE = x_TE.shape, grad_TE.contiguous()
    grad_x_TE, sums = torch.empty_like(x_TE), weight_E.new_empty(-(-rows // STRIP), 2, width)
    _call(
        head_dim, f"layer_norm_{_name(x_TE, grad_TE)}", True, x_TE, None, None, weight_E.contiguous(), None, None,
        mean_T, inverse_T, grad_TE, grad_sum_TE, grad_x_TE, grad_added_TE, sums, rows, width, 0.0,
    )  # fmt: skip
    return grad_x_TE, sums.sum(0)


@torch.library.custom_op("tokens::layer_norm", mutates_args=())
def layer_norm(
    x_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, dtype: torch.dtype, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm in FP32, given in `dtype`; also means and inverse deviations [T]. Weight and bias are FP32.

    Without a bias RMSNorm, which has no means: [0].
    """
    return _normalize(x_TE.contiguous(), None, weight_E, bias_E, eps, dtype, head_dim)[1:]


@layer_norm.register_fake
def _layer_norm_outputs(x_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, dtype: torch.dtype, *_):
    mean_T = x_TE.new_empty(0 if bias_E is None else x_TE.shape[0], dtype=torch.float32)
    inverse_T = x_TE.new_empty(x_TE.shape[0], dtype=torch.float32)
    return x_TE.new_empty(x_TE.shape, dtype=dtype), mean_T, inverse_T


@torch.library.custom_op("tokens::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad_TE: Tensor, x_TE: Tensor, weight_E: Tensor, mean_T: Tensor, inverse_T: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of weight and bias [2, E]."""
    return _normalize_backward(grad_TE, None, x_TE.contiguous(), weight_E, mean_T, inverse_T, None, head_dim)


@layer_norm_backward.register_fake
def _(grad_TE: Tensor, x_TE: Tensor, weight_E: Tensor, *_):
    return x_TE.new_empty(x_TE.shape), weight_E.new_empty(2, *weight_E.shape)


def _save_layer_norm(ctx, inputs, output):
    x_TE, weight_E, _, _, _, ctx.head_dim = inputs
    ctx.save_for_backward(x_TE, weight_E, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _layer_norm_gradients(ctx, grad_TE, *_):
    if grad_TE is None:
        return (None,) * 6
    grad_x_TE, (grad_weight_E, grad_bias_E) = layer_norm_backward(grad_TE, *ctx.saved_tensors, ctx.head_dim)
    return grad_x_TE, grad_weight_E, grad_bias_E if ctx.needs_input_grad[2] else None, None, None, None


layer_norm.register_autograd(_layer_norm_gradients, setup_context=_save_layer_norm)


@torch.library.custom_op("tokens::add_layer_norm", mutates_args=())
def add_layer_norm(
    x_TE: Tensor, added_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x + added` in the format of x, and what `layer_norm` gives for it, in the format of what is added."""
    added_TE = added_TE.contiguous()
    return _normalize(x_TE.contiguous(), added_TE, weight_E, bias_E, eps, added_TE.dtype, head_dim)


@add_layer_norm.register_fake
def _(x_TE: Tensor, added_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, *_):
    return x_TE.new_empty(x_TE.shape), *_layer_norm_outputs(x_TE, weight_E, bias_E, eps, added_TE.dtype)


@torch.library.custom_op("tokens::add_layer_norm_backward", mutates_args=())
def add_layer_norm_backward(
    grad_sum_TE: Tensor | None,
    grad_TE: Tensor,
    sum_TE: Tensor,
    weight_E: Tensor,
    mean_T: Tensor,
    inverse_T: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of what is added to it, and of weight and bias [2, E]."""
    grad_added_TE = torch.empty_like(grad_TE, memory_format=torch.contiguous_format)
    grad_sum_TE = None if grad_sum_TE is None else grad_sum_TE.contiguous()
    grad_x_TE, sums = _normalize_backward(
        grad_TE, grad_sum_TE, sum_TE, weight_E, mean_T, inverse_T, grad_added_TE, head_dim
    )
    return grad_x_TE, grad_added_TE, sums


@add_layer_norm_backward.register_fake
def _(grad_sum_TE: Tensor | None, grad_TE: Tensor, sum_TE: Tensor, weight_E: Tensor, *_):
    return sum_TE.new_empty(sum_TE.shape), grad_TE.new_empty(grad_TE.shape), weight_E.new_empty(2, *weight_E.shape)


def _save_add_layer_norm(ctx, inputs, output):
    _, added_TE, weight_E, _, _, ctx.head_dim = inputs
    ctx.added_dtype = added_TE.dtype
    sum_TE, _, *statistics = output
    ctx.save_for_backward(sum_TE, weight_E, *statistics)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _add_layer_norm_gradients(ctx, grad_sum_TE, grad_TE, *_):
    if grad_TE is None:
        return grad_sum_TE, None if grad_sum_TE is None else grad_sum_TE.to(ctx.added_dtype), *(None,) * 4
    grad_x_TE, grad_added_TE, (grad_weight_E, grad_bias_E) = add_layer_norm_backward(
        grad_sum_TE, grad_TE, *ctx.saved_tensors, ctx.head_dim
    )
    return grad_x_TE, grad_added_TE, grad_weight_E, grad_bias_E if ctx.needs_input_grad[3] else None, None, None


add_layer_norm.register_autograd(_add_layer_norm_gradients, setup_context=_save_add_layer_norm)


# ---- linear maps: oneDNN's products, and what a step in BF16 needs between them
#
# The gradient of a weight is a product over tokens. oneDNN is up to twice as fast in it if the left-hand factor lies
# there transposed; the narrower one is what that is done to.


@cache
def onednn_in_float32() -> bool:
    """Whether FP32 products are to be oneDNN's, and not those of PyTorch's own library, which is MKL as a rule.

    So on AMD's processors with AVX-512, where they are twice as fast; ATEN_CPU_CAPABILITY=avx2 switches it off.
    """
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return amd and "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.backends.mkldnn.is_available()


def _linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    # F.linear would fill the output with the bias first, and read it back.
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


def layer_product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """A linear map's product [T, O], as these layers compute it on this processor."""
    own = x_TI.dtype == torch.bfloat16 or onednn_in_float32()
    return _linear(x_TI, weight_OI, None) if own else F.linear(x_TI, weight_OI)


def _product(a_RK: Tensor, b_KC: Tensor) -> Tensor:
    # In BF16 PyTorch takes oneDNN by itself; a sum over nothing oneDNN refuses.
    if a_RK.dtype != torch.float32 or not len(b_KC):
        return a_RK @ b_KC
    return _linear(a_RK, b_KC.T, None)


def _transposed(x_RC: Tensor, head_dim: int) -> Tensor:
    if x_RC.dtype == torch.float32:
        return x_RC.T.contiguous()
    rows, columns = x_RC.shape
    assert columns % VECTOR == 0, columns
    # Whole strips, because oneDNN 3.12 reads the left-hand factor to beyond the end of a row, where NaN times zero is
    # NaN; 32 more, because rows whose distance is a power of two share too few places in the processor's caches.
    to_CR = x_RC.new_empty(columns, -(-rows // STRIP) * STRIP + 32)
    _call(head_dim, "transpose_bfloat16", x_RC, to_CR, rows, columns, to_CR.shape[1])
    return to_CR[:, :rows]


def _strip_sums(x_RC: Tensor) -> Tensor:
    return x_RC.new_empty(-(-len(x_RC) // STRIP), x_RC.shape[1], dtype=torch.float32)


def _column_sums(x_RC: Tensor, head_dim: int) -> Tensor:
    if x_RC.dtype == torch.float32:
        return x_RC.sum(0)
    sums = _strip_sums(x_RC)
    _call(head_dim, "column_sums_bfloat16", x_RC, sums, *x_RC.shape)
    return sums.sum(0)


def _weight_gradient(grad_TO: Tensor, x_TI: Tensor, head_dim: int) -> Tensor:
    if grad_TO.shape[1] <= x_TI.shape[1]:
        return _product(_transposed(grad_TO, head_dim), x_TI)
    return _transposed(_product(_transposed(x_TI, head_dim), grad_TO), head_dim).contiguous()


@torch.library.custom_op("tokens::product", mutates_args=())
def product(a_RK: Tensor, b_KC: Tensor) -> Tensor:
    """`a_RK b_KC`, both BF16 or both FP32; without a gradient of its own, so that to ask for one is an error."""
    return _product(a_RK, b_KC)


@product.register_fake
def _(a_RK: Tensor, b_KC: Tensor) -> Tensor:
    return a_RK.new_empty(a_RK.shape[0], b_KC.shape[1])


@torch.library.custom_op("tokens::linear", mutates_args=())
def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, head_dim: int) -> Tensor:
    """`x_TI weight_OI^T + bias_O`; x and weight are both BF16 or both FP32."""
    return _linear(x_TI, weight_OI, bias_O)


@linear.register_fake
def _(x_TI: Tensor, weight_OI: Tensor, *_) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("tokens::linear_backward", mutates_args=())
def linear_backward(
    grad_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias ([0]: there is none), whether the latter are asked for or not."""
    grad_TO, x_TI = grad_TO.contiguous(), x_TI.contiguous()
    has_bias = bias_O is not None
    grad_bias_O = _column_sums(grad_TO, head_dim).to(bias_O.dtype) if has_bias else grad_TO.new_empty(0)
    return _product(grad_TO, weight_OI), _weight_gradient(grad_TO, x_TI, head_dim), grad_bias_O


@linear_backward.register_fake
def _(grad_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *_):
    grad_bias_O = grad_TO.new_empty(0) if bias_O is None else torch.empty_like(bias_O)
    return x_TI.new_empty(x_TI.shape), weight_OI.new_empty(weight_OI.shape), grad_bias_O


def _save_linear(ctx, inputs, output):
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _linear_gradients(ctx, grad_TO):
    x_TI, weight_OI, bias_O = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:3]):  # frozen
        return product(grad_TO, weight_OI), None, None, None
    grad_x_TI, grad_weight_OI, grad_bias_O = linear_backward(grad_TO, x_TI, weight_OI, bias_O, ctx.head_dim)
    return grad_x_TI, grad_weight_OI, None if bias_O is None else grad_bias_O, None


linear.register_autograd(_linear_gradients, setup_context=_save_linear)


@torch.library.custom_op("tokens::mlp", mutates_args=())
def mlp(
    x_TE: Tensor, weight_FE: Tensor, bias_F: Tensor, weight_EF: Tensor, bias_E: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Linear map, erf-GELU, linear map, in BF16: the output, and for the backward pass GELU's input [T, F]."""
    assert len(bias_F) % VECTOR == 0, bias_F.shape
    pre_TF = _linear(x_TE, weight_FE, bias_F)
    x_TF = torch.empty_like(pre_TF)
    _call(head_dim, "gelu_bfloat16", pre_TF, x_TF, *pre_TF.shape)
    return _linear(x_TF, weight_EF, bias_E), pre_TF


@mlp.register_fake
def _(x_TE: Tensor, weight_FE: Tensor, *_):
    return x_TE.new_empty(x_TE.shape), x_TE.new_empty(x_TE.shape[0], weight_FE.shape[0])


@torch.library.custom_op("tokens::mlp_backward", mutates_args=())
def mlp_backward(
    grad_TE: Tensor,
    x_TE: Tensor,
    weight_FE: Tensor,
    bias_F: Tensor,
    weight_EF: Tensor,
    bias_E: Tensor,
    pre_TF: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all of `mlp`'s tensors. GELU is computed again, beside its derivative, instead of held."""
    grad_TE, x_TE = grad_TE.contiguous(), x_TE.contiguous()
    grad_TF, x_TF = grad_TE @ weight_EF, torch.empty_like(pre_TF)
    sums = _strip_sums(pre_TF)
    _call(head_dim, "gelu_backward_bfloat16", grad_TF, pre_TF, x_TF, sums, *pre_TF.shape)
    return (
        grad_TF @ weight_FE,
        _weight_gradient(grad_TF, x_TE, head_dim),
        sums.sum(0).to(bias_F.dtype),
        _weight_gradient(grad_TE, x_TF, head_dim),
        _column_sums(grad_TE, head_dim).to(bias_E.dtype),
    )


@mlp_backward.register_fake
def _(grad_TE: Tensor, *tensors):
    return tuple(x.new_empty(x.shape) for x in tensors[:5])


def _save_mlp(ctx, inputs, output):
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _mlp_gradients(ctx, grad_TE, _):
    if grad_TE is None:
        return (None,) * 6
    return *mlp_backward(grad_TE, *ctx.saved_tensors, ctx.head_dim), None


mlp.register_autograd(_mlp_gradients, setup_context=_save_mlp)


# ---- the layer


class LayerNormMLP(layers.LayerNormMLP):
    """That of `layers.py` with the sum before it."""

    def forward(self, x_NE: Tensor, added_NE: Tensor) -> tuple[Tensor, Tensor]:
        """[N, E] and what is to be added to it: their sum, and this module's own part [N, E]."""
        x_NE, y_NE = self.kernels.add_layer_norm(x_NE, added_NE, self)
        return x_NE, self.kernels.mlp(y_NE, self)


def use_kernels(layer: layers.TransformerLayer, hidden_size: int, intermediate_size: int, num_heads: int) -> None:
    """Let all parts of a layer compute with these kernels."""
    kernels, attention = Kernels(hidden_size // num_heads), layer.self_attention
    products = [attention.qkv if attention.post_norm else attention.layernorm_qkv, attention.proj, layer.layernorm_mlp]
    for part in (attention, *products, *([layer.layernorm] if attention.post_norm else [])):
        part.kernels = kernels
    if hidden_size % VECTOR == intermediate_size % VECTOR == 0:
        for part in products:
            part.matmul = kernels.linear


class TransformerLayer(layers.TransformerLayer):
    """That of `layers.py`, with these kernels."""

    mlp_class = LayerNormMLP

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, *options, **more):
        super().__init__(hidden_size, intermediate_size, num_heads, *options, **more)
        use_kernels(self, hidden_size, intermediate_size, num_heads)

    def forward(self, x_NE: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None) -> Tensor:
        """[N, E] to [N, E], or of selected tokens [W, E]."""
        attended_NE = self.drop(self.self_attention(x_NE, inputs, selected_W), inputs, ATTENDED, selected_W)
        x_NE, added_NE = self.layernorm_mlp(layers.take_selected(x_NE, selected_W), attended_NE)
        return x_NE + self.drop(added_NE, inputs, FED, selected_W)


class PostNormLayer(layers.PostNormLayer):
    """That of `layers.py`, with these kernels."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, *options, **more):
        super().__init__(hidden_size, intermediate_size, num_heads, *options, **more)
        use_kernels(self, hidden_size, intermediate_size, num_heads)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Kernels(layers.Kernels):
    """Those of this file where they fit, else those of PyTorch."""

    def __init__(self, head_dim: int):
        library(head_dim)  # compiled before anything runs
        self.head_dim, self.has_bfloat16 = head_dim, has_bfloat16(head_dim)
        self.onednn_in_float32 = onednn_in_float32()  # asked here: torch.compile cannot follow

    def _takes(self, x: Tensor) -> bool:
        known = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and self.has_bfloat16)
        return known and x.device.type == "cpu"

    def _in_bfloat16(self, x: Tensor) -> bool:
        return self.has_bfloat16 and self._takes(x) and _compute_dtype(x) == torch.bfloat16

    def _through_onednn(self, *tensors: Tensor | None) -> bool:
        on_cpu = all(x is None or (x.dtype == torch.float32 and x.device.type == "cpu") for x in tensors)
        return self.onednn_in_float32 and on_cpu and _compute_dtype(tensors[0]) == torch.float32

    def attention(
        self, qkv_NHC: Tensor, inputs: AttentionInputs, selected_W: Tensor | None = None,
        dropped: Dropped | None = None,
    ) -> Tensor:  # fmt: skip
        padded = inputs.cu_seqlens is None
        if (padded and (inputs.turns or not dropped)) or not self._takes(qkv_NHC):
            return super().attention(qkv_NHC, inputs, selected_W, dropped)
        angles, dropped = (inputs.cos_SR, inputs.sin_SR), dropped or Dropped(None, 0.0)
        if not padded:
            return attention(qkv_NHC, *angles, inputs.cu_seqlens, selected_W, *dropped)[0]
        # PyTorch's own would hold all weights. The real tokens are taken out, and put back.
        real_BS = torch.ones_like(dropped.words, dtype=torch.bool)
        if inputs.mask_B11S is not None:
            real_BS = inputs.mask_B11S[:, 0, 0]
        real_T, cu_seqlens = real_BS.flatten().nonzero().squeeze(1), F.pad(real_BS.sum(1).cumsum(0), (1, 0))
        dropped = dropped._replace(words=dropped.words.flatten()[real_T])
        context_THD = attention(qkv_NHC.flatten(0, 1)[real_T], *angles, cu_seqlens.int(), None, *dropped)[0]
        context_NHD = context_THD.new_zeros(real_BS.numel(), *context_THD.shape[1:]).index_copy(0, real_T, context_THD)
        return layers.take_selected(context_NHD.unflatten(0, real_BS.shape), selected_W, token_dims=2)

    def drop(self, x_NE: Tensor, words_N: Tensor, place: int, rate: float) -> Tensor:
        if not self._takes(x_NE):
            return super().drop(x_NE, words_N, place, rate)
        y_TE = drop(x_NE.flatten(0, -2), words_N.flatten(), place, rate, self.head_dim)
        return y_TE.view(x_NE.shape)

    def layer_norm(self, x_NE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> Tensor:
        dtype = _compute_dtype(x_NE)
        if not self._takes(x_NE) or dtype not in (x_NE.dtype, torch.bfloat16):
            return super().layer_norm(x_NE, weight_E, bias_E, eps)
        bias_E = None if bias_E is None else bias_E.float()
        y_TE, *_ = layer_norm(x_NE.flatten(0, -2), weight_E.float(), bias_E, eps, dtype, self.head_dim)
        return torch.ops.aten._unsafe_view(y_TE, x_NE.shape)  # no view to autograd: FSDP2 warns of layers that end so

    def add_layer_norm(self, x_NE: Tensor, added_NE: Tensor, part: layers.LayerNormMLP) -> tuple[Tensor, Tensor]:
        """Both [N, E]: the sum, and its layer norm."""
        weight_E, bias_E = part.layer_norm_weight, part.layer_norm_bias
        takes = self._takes(x_NE) and self._takes(added_NE)
        if not takes or added_NE.dtype not in (x_NE.dtype, torch.bfloat16):
            x_NE = x_NE + added_NE
            return x_NE, self.layer_norm(x_NE, weight_E, bias_E, part.eps)
        bias_E = None if bias_E is None else bias_E.float()
        sum_TE, y_TE, *_ = add_layer_norm(
            x_NE.flatten(0, -2), added_NE.flatten(0, -2), weight_E.float(), bias_E, part.eps, self.head_dim
        )
        return sum_TE.view(x_NE.shape), y_TE.view(x_NE.shape)

    def norm_of_sum(
        self, x_NE: Tensor, added_NE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float
    ) -> Tensor:
        # In the format of x, and not rounded to what is added: it is also what the next part is added to. As a layer's
        # output it must be no view, which padded batches would make it.
        if x_NE.ndim > 2 or not self._takes(x_NE):
            return layers.Kernels.layer_norm(self, x_NE + added_NE, weight_E, bias_E, eps)
        bias_E = None if bias_E is None else bias_E.float()
        if added_NE.dtype == x_NE.dtype:
            return add_layer_norm(x_NE, added_NE, weight_E.float(), bias_E, eps, self.head_dim)[1]
        return layer_norm(x_NE + added_NE, weight_E.float(), bias_E, eps, x_NE.dtype, self.head_dim)[0]

    def linear(self, x_NE: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`, through `linear` in BF16, to which weights are rounded, and in FP32 where that is faster."""
        if self._in_bfloat16(x_NE):
            x_NE, weight = x_NE.bfloat16(), weight.bfloat16()
        elif not self._through_onednn(x_NE, weight, bias):
            return F.linear(x_NE, weight, bias)
        return linear(x_NE.flatten(0, -2), weight, bias, self.head_dim).unflatten(0, x_NE.shape[:-1])

    def mlp(self, x_NE: Tensor, part: layers.LayerNormMLP) -> Tensor:
        own = getattr(part.matmul, "__func__", None) is Kernels.linear  # no other has been put there
        fused = part.activation is F.gelu and part.fc1_bias is not None
        if not own or not fused or not self._in_bfloat16(x_NE):
            return super().mlp(x_NE, part)
        weights = (part.fc1_weight.bfloat16(), part.fc1_bias, part.fc2_weight.bfloat16(), part.fc2_bias)
        return mlp(x_NE.flatten(0, -2).bfloat16(), *weights, self.head_dim)[0].unflatten(0, x_NE.shape[:-1])
