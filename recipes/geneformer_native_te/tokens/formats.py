# SPDX-License-Identifier: Apache-2.0
"""Number formats of 8 and 4 bits: the table, the sections `fp8_config` and `fp4_config`, and which layers take which.

TransformerEngine has all of them on the GPUs that they need. Without it torchao has two, on the GPUs that have the
products and emulated elsewhere: the same rounding, and no speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from tokens.torchao_formats import Arithmetic, torchao_float8, torchao_mxfp8


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

    def as_given(self, *keys: str) -> str:
        """The recipe's key and value as the user gave them, and those of the other `keys` that are set."""
        values = {key: self[key] for key in ("recipe", *keys)}
        return " with ".join(f"fp{self.bits}_config.fp{self.bits}_{k}={v}" for k, v in values.items() if v)

    def check(self) -> None:
        """Raise ValueError for what no hardware would make possible, enabled or not."""
        known = [name for name, needs in RECIPES.items() if needs.bits == self.bits]
        if self.recipe not in known:
            raise ValueError(f"{self.as_given()} must be one of {', '.join(known)}.")
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


# As a user writes layers: `[0, 2-5]`, `0,2-5` or 3; None where nothing is said.
Layers = Sequence[int | str] | str | int | None


def chosen_layers(key: str, asked: Layers, num_layers: int) -> set[int] | None:
    """`asked` as numbers, None if nothing is said. Raises ValueError for what is no layer."""
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


def layers_by_section(
    fp8: FP8, fp4: FP4, fp8_layers: Layers, fp4_layers: Layers, num_layers: int
) -> list[tuple[Section, list[int]]]:
    """The enabled sections with their layers: those that are named, else all that the other one does not name.

    Raises ValueError where sections and layers contradict each other.
    """
    sections = {8: fp8, 4: fp4}
    named = {8: chosen_layers("fp8_layers", fp8_layers, num_layers),
             4: chosen_layers("fp4_layers", fp4_layers, num_layers)}  # fmt: skip
    for bits, layers in named.items():
        sections[bits].check()
        if layers and not sections[bits].enabled:
            raise ValueError(f"fp{bits}_layers={ranges(layers)} needs fp{bits}_config.enabled=true.")
        if layers == set() and sections[bits].enabled:
            raise ValueError(
                f"fp{bits}_layers=[] names no layer; null takes all, and fp{bits}_config.enabled=false none."
            )
    if twice := (named[8] or set()) & (named[4] or set()):
        raise ValueError(f"fp8_layers and fp4_layers both name layer {min(twice)}; name it in one.")
    if fp8.enabled and fp4.enabled and named[8] is None and named[4] is None:
        raise ValueError(
            "fp8_config and fp4_config are both enabled; say with fp8_layers or fp4_layers which layers are which."
        )
    found = []
    for bits, layers in named.items():
        if sections[bits].enabled:
            if layers is None:
                layers = set(range(num_layers)) - (named[12 - bits] or set())
            found.append((sections[bits], sorted(layers)))
    return found
