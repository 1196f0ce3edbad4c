# SPDX-License-Identifier: Apache-2.0
"""Number formats: BF16 compute over FP32 masters, and the layers' matrix products in FP8, MXFP8 or NVFP4.

TransformerEngine has all of them on the GPUs that they need. Without it torchao has two, on the GPUs that have the
products and emulated elsewhere: the same rounding, and no speed.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import lcm
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from modeling_esm2 import Esm2Config, cpp_available, resolve_layer_backend, te_available
from tokens.quant_stats import QuantStats


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
    rounds_bf16: tuple[str, ...] = ()  # by whose layers on GPUs FP32 cannot be rounded

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this capability has the products."""
        return self.capability <= capability < self.too_new


ADA, HOPPER, BLACKWELL = "an Ada, Hopper or Blackwell GPU", "a Hopper or Blackwell GPU", "a Blackwell GPU"
# The divisors are TransformerEngine 2.20's `is_quantizable` and what its products need.
RECIPES = {
    "DelayedScaling": Recipe(8, (8, 9), ADA, 16, 16),
    "Float8CurrentScaling": Recipe(8, (8, 9), ADA, 16, 16, torchao_float8, "HYBRID"),
    "Float8BlockScaling": Recipe(8, (9, 0), HOPPER, 128, 128),
    "MXFP8BlockScaling": Recipe(
        8, (10, 0), f"{BLACKWELL} of a data centre", 32, 32, torchao_mxfp8, "E4M3", (12, 0), ("torch",)
    ),
    "NVFP4BlockScaling": Recipe(4, (10, 0), BLACKWELL, 32, 32, rounds_bf16=("te",)),
}


class Section:
    """What `fp8_config` and `fp4_config` have in common."""

    bits: ClassVar[int]
    values: dict  # `recipe`, `format` and `recipe_kwargs`

    def __getitem__(self, what: str):
        return self.values[what]

    @property
    def recipe(self) -> str:
        """Its name; the full path that TransformerEngine's examples give will do."""
        return self["recipe"].rpartition(".")[2]

    def told(self, *keys: str) -> str:
        """The recipe as the user gave it, with those of the other keys that are set."""
        values = {key: self[key] for key in ("recipe", *keys)}
        return " with ".join(f"fp{self.bits}_config.fp{self.bits}_{k}={v}" for k, v in values.items() if v)

    def check(self) -> None:
        """Raise ValueError for what no hardware would make possible, enabled or not."""
        known = [name for name, needs in RECIPES.items() if needs.bits == self.bits]
        if self.recipe not in known:
            raise ValueError(f"{self.told()} must be one of {', '.join(known)}.")
        quantized = self.quantized_model_init_kwargs
        if quantized and any(quantized.values()):
            raise ValueError(
                f"fp{self.bits}_config.quantized_model_init_kwargs={quantized} would hold the layers' weights in "
                f"{self.bits} bits alone, and lose updates that are smaller than its steps; weights are FP32 here "
                "always. Leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class FP8(Section):
    """The section `fp8_config`."""

    bits: ClassVar[int] = 8
    enabled: bool = False
    fp8_recipe: str = "Float8CurrentScaling"
    fp8_format: Literal["HYBRID", "E4M3"] | None = None
    fp8_recipe_kwargs: dict | None = None
    quantized_model_init_kwargs: dict | None = None

    @property
    def values(self) -> dict:
        return {"recipe": self.fp8_recipe, "format": self.fp8_format, "recipe_kwargs": self.fp8_recipe_kwargs}


@dataclass(frozen=True, kw_only=True)
class FP4(Section):
    """The section `fp4_config`."""

    bits: ClassVar[int] = 4
    enabled: bool = False
    fp4_recipe: str = "NVFP4BlockScaling"
    fp4_format: Literal["E2M1"] | None = None
    fp4_recipe_kwargs: dict | None = None
    quantized_model_init_kwargs: dict | None = None

    @property
    def values(self) -> dict:
        return {"recipe": self.fp4_recipe, "format": self.fp4_format, "recipe_kwargs": self.fp4_recipe_kwargs}


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
        self.device, self.backend = device, resolve_layer_backend(model_config)
        self.te = self.backend == "te"
        self.dtype = (
            torch.bfloat16 if precision == "bf16" or (precision == "auto" and self._bf16_pays(model_config)) else None
        )
        self.multiple, self.notes = 1, []
        self.recipes: list[str | None] = [None] * model_config.num_hidden_layers
        self.scalings: dict[str, object] = {}
        self.emulated, self.stats = False, stats or QuantStats()
        if self.backend == "torch" and model_config.layer_backend == "auto":
            reason = cpp_available(model_config)[1] if device.type == "cpu" else te_available()[1]
            which = "kernels for CPUs cannot be compiled" if device.type == "cpu" else "faster form cannot be had"
            self.notes.append(f"The layers' {which} ({reason}); PyTorch's are slower.")
        num_layers, free = len(self.recipes), set(range(len(self.recipes)))
        sections = {8: fp8, 4: fp4}
        given = {8: chosen_layers("fp8_layers", fp8_layers, num_layers),
                 4: chosen_layers("fp4_layers", fp4_layers, num_layers)}  # fmt: skip
        for bits, layers in given.items():
            sections[bits].check()
            if layers and not sections[bits].enabled:
                raise ValueError(f"fp{bits}_layers={ranges(layers)} needs fp{bits}_config.enabled=true.")
            if layers == set() and sections[bits].enabled:
                raise ValueError(
                    f"fp{bits}_layers=[] names no layer; null takes all, and fp{bits}_config.enabled=false none."
                )
        if twice := (given[8] or set()) & (given[4] or set()):
            raise ValueError(f"fp8_layers and fp4_layers both name layer {min(twice)}; name it in one.")
        if fp8.enabled and fp4.enabled and given[8] is None and given[4] is None:
            raise ValueError(
                "fp8_config and fp4_config are both enabled; say with fp8_layers or fp4_layers which layers are which."
            )
        for bits, layers in given.items():
            if sections[bits].enabled:
                others = given[12 - bits] if sections[12 - bits].enabled else None
                layers = free - (others or set()) if layers is None else layers
                self._use(sections[bits], sorted(layers), model_config)
        if self.stats.enabled and not self.low:
            raise ValueError(
                "quant_stats_config.enabled=true needs fp8_config.enabled=true or fp4_config.enabled=true."
            )
        if self.stats.enabled and self.te:
            self.stats.inspect_te(self.recipes)

    def _use(self, asked: Section, layers: list[int], model_config: Esm2Config) -> None:
        """Take a section's recipe for these layers, if it can be had."""
        name, needs = asked.recipe, RECIPES[asked.recipe]
        for key in ("hidden_size", "intermediate_size"):
            if getattr(model_config, key) % needs.width:
                raise ValueError(
                    f"{asked.told()} needs widths that divide by {needs.width}, not {key}="
                    f"{getattr(model_config, key)}."
                )
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)
        on_hardware = needs.runs_on(capability)
        if self.te and not on_hardware:
            there = ", ".join(key for key, other in RECIPES.items() if other.runs_on(capability)) or "none of them"
            gpu = torch.cuda.get_device_name(self.device)
            raise ValueError(f"{asked.told()} needs {needs.hardware}; this is {gpu}, which has {there}.")
        if on_hardware and self.dtype is None and self.backend in needs.rounds_bf16:
            raise ValueError(f"{asked.told()} takes BF16 numbers on GPUs; precision=bf16 gives them.")
        if self.te:
            self.scalings[name] = te_scaling(asked)
        elif needs.torchao is None or asked["format"] not in (None, needs.torchao_format) or asked["recipe_kwargs"]:
            there = ", ".join(f"{key} ({other.torchao_format})" for key, other in RECIPES.items() if other.torchao)
            raise ValueError(
                f"{asked.told('format', 'recipe_kwargs')} needs TransformerEngine's layers; without them there are "
                f"{there}, with no further arguments."
            )
        else:
            self.emulated |= not on_hardware
            self.scalings[name] = needs.torchao(not on_hardware)
        for layer in layers:
            self.recipes[layer] = name
        self.multiple = lcm(self.multiple, needs.tokens)
        where = "all layers" if len(layers) == len(self.recipes) else f"layers {ranges(set(layers))}"
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
    def _outer_recipe(self) -> str:
        """The first of those in use."""
        return next(iter(self.scalings))

    @property
    def layers(self) -> dict[str, str]:
        """The layers of each recipe, as text."""
        return {name: ranges({i for i, recipe in enumerate(self.recipes) if recipe == name}) for name in self.scalings}

    def _bf16_pays(self, model_config: Esm2Config) -> bool:
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        # By what the CPU is, so that all ranks and every restart come to the same (docs/log.md).
        # Narrower models gain too little to give up FP32's exactness. What has AMX has AVX-512 BF16.
        return model_config.hidden_size >= 256 and torch.cpu._is_avx512_bf16_supported()

    def prepare(self, model: torch.nn.Module) -> None:
        """Let each layer's matrix products run in its format; embeddings, norms and the LM head stay as they are."""
        if not self.low:
            return
        if self.stats.inspector:
            self.stats.inspector.name_modules(model.esm.encoder.layer)
        for i, (layer, recipe) in enumerate(zip(model.esm.encoder.layer, self.recipes, strict=True)):
            if self.te:
                if recipe != self._outer_recipe:
                    layer.forward = in_te_recipe(layer, self.scalings.get(recipe))
            elif recipe:
                arithmetic = self.scalings[recipe]
                for name, module in layer.named_modules():
                    if hasattr(module, "matmul"):
                        module.matmul = linear_by(arithmetic.product)
                        if self.stats.enabled:
                            watched = self.stats.watched(f"{i}.{name}", module, module.matmul, arithmetic.round_trip)
                            module.matmul = watched

    @contextmanager
    def forward(self, autocast: bool = False):
        """Around a forward pass; `autocast` where no strategy casts the parameters."""
        with ExitStack() as stack:
            if autocast and self.dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.low and self.te:
                import transformer_engine.pytorch as te

                # At the outermost end TransformerEngine brings its scales up to date. Layers of another recipe have
                # theirs inside; not all do, because after each the next module counts as first, and updates too.
                stack.enter_context(te.autocast(enabled=True, recipe=self.scalings[self._outer_recipe]))
            yield


def te_scaling(asked: Section):
    """TransformerEngine's recipe. Raises ValueError for arguments it does not have, or if it does not run here."""
    import transformer_engine.common.recipe as recipes
    from transformer_engine.pytorch.quantization import check_recipe_support

    arguments = dict(asked["recipe_kwargs"] or {})
    if asked["format"]:
        arguments[f"fp{asked.bits}_format"] = recipes.Format[asked["format"]]
    try:
        scaling = getattr(recipes, asked.recipe)(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{asked.told('recipe_kwargs')} does not fit: {reason}") from error
    try:
        check_recipe_support(scaling)  # CUDA and cuBLAS may be too old for it
    except RuntimeError as error:
        raise ValueError(f"{asked.told()} does not run here: {error}") from error
    return scaling


def in_te_recipe(layer: torch.nn.Module, scaling) -> Callable:
    """A layer's forward pass in TransformerEngine's recipe; None: in BF16."""

    def in_recipe(*args, **kwargs):
        import transformer_engine.pytorch as te

        with te.autocast(enabled=scaling is not None, recipe=scaling):
            # Looked up now: FSDP2 has given the layer another class since, and activation checkpointing goes by that.
            return type(layer).forward(layer, *args, **kwargs)

    return in_recipe


def linear_by(product: Callable) -> Callable:
    """`F.linear` with another matrix product."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = product(x, weight.to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)

    return linear
