# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of a model's weights, which is validated and exported in their place.

It lives beside the parameters, split over the ranks as they are, under any strategy.
"""

from collections.abc import Collection
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from common.distributed import own_part, unwrapped
from common.step_folder import copy_offsets, has_own_offsets


class EMA:
    """The average of each trained parameter over the updates; without a `decay` it does nothing and holds nothing.

    Update n has the weight 1 - min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten: as in
    torch_ema and TensorFlow's ExponentialMovingAverage. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        self.decay, self.num_updates = decay, 0
        self.averages: dict[str, Tensor] = {}
        if decay is None:
            return
        for name, parameter in unwrapped(model).named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype in (torch.float32, torch.float64), f"{name} is {parameter.dtype}"  # the masters
                average = parameter.detach().clone()
                if has_own_offsets(parameter):
                    copy_offsets(average, parameter._local_tensor)
                self.averages[name] = average

    @property
    def enabled(self) -> bool:
        return self.decay is not None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights that a step of the optimizer has left; the device is not waited for."""
        if not self.enabled:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, weights = zip(*self._pairs(model), strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module):
        """The model has the averaged weights in the block, and its own, to the bit, after it."""
        if not self.enabled:
            yield
            return
        drop_gathered(model)
        swapped = []
        try:
            for pair in self._pairs(model):
                swap(*pair)
                swapped.append(pair)
            install(model)
            yield
        finally:
            for pair in swapped:
                swap(*pair)
            install(model)
            drop_gathered(model)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the parameters' names, to be saved and read into; DTensors where the parameters are."""
        return self.averages

    def state_dict(self) -> dict:
        """What else a checkpoint keeps; empty if nothing is averaged."""
        return {"num_updates": self.num_updates, "decay": self.decay} if self.enabled else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict, model: nn.Module, new: Collection[str] = ()) -> list[str]:
        """Go on from there; averages that the checkpoint has not (`new`) begin at the weights that `model` has now.

        Returns what a reader of the log has to know.
        """
        if not self.enabled:
            return [
                "The averaged weights are dropped (ema_decay=null): the last ones are validated and exported."
            ] * bool(state)
        self.num_updates = state.get("num_updates", 0)
        for average, weight in self._pairs(model, new if state else self.averages):
            average.copy_(weight)
        return ["The weights' average begins here (ema_decay): the checkpoint has none."] * (not state)

    def _pairs(self, model: nn.Module, names: Collection[str] | None = None) -> list[tuple[Tensor, Tensor]]:
        """This rank's part of each average, or of some, and of its parameter."""
        parameters = dict(unwrapped(model).named_parameters())
        names = self.averages if names is None else names
        return [(own_part(self.averages[name]), own_part(parameters[name]).detach()) for name in names]


@torch.no_grad()
def swap(a: Tensor, b: Tensor) -> None:
    """Exchange the values of two tensors."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def drop_gathered(model: nn.Module) -> None:
    """Leave each rank with its own part of the parameters only, so that the next use gathers what it then is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):  # after a validation its root is still gathered
            module.reshard()
    if hasattr(model, "synchronize_param_gather"):  # Megatron-FSDP
        model.synchronize_param_gather()


def install(model: nn.Module) -> None:
    """Let what computes follow the FP32 weights; under Megatron-FSDP these are apart."""
    if hasattr(model, "install_optimized_model_weights"):
        model.install_optimized_model_weights()
