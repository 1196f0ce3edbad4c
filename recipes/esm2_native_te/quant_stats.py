# SPDX-License-Identifier: Apache-2.0
"""What rounding to few bits does to the layers' tensors: lines in `metrics.jsonl`, from which `plot_metrics.py` draws.

For input, weight and output gradient of each matrix product that `precision.py` has replaced, on the first rank:

- `underflow`: the share of numbers that are not 0 and become 0
- `saturation`: the share that lands on the format's largest number
- `scale`: what numbers are multiplied by before they are rounded (the mean over blocks)
- `mse`: the mean squared error over the mean square
"""

from collections.abc import Callable
from functools import partial

import torch
from pydantic import PositiveInt
from torch import Tensor


class QuantStats:
    """The section `quant_stats_config`."""

    def __init__(self, *, enabled: bool = False, every_n_steps: PositiveInt = 10):
        self.enabled, self.every_n_steps = enabled, every_n_steps
        self.due = False
        self.found: dict[str, dict[str, list[Tensor]]] = {}

    def begin(self, step: int) -> None:
        """Look at the tensors of this step, if it is one to look at."""
        self.due, self.found = self.enabled and step % self.every_n_steps == 0, {}

    def watched(self, names: dict[torch.Size, str], linear: Callable, round_trip: Callable) -> Callable:
        """`linear` that takes note; `names` are those of the weights, by shape, `round_trip` as in `precision.py`."""

        def watching(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = linear(x, weight, bias)
            if self.due and torch.is_grad_enabled():
                name = names[weight.shape].removesuffix("weight").rstrip("._")
                self._note(f"{name}.input", x.detach(), round_trip, False)
                self._note(f"{name}.weight", weight.detach(), round_trip, False)
                if y.requires_grad:
                    y.register_hook(partial(self._note, f"{name}.gradient", round_trip=round_trip, is_gradient=True))
            return y

        return watching

    @torch.no_grad()
    def _note(self, name: str, x: Tensor, round_trip: Callable, is_gradient: bool) -> None:
        x = x.flatten(0, -2)
        rounded, scale, largest = round_trip(x, is_gradient)
        x, rounded = x.float(), rounded.float()
        values = {
            "underflow": ((x != 0) & (rounded == 0)).float().mean(),
            "saturation": largest.float().mean(),
            "scale": scale.float().mean(),
            "mse": (rounded - x).square().mean() / x.square().mean().clamp(min=torch.finfo(torch.float32).tiny),
        }
        for key, value in values.items():
            self.found.setdefault(name, {}).setdefault(key, []).append(value)

    def take(self) -> dict | None:
        """The means over the step's micro-batches, by tensor; None if this was no step to look at."""
        if not self.found:
            return None
        found, self.found = self.found, {}
        return {name: {key: torch.stack(values).mean().item() for key, values in one.items()}
                for name, one in found.items()}  # fmt: skip
