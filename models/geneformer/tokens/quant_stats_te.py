# SPDX-License-Identifier: Apache-2.0
"""The numbers of `quant_stats.py` from TransformerEngine's layers; importing this imports its debugging interface.

Written for TransformerEngine 2.20 and nvdlfw-inspect 0.2.2. What differs from the plain layers' numbers: tensors of
all ranks count, `saturation` is known for delayed scaling alone, and `scale` (not known for `Float8BlockScaling` and
`NVFP4BlockScaling`) is between the smallest and the largest.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import nvdlfw_inspect.api as debug_api
import torch
from nvdlfw_inspect.logging import BaseLogger


TENSORS = {"activation": "input", "weight": "weight", "gradient": "gradient"}


def features(recipes: Sequence[str | None], every_n_steps: int) -> dict:
    """What TransformerEngine is to log of layers of these recipes, as its debugging interface takes it."""
    asked = {}
    for recipe in sorted({recipe for recipe in recipes if recipe}):
        layers = "|".join(str(i) for i, one in enumerate(recipes) if one == recipe)
        stats = ["underflows%", "mse"]
        if recipe not in ("NVFP4BlockScaling", "Float8BlockScaling"):  # the latter's have padding that nobody fills
            stats += ["scale_inv_min", "scale_inv_max"]
        if recipe == "DelayedScaling":
            stats += ["fp8_delayed_scaling_overflows%"]
        feature = "LogNvfp4TensorStats" if recipe == "NVFP4BlockScaling" else "LogFp8TensorStats"
        common = {"enabled": True, "tensors": list(TENSORS), "freq": every_n_steps, "start_step": 0}
        asked[recipe] = {
            "enabled": True,
            "layers": {"layer_name_regex_pattern": rf"^({layers})\."},
            "transformer_engine": {
                feature: common | {"stats": stats},
                "LogTensorStats": common | {"stats": ["mean", "std"]},  # errors are given over the mean square
            },
        }
    return asked


class Inspector(BaseLogger):
    """Takes what TransformerEngine logs; to be made before the layers are."""

    def __init__(self, recipes: Sequence[str | None], every_n_steps: int):
        self.logged: dict[str, dict[str, float]] = {}
        self.step = 0
        self.folder = TemporaryDirectory(prefix="quant_stats_")  # for a log of its own that nobody needs
        where = Path(find_spec("transformer_engine.debug.features").origin).parent
        self.close()  # that of a run before in this process, or what layers built before have set
        debug_api.initialize(features(recipes, every_n_steps), [str(where)], self, self.folder.name)

    def close(self) -> None:
        """TransformerEngine takes note of nothing any more, and builds layers as if it never had."""
        debug_api.end_debug()
        if state := sys.modules.get("transformer_engine.debug.pytorch.debug_state"):
            state.TEDebugState.debug_enabled = None

    def name_modules(self, layers: Sequence[torch.nn.Module]) -> None:
        """Give each module of the layers the name that it is logged by, as in `0.layernorm_mlp`."""
        for i, layer in enumerate(layers):
            for name, module in layer.named_modules(prefix=str(i)):
                module.name = name

    def log_scalar(self, name: str, value: float, iteration: int, **kwargs) -> None:
        """One number; called by TransformerEngine."""
        product, tensor, stat = re.fullmatch(r"(.+)_(activation|weight|gradient)_(.+)", name).groups()
        self.logged.setdefault(f"{product}.{TENSORS[tensor]}", {})[stat.removeprefix("nvfp4_")] = float(value)

    def begin(self, step: int) -> None:
        """The step that comes."""
        self.step = step
        debug_api.initialize_training_step(step)

    @contextmanager
    def paused(self):
        """Take note of nothing in the block."""
        debug_api.initialize_training_step(-1)  # before the first one
        yield
        debug_api.initialize_training_step(self.step)

    def take(self) -> dict | None:
        """As in `quant_stats.py`; all ranks call it."""
        debug_api.step()
        logged, self.logged = self.logged, {}
        return {name: translated(one) for name, one in logged.items() if "mse" in one} or None


def translated(one: dict[str, float]) -> dict[str, float | None]:
    """TransformerEngine's numbers of a tensor as ours."""
    square = one["std"] ** 2 + one["mean"] ** 2
    overflow = one.get("fp8_delayed_scaling_overflows%")
    inverse = one.get("scale_inv_min", 0.0) * one.get("scale_inv_max", 0.0)
    return {
        "underflow": one["underflows%"] / 100,
        "saturation": None if overflow is None else overflow / 100,
        "scale": inverse**-0.5 if 0 < inverse < float("inf") else None,
        "mse": one["mse"] / square if square else 0.0,
    }
