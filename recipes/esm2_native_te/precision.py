# SPDX-License-Identifier: Apache-2.0
"""Number formats: BF16 compute over FP32 masters, and the layers' matrix products in FP8, MXFP8 or NVFP4.

TransformerEngine has all of them on the GPUs that they need. Without it torchao has two, on the GPUs that have the
products and emulated elsewhere: the same rounding, and no speed.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from math import lcm
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modeling_esm2 import Esm2Config, cpp_available, resolve_layer_backend
from quant_stats import QuantStats


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
        return mx.dequantize(x.dtype), 1 / mx.scale.float(), mx.qdata.float().abs() == torch.finfo(e4m3).max

    return Arithmetic(lambda x, weight: mx_mm.apply(x, weight, *options), round_trip)


class Recipe(NamedTuple):
    """What a scaling recipe needs of the GPU and of shapes."""

    bits: int
    capability: tuple[int, int]
    hardware: str
    tokens: int  # what a rank's number of tokens must divide by
    width: int  # what the layers' widths must divide by
    torchao: Callable[[bool], Arithmetic] | None = None
    torchao_format: str | None = None
    too_new: tuple[int, int] = (99, 0)


ADA, HOPPER, BLACKWELL = "an Ada, Hopper or Blackwell GPU", "a Hopper or Blackwell GPU", "a Blackwell GPU"
# The divisors are TransformerEngine 2.20's `is_quantizable` and what its products need.
RECIPES = {
    "DelayedScaling": Recipe(8, (8, 9), ADA, 16, 16),
    "Float8CurrentScaling": Recipe(8, (8, 9), ADA, 16, 16, torchao_float8, "HYBRID"),
    "Float8BlockScaling": Recipe(8, (9, 0), HOPPER, 128, 128),
    "MXFP8BlockScaling": Recipe(8, (10, 0), f"{BLACKWELL} of a data centre", 32, 32, torchao_mxfp8, "E4M3", (12, 0)),
    "NVFP4BlockScaling": Recipe(4, (10, 0), BLACKWELL, 32, 32),
}


@dataclass(frozen=True, kw_only=True)
class FP8:
    """The section `fp8_config`."""

    enabled: bool = False
    fp8_recipe: str = "Float8CurrentScaling"
    fp8_format: Literal["HYBRID", "E4M3"] | None = None
    fp8_recipe_kwargs: dict | None = None
    quantized_model_init_kwargs: dict | None = None


@dataclass(frozen=True, kw_only=True)
class FP4:
    """The section `fp4_config`."""

    enabled: bool = False
    fp4_recipe: str = "NVFP4BlockScaling"
    fp4_format: Literal["E2M1"] | None = None
    fp4_recipe_kwargs: dict | None = None
    quantized_model_init_kwargs: dict | None = None


def chosen_layers(key: str, asked: Sequence[int | str] | str | int | None, num_layers: int) -> set[int] | None:
    """`[0, 2-5]` or `0,2-5` as numbers; None if nothing is said. Raises ValueError for what is no layer."""
    if asked is None:
        return None
    parts = str(asked).split(",") if isinstance(asked, str | int) else asked
    layers: set[int] = set()
    for part in parts:
        first, _, last = str(part).strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ValueError(f"{key}={asked}: {part} is neither a layer nor a range of layers, like 3 or 0-5.")
        layers |= set(range(int(first), int(last or first) + 1))
    if beyond := sorted(layer for layer in layers if layer >= num_layers):
        raise ValueError(f"{key}={asked}: there is no layer {beyond[0]}; they go from 0 to {num_layers - 1}.")
    return layers


def ranges(layers: set[int]) -> str:
    """`0-3, 5`."""
    starts = sorted(layer for layer in layers if layer - 1 not in layers)
    ends = sorted(layer for layer in layers if layer + 1 not in layers)
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


@cache
def measured_tflops(dtype: torch.dtype) -> float:
    """The CPU's rate in products of 1024 x 1024 matrices, in TFLOP/s: the best of a few, at most 0.2 s."""
    a, b = torch.randn(2, 1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e12


class Precision:
    """How a run computes: `dtype` in the layers (None: FP32), and the products of each layer by `recipes`.

    `multiple` is what the number of tokens on a rank must divide by. Raises ValueError for a format that this machine,
    backend or model does not have.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        model_config: Esm2Config,
        fp8: FP8 = FP8(),
        fp4: FP4 = FP4(),
        fp8_layers: Sequence[int | str] | str | int | None = None,
        fp4_layers: Sequence[int | str] | str | int | None = None,
        stats: QuantStats | None = None,
    ):
        self.device, backend = device, resolve_layer_backend(model_config)
        self.te = backend == "te"
        self.dtype = (
            torch.bfloat16 if precision == "bf16" or (precision == "auto" and self._bf16_pays(model_config)) else None
        )
        self.multiple, self.notes = 1, []
        self.recipes: list[str | None] = [None] * model_config.num_hidden_layers
        self.scalings: dict[str, object] = {}
        self.emulated, self.stats = False, stats or QuantStats()
        if backend == "torch" and model_config.layer_backend == "auto" and device.type == "cpu":
            reason = cpp_available(model_config)[1]
            self.notes.append(f"The layers' kernels for CPUs cannot be compiled ({reason}); PyTorch's are slower.")
        num_layers, free = len(self.recipes), set(range(len(self.recipes)))
        asked = {
            8: (fp8.enabled, fp8.fp8_recipe, fp8.fp8_format, fp8.fp8_recipe_kwargs, fp8.quantized_model_init_kwargs),
            4: (fp4.enabled, fp4.fp4_recipe, fp4.fp4_format, fp4.fp4_recipe_kwargs, fp4.quantized_model_init_kwargs),
        }
        given = {8: chosen_layers("fp8_layers", fp8_layers, num_layers),
                 4: chosen_layers("fp4_layers", fp4_layers, num_layers)}  # fmt: skip
        for bits, layers in given.items():
            if layers and not asked[bits][0]:
                raise ValueError(f"fp{bits}_layers={ranges(layers)} needs fp{bits}_config.enabled=true.")
        if twice := (given[8] or set()) & (given[4] or set()):
            raise ValueError(f"fp8_layers and fp4_layers both name layer {min(twice)}; name it in one.")
        if asked[8][0] and asked[4][0] and given[8] is None and given[4] is None:
            raise ValueError(
                "fp8_config and fp4_config are both enabled; say with fp8_layers or fp4_layers which layers are which."
            )
        for bits, layers in given.items():
            if asked[bits][0]:
                others = given[12 - bits] if asked[12 - bits][0] else None
                layers = free - (others or set()) if layers is None else layers
                self._use(bits, sorted(layers), model_config, *asked[bits][1:])
        if self.stats.enabled and not self.low:
            raise ValueError(
                "quant_stats_config.enabled=true needs fp8_config.enabled=true or fp4_config.enabled=true."
            )
        if self.stats.enabled and self.te:
            raise ValueError(
                "quant_stats_config.enabled=true needs layer_backend=torch: it looks into the plain layers."
            )

    def _use(self, bits, layers, model_config, recipe, number_format, kwargs, quantized) -> None:
        """Take a recipe for these layers, if it can be had."""
        section = f"fp{bits}_config"
        name = recipe.rpartition(".")[2]  # the full path that TransformerEngine's examples give will do
        known = [key for key, needs in RECIPES.items() if needs.bits == bits]
        if name not in known:
            raise ValueError(f"{section}.fp{bits}_recipe={recipe} must be one of {', '.join(known)}.")
        if quantized and quantized.get("enabled"):
            raise ValueError(
                f"{section}.quantized_model_init_kwargs={quantized} would hold the layers' weights in {bits} bits "
                "alone, and lose updates that are smaller than its steps; weights are FP32 here always. Leave it out."
            )
        needs = RECIPES[name]
        for key in ("hidden_size", "intermediate_size"):
            if getattr(model_config, key) % needs.width:
                raise ValueError(
                    f"{section}.fp{bits}_recipe={name} needs widths that divide by {needs.width}, not "
                    f"{key}={getattr(model_config, key)}."
                )
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)
        on_hardware = needs.capability <= capability < needs.too_new
        if self.te:
            if not on_hardware:
                raise ValueError(
                    f"{section}.fp{bits}_recipe={name} needs {needs.hardware}; this is "
                    f"{torch.cuda.get_device_name(self.device)}."
                )
            self.scalings[name] = te_scaling(bits, name, number_format, kwargs or {})
        elif needs.torchao is None or number_format not in (None, needs.torchao_format) or kwargs:
            there = ", ".join(f"{key} ({other.torchao_format})" for key, other in RECIPES.items() if other.torchao)
            raise ValueError(
                f"{section}.fp{bits}_recipe={name} with fp{bits}_format={number_format} and fp{bits}_recipe_kwargs="
                f"{kwargs} needs TransformerEngine; without it there are {there}, with no further arguments."
            )
        else:
            self.emulated |= not on_hardware
            self.scalings[name] = needs.torchao(not on_hardware)
        for layer in layers:
            self.recipes[layer] = name
        self.multiple = lcm(self.multiple, needs.tokens)
        where = "all layers" if len(layers) == len(self.recipes) else f"layers {ranges(set(layers)) or 'none'}"
        how = "" if self.te else " by torchao"
        how += ", emulated: this hardware has no such product. The same rounding, but slower" * (
            not self.te and not on_hardware
        )
        self.notes.append(f"{name} in {where}{how}")

    @property
    def low(self) -> bool:
        """Whether any layer computes in fewer than 16 bits."""
        return any(self.recipes)

    @property
    def layers(self) -> dict[str, str]:
        """The layers of each recipe, as text."""
        return {name: ranges({i for i, recipe in enumerate(self.recipes) if recipe == name}) for name in self.scalings}

    def _bf16_pays(self, model_config: Esm2Config) -> bool:
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        # By what the CPU is, so that all ranks and every restart come to the same (docs/log.md).
        if torch.cpu._is_amx_tile_supported():
            return model_config.hidden_size >= 256  # narrower ones gain too little to give up FP32's exactness
        return model_config.hidden_size >= 480 and torch.cpu._is_avx512_bf16_supported()

    def prepare(self, model: torch.nn.Module) -> None:
        """Let each layer's matrix products run in its format; embeddings, norms and the LM head stay as they are."""
        if not self.low:
            return
        for i, (layer, recipe) in enumerate(zip(model.esm.encoder.layer, self.recipes, strict=True)):
            if self.te:
                layer.forward = in_te_recipe(layer.forward, self.scalings.get(recipe))
            elif recipe:
                arithmetic = self.scalings[recipe]
                for name, module in layer.named_modules():
                    if hasattr(module, "matmul"):
                        module.matmul = linear_by(arithmetic.product)
                        if self.stats.enabled:
                            names = {p.shape: f"{i}.{name}.{key}" for key, p in module.named_parameters(recurse=False)}
                            module.matmul = self.stats.watched(names, module.matmul, arithmetic.round_trip)

    @contextmanager
    def forward(self, autocast: bool = False):
        """Around a forward pass; `autocast` where no strategy casts the parameters."""
        with ExitStack() as stack:
            if autocast and self.dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.low and self.te:
                import transformer_engine.pytorch as te

                # At the outermost one's end TransformerEngine brings its scales up to date; layers have theirs inside.
                stack.enter_context(te.autocast(enabled=True, recipe=next(iter(self.scalings.values()))))
            yield


def te_scaling(bits: int, name: str, number_format: str | None, kwargs: dict):
    """TransformerEngine's recipe of that name."""
    import transformer_engine.common.recipe as recipes

    arguments = dict(kwargs)
    if number_format:
        arguments[f"fp{bits}_format"] = recipes.Format[number_format]
    try:
        return getattr(recipes, name)(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"fp{bits}_config.fp{bits}_recipe_kwargs={kwargs} is not for {name}: {reason}") from error


def in_te_recipe(forward: Callable, scaling) -> Callable:
    """A layer's forward pass in TransformerEngine's recipe; None: in BF16."""

    @wraps(forward)
    def in_recipe(*args, **kwargs):
        import transformer_engine.pytorch as te

        with te.autocast(enabled=scaling is not None, recipe=scaling):
            return forward(*args, **kwargs)

    return in_recipe


def linear_by(product: Callable) -> Callable:
    """`F.linear` with another matrix product."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = product(x, weight.to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)

    return linear
