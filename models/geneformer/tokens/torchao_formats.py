# SPDX-License-Identifier: Apache-2.0
"""Matrix products in FP8 and MXFP8 by torchao, which is imported at first use.

`emulated`, for hardware without such a product, rounds the same and is slower.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Arithmetic(NamedTuple):
    """Products in some format, `x weight^T` with a gradient, and what the format makes of one tensor.

    `round_trip(x, is_gradient)` gives x rounded, scale, and which numbers are the format's largest.
    """

    product: Callable[[Tensor, Tensor], Tensor]
    round_trip: Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def torchao_float8(emulated: bool) -> Arithmetic:
    """Input and weight in E4M3, the output gradient in E5M2, one scale a tensor."""
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    config = Float8LinearConfig(emulate=emulated)
    products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    mm_config = LinearMMConfig(*(ScaledMMConfig(emulated, mm.use_fast_accum, False, False) for mm in products))

    def round_trip(x: Tensor, is_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float8_e5m2 if is_gradient else torch.float8_e4m3fn
        scale = tensor_to_scale(x, dtype)
        few_bits = to_fp8_saturated(x.float() * scale, dtype).float()
        return few_bits / scale, scale, few_bits.abs() == torch.finfo(dtype).max

    return Arithmetic(
        lambda x, weight: matmul_with_hp_or_float8_args.apply(x, weight.t(), mm_config, config), round_trip
    )


def torchao_mxfp8(emulated: bool) -> Arithmetic:
    """All in E4M3, with a scale that is a power of two for each 32 numbers (OCP's MX format, arXiv:2310.10537)."""
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.mx_formats.config import (
        MXFP8Dim0CastKernelChoice,
        MXFP8Dim1CastKernelChoice,
        ScaleCalculationMode,
    )
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    e4m3, dim0, dim1 = torch.float8_e4m3fn, MXFP8Dim0CastKernelChoice, MXFP8Dim1CastKernelChoice
    kernels = KernelPreference.EMULATED if emulated else KernelPreference.AUTO
    casts = (dim0.TORCH, dim1.TORCH) if emulated else (dim0.TRITON, dim1.CUDA)
    options = (e4m3, e4m3, e4m3, 32, kernels, *casts, ScaleCalculationMode.RCEIL, False)

    def round_trip(x: Tensor, is_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        mx = MXTensor.to_mx(x.contiguous(), e4m3, 32, ScaleCalculationMode.RCEIL)
        sizes = mx.qdata.float().abs()
        has_numbers = sizes.unflatten(-1, (-1, 32)).amax(-1) > 0  # the scale of zeros says nothing
        return mx.dequantize(x.dtype), 1 / mx.scale.float()[has_numbers], sizes == torch.finfo(e4m3).max

    return Arithmetic(lambda x, weight: mx_mm.apply(x, weight, *options), round_trip)


def linear_by(product: Callable) -> Callable:
    """`F.linear` with another matrix product."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = product(x, weight.to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)

    return linear
