# SPDX-License-Identifier: Apache-2.0
"""What rounding to few bits does to the layers' tensors: lines in `metrics.jsonl`, from which `plot_metrics.py` draws.

For input, weight and output gradient of each matrix product that `low_precision.py` has replaced, on the first rank
(in the last layer, but for q, k and v, of labelled tokens only):

- `underflow`: the share of numbers that are not 0 and become 0
- `saturation`: the share that lands on the format's largest number
- `scale`: what numbers are multiplied by before they are rounded (the mean over blocks)
- `mse`: the mean squared error over the mean square

TransformerEngine's layers are looked into by its own means (`quant_stats_te.py`), over all ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
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
        self.inspector = None

    def inspect_te(self, recipes: Sequence[str | None]) -> None:
        """Let TransformerEngine take note in layers that are built from now on; `recipes` are theirs.

        Raises ValueError without the package that it needs for that.
        """
        try:
            from tokens.quant_stats_te import Inspector
        except ImportError as error:
            raise ValueError(
                "quant_stats_config.enabled=true with TransformerEngine's layers needs its debugging interface "
                f"({error}): pip install nvdlfw-inspect, or take layer_backend=torch."
            ) from error
        self.inspector = Inspector(recipes, self.every_n_steps)

    def begin(self, step: int) -> None:
        """Look at the tensors of this step, if it is one to look at."""
        self.due, self.found = self.enabled and step % self.every_n_steps == 0, {}
        if self.inspector:
            self.inspector.begin(step)

    @contextmanager
    def paused(self):
        """Look at nothing in the block."""
        due, self.due = self.due, False
        with self.inspector.paused() if self.inspector else nullcontext():
            yield
        self.due = due

    def watched(self, name: str, module: torch.nn.Module, linear: Callable, round_trip: Callable) -> Callable:
        """`linear` for this module's weights that takes note; `round_trip` as in `torchao_formats.Arithmetic`."""

        def watching(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = linear(x, weight, bias)
            if self.due:
                # Looked up now: strategies put other parameters into their places.
                key = next(key for key, p in module.named_parameters(recurse=False) if p is weight)
                product = f"{name}.{key}".removesuffix("weight").rstrip("._")
                self._note(f"{product}.input", x.detach(), round_trip, False)
                self._note(f"{product}.weight", weight.detach(), round_trip, False)
                if y.requires_grad:
                    noting = partial(self._note, f"{product}.gradient", round_trip=round_trip, is_gradient=True)
                    y.register_hook(noting)
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

    def close(self) -> None:
        """Look at nothing any more."""
        self.enabled = self.due = False
        if self.inspector:
            self.inspector.close()

    def take(self) -> dict | None:
        """The means over the step's micro-batches, by tensor; None if it was none to look at. All ranks call it."""
        if self.inspector:
            return self.inspector.take()
        if not self.found:
            return None
        found, self.found = self.found, {}
        keys = [(name, key) for name, one in found.items() for key in one]
        means = torch.stack([torch.stack(found[name][key]).mean() for name, key in keys]).tolist()  # one wait
        result: dict[str, dict[str, float]] = {}
        for (name, key), mean in zip(keys, means, strict=True):
            result.setdefault(name, {})[key] = mean
        return result
