# SPDX-License-Identifier: Apache-2.0
"""Number formats: BF16 compute over FP32 masters, and FP8 matrix products by TransformerEngine or torchao."""

import time
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch

from modeling_esm2 import Esm2Config, cpp_available, resolve_layer_backend


class Recipe(NamedTuple):
    """What a scaling recipe needs of the GPU and of the number of tokens in a batch."""

    capability: tuple[int, int]
    hardware: str
    multiple: int
    without_te: bool  # torchao's float8 training has it


RECIPES = {
    "DelayedScaling": Recipe((8, 9), "an Ada, Hopper or Blackwell GPU", 16, False),
    "Float8CurrentScaling": Recipe((8, 9), "an Ada, Hopper or Blackwell GPU", 16, True),
    "Float8BlockScaling": Recipe((9, 0), "a Hopper or Blackwell GPU", 128, False),
    "MXFP8BlockScaling": Recipe((10, 0), "a Blackwell GPU", 32, False),
}


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
    """How a run computes: `dtype` in the layers (None: FP32), and in FP8 if `fp8`.

    `multiple` is what the number of tokens in a batch must divide by. Raises ValueError for a format that this machine
    or backend does not have.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        model_config: Esm2Config,
        *,
        enabled: bool = False,
        fp8_recipe: str = "Float8CurrentScaling",
        fp8_format: Literal["HYBRID", "E4M3"] = "HYBRID",
        fp8_recipe_kwargs: dict | None = None,
    ):
        self.device, backend = device, resolve_layer_backend(model_config)
        self.te = backend == "te"
        self.dtype = (
            torch.bfloat16 if precision == "bf16" or (precision == "auto" and self._bf16_pays(model_config)) else None
        )
        self.fp8, self.multiple, self.notes = enabled, 1, []
        if backend == "torch" and model_config.layer_backend == "auto" and device.type == "cpu":
            reason = cpp_available(model_config)[1]
            self.notes.append(f"The layers' kernels for CPUs cannot be compiled ({reason}); PyTorch's are slower.")
        if not enabled:
            return
        self.recipe = fp8_recipe.rpartition(".")[2]  # the full path that TransformerEngine's examples give will do
        if self.recipe not in RECIPES:
            raise ValueError(f"fp8_config.fp8_recipe={fp8_recipe} must be one of {', '.join(RECIPES)}.")
        if model_config.hidden_size % 16 or model_config.intermediate_size % 16:
            raise ValueError(
                f"fp8_config.enabled=true needs widths that divide by 16, not hidden_size={model_config.hidden_size} "
                f"and intermediate_size={model_config.intermediate_size}."
            )
        needs = RECIPES[self.recipe]
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        if self.te and capability < needs.capability:
            raise ValueError(
                f"fp8_config.fp8_recipe={self.recipe} needs {needs.hardware}; this is "
                f"{torch.cuda.get_device_name(device)}."
            )
        if self.te:
            self.scaling = te_scaling(self.recipe, fp8_format, fp8_recipe_kwargs or {})
        elif not needs.without_te or fp8_format != "HYBRID" or fp8_recipe_kwargs:
            raise ValueError(
                f"fp8_config.fp8_recipe={self.recipe} with fp8_format={fp8_format} and fp8_recipe_kwargs="
                f"{fp8_recipe_kwargs} needs TransformerEngine; without it only Float8CurrentScaling, HYBRID, null."
            )
        self.multiple, self.emulated = needs.multiple, capability < needs.capability
        if not self.te:
            self.notes.append(
                "FP8 by torchao, one scale a tensor"
                + (", emulated: this hardware has no FP8 product. The same rounding, but slower" * self.emulated)
            )

    def _bf16_pays(self, model_config: Esm2Config) -> bool:
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        # By what the CPU is, so that all ranks and every restart come to the same (docs/log.md).
        if torch.cpu._is_amx_tile_supported():
            return model_config.hidden_size >= 256  # narrower ones gain too little to give up FP32's exactness
        return model_config.hidden_size >= 480 and torch.cpu._is_avx512_bf16_supported()

    def prepare(self, model: torch.nn.Module) -> None:
        """Let the layers' matrix products run in FP8; embeddings, norms and the LM head stay as they are."""
        if self.fp8 and not self.te:
            matmul = torchao_linear(self.emulated)
            for module in model.modules():
                if hasattr(module, "matmul"):
                    module.matmul = matmul

    @contextmanager
    def forward(self, autocast: bool = False):
        """Around a forward pass; `autocast` where no strategy casts the parameters."""
        with ExitStack() as stack:
            if autocast and self.dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.fp8 and self.te:
                import transformer_engine.pytorch as te

                stack.enter_context(te.fp8_autocast(enabled=True, fp8_recipe=self.scaling))
            yield


def te_scaling(recipe: str, fp8_format: str, kwargs: dict):
    """TransformerEngine's recipe of that name."""
    import transformer_engine.common.recipe as recipes

    try:
        return getattr(recipes, recipe)(fp8_format=recipes.Format[fp8_format], **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"fp8_config.fp8_recipe_kwargs={kwargs} is not for {recipe}: {reason}") from error


def torchao_linear(emulated: bool):
    """A stand-in for `F.linear` that rounds input, weight and output gradient to FP8, one scale a tensor."""
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = Float8LinearConfig(emulate=emulated)
    products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    mm_config = LinearMMConfig(*(ScaledMMConfig(emulated, mm.use_fast_accum, False, False) for mm in products))

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = weight.to(x.dtype)
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), mm_config, config)
        return y if bias is None else y + bias.to(y.dtype)

    return linear
