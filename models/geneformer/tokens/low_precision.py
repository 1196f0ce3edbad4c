# SPDX-License-Identifier: Apache-2.0
"""Matrix products of transformer layers in FP8, MXFP8 or NVFP4, by TransformerEngine or torchao."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import lcm

import torch
from omegaconf import DictConfig

from common.distributed import Distributed
from common.precision import Precision, agreed_precision
from tokens.backends import agreed_layer_backend
from tokens.formats import FP4, FP8, RECIPES, Layers, Section, layers_by_section, ranges
from tokens.quant_stats import QuantStats
from tokens.te_formats import in_te_recipe, te_scaling
from tokens.torchao_formats import linear_by


class LowPrecision(Precision):
    """`Precision` with the products of each layer by `recipes`; `backend` of the layers is te, cpp or torch.

    `widths` are the layers' sizes by their keys in the config, and `notes` come first in the log. Raises ValueError
    for a format that this machine, backend or model does not have.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        backend: str,
        num_layers: int,
        widths: Mapping[str, int],
        bf16_pays: bool,
        fp8: FP8 | None = None,
        fp4: FP4 | None = None,
        fp8_layers: Layers = None,
        fp4_layers: Layers = None,
        stats: QuantStats | None = None,
        notes: Iterable[str] = (),
    ):
        super().__init__(device, precision, bf16_pays)
        self.backend, self.te = backend, backend == "te"
        if backend == "cpp":
            from tokens.layers_cpp import layer_product

            self.product = layer_product
        self.notes.extend(notes)
        self.recipes: list[str | None] = [None] * num_layers
        self.scalings: dict[str, object] = {}
        self.emulated, self.stats = False, stats or QuantStats()
        sections = layers_by_section(fp8 or FP8(), fp4 or FP4(), fp8_layers, fp4_layers, num_layers)
        for section, layers in sections:
            self._use(section, layers, widths)
            self.layers[section.recipe] = ranges(set(layers))
        if self.stats.enabled and not self.low:
            raise ValueError(
                "quant_stats_config.enabled=true needs fp8_config.enabled=true or fp4_config.enabled=true."
            )
        if self.stats.enabled and self.te:
            self.stats.inspect_te(self.recipes)

    def _use(self, section: Section, layers: list[int], widths: Mapping[str, int]) -> None:
        """Take a section's recipe for these layers, if it can be had."""
        name, needs = section.recipe, RECIPES[section.recipe]
        for key, width in widths.items():
            if width % needs.width:
                raise ValueError(f"{section.as_given()} needs widths that divide by {needs.width}, not {key}={width}.")
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)
        on_hardware = needs.runs_on(capability)
        if self.te and not on_hardware:
            there = ", ".join(key for key, other in RECIPES.items() if other.runs_on(capability)) or "none of them"
            gpu = torch.cuda.get_device_name(self.device)
            raise ValueError(f"{section.as_given()} needs {needs.hardware}; this is {gpu}, which has {there}.")
        if on_hardware and self.dtype is None and self.backend in needs.rounds_bf16:
            raise ValueError(f"{section.as_given()} takes BF16 numbers on GPUs; precision=bf16 gives them.")
        if self.te:
            self.scalings[name] = te_scaling(section)
            if name == "DelayedScaling":
                self.notes.append(
                    "DelayedScaling's scales are pickles of TransformerEngine: to resume from a checkpoint, which a "
                    "scheduler may do by itself, needs checkpoint.allow_pickled_scales=true."
                )
        elif not needs.torchao or section["format"] not in (None, needs.torchao_format) or section["recipe_kwargs"]:
            there = ", ".join(f"{key} ({other.torchao_format})" for key, other in RECIPES.items() if other.torchao)
            raise ValueError(
                f"{section.as_given('format', 'recipe_kwargs')} needs TransformerEngine's layers; without them there "
                f"are {there}, with no further arguments."
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

    def prepare(self, layers: Sequence[torch.nn.Module]) -> None:
        """Let each layer's matrix products run in its format; what is outside of them stays as it is."""
        if not self.low:
            return
        if self.stats.inspector:
            self.stats.inspector.name_modules(layers)
        for i, (layer, recipe) in enumerate(zip(layers, self.recipes, strict=True)):
            if self.te:
                if recipe != self._outer_recipe:
                    layer.forward = in_te_recipe(layer, self.scalings.get(recipe))
            elif recipe:
                arithmetic = self.scalings[recipe]
                for name, module in layer.named_modules():
                    if hasattr(module, "matmul"):
                        product = linear_by(arithmetic.product)
                        if self.stats.enabled:
                            product = self.stats.watched(f"{i}.{name}", module, product, arithmetic.round_trip)
                        if isinstance(module.matmul, torch.nn.Module):  # LoRA's, whose own products stay as they are
                            module.matmul.product = product
                        else:
                            module.matmul = product

    @contextmanager
    def forward(self, autocast: bool = False):
        """As in `Precision`, and in the layers' recipe."""
        with ExitStack() as stack:
            stack.enter_context(super().forward(autocast))
            if self.low and self.te:
                import transformer_engine.pytorch as te

                # At the outermost end TransformerEngine brings its scales up to date. Layers of another recipe have
                # theirs inside; not all do, because after each the next module counts as first, and updates too.
                stack.enter_context(te.autocast(enabled=True, recipe=self.scalings[self._outer_recipe]))
            yield


def build_precision(config: DictConfig, shape, distributed: Distributed) -> LowPrecision:
    """How the run computes, the same on all ranks, by the keys `precision`, `fp8_*`, `fp4_*`, `quant_stats_config`.

    `shape` is the model's configuration; where no fast kernels can be had for `layer_backend: auto`, it says so after.
    """
    asked, head_dim = shape.layer_backend, shape.head_dim
    backend, note = asked, None
    if asked != "transformers":  # Hugging Face's own layers
        backend, note = agreed_layer_backend(distributed, asked, head_dim)
        shape.layer_backend = backend if asked == "auto" and backend == "torch" else asked
    # On CPUs narrower models gain too little to give up FP32's exactness.
    bits, bits_note = agreed_precision(distributed, config.precision, bf16_pays=shape.hidden_size >= 256)
    return LowPrecision(
        distributed.device, bits, backend, shape.num_hidden_layers,
        {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size},
        shape.hidden_size >= 256,
        FP8(**config.fp8_config), FP4(**config.fp4_config), config.fp8_layers, config.fp4_layers,
        QuantStats(**config.quant_stats_config), filter(None, (note, bits_note)),
    )  # fmt: skip


def check_together(config: DictConfig) -> None:
    """Raise ValueError for layouts and number formats that cannot be together, on any hardware."""
    if config.cp_size > 1 and not config.use_sequence_packing:
        raise ValueError(f"cp_size={config.cp_size} needs use_sequence_packing=true.")
    for section in (FP8(**config.fp8_config), FP4(**config.fp4_config)):
        attention = [key for key in ("fp8_dpa", "fp8_mha") if (section["recipe_kwargs"] or {}).get(key)]
        if section.enabled and config.cp_size > 1 and attention:
            raise ValueError(
                f"{section.as_given('recipe_kwargs')} cannot be combined with cp_size={config.cp_size}, which "
                f"exchanges attention's inputs in BF16; leave {attention[0]} out."
            )
        if section.enabled and config.use_torch_compile and section.recipe == "DelayedScaling":
            raise ValueError(
                f"{section.as_given()} cannot be combined with use_torch_compile=true: TransformerEngine does not "
                "compile it; Float8CurrentScaling can be."
            )
    if config.quant_stats_config.enabled and config.use_torch_compile:
        raise ValueError("quant_stats_config.enabled=true does not work with use_torch_compile=true; leave one out.")
