# SPDX-License-Identifier: Apache-2.0
"""The optimizer and the learning-rate schedule; what a model was published with, its configuration says."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Annotated, Required, TypedDict

from annotated_types import Ge, Le
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.nn import Module, Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.distributed import unwrapped
from common.muon import muon_first


Fraction = Annotated[float, Ge(0), Le(1)]


class ParameterGroup(TypedDict, total=False):
    """Parameters that train in another way, by patterns of their full names, as `*.bias` or `esm.embeddings.*`."""

    names: Required[str | list[str]]
    lr_factor: PositiveFloat  # their learning rate is so many times the others'
    weight_decay: NonNegativeFloat
    frozen: bool
    muon: bool  # their matrices move by Muon, the rest by AdamW


class Schedule(LambdaLR):
    """A schedule of which a checkpoint keeps the place alone: peak and shape are what the configuration says now."""

    num_warmup_steps = 0

    def note(self, last_step: int) -> str | None:
        """A sentence for the log where the run ends before the warm-up does."""
        if self.num_warmup_steps < last_step:
            return None
        return (
            f"The warm-up of lr_scheduler_kwargs.num_warmup_steps={self.num_warmup_steps} steps does not end within "
            f"num_train_steps={last_step}, so the learning rate stays below its peak; a tenth of the run is usual."
        )

    def see(self, validation: dict) -> None:
        """Take what the last validation found; of those here `Plateau` alone goes by it."""

    def state_dict(self) -> dict:
        """How many steps were made."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict) -> None:
        """Go on after so many steps."""
        self.last_epoch = state["last_epoch"]
        self._step_count = self.last_epoch + 1
        fractions = [fraction(self.last_epoch) for fraction in self.lr_lambdas]
        rates = [peak * fraction for peak, fraction in zip(self.base_lrs, fractions, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates

    def get_last_lr(self) -> list[float]:
        """The rate of what no group names."""
        return [self.optimizer.defaults["lr"] * self.lr_lambdas[0](self.last_epoch)]


class Plateau(Schedule):
    """Warm-up, then the peak, times `factor` whenever `metric` was not better for `patience` validations in a row.

    Better is at least a ten-thousandth less, so that rounding decides nothing. What it has seen is in a checkpoint.
    """

    def __init__(
        self, optimizer: Optimizer, num_warmup_steps: int, metric: str, factor: float, patience: int, least: float
    ):
        self.metric, self.factor, self.patience, self.least = metric, factor, patience, least
        self.fraction, self.best, self.waited = 1.0, None, 0
        super().__init__(optimizer, lambda step: self.fraction * min(1.0, (step + 1) / max(num_warmup_steps, 1)))
        self.num_warmup_steps = num_warmup_steps

    def see(self, validation: dict) -> None:
        """Raises ValueError for a validation that has no such metric."""
        if validation.get("step") != self.last_epoch:  # it was seen when it was new
            return
        if self.metric not in validation:
            raise ValueError(f"lr_scheduler_kwargs.metric={self.metric} is not in the validation's results.")
        value = validation[self.metric]
        better = math.isfinite(value) and (self.best is None or value < (1 - 1e-4) * self.best)
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        if self.waited >= self.patience:
            self.fraction, self.waited = max(self.least, self.fraction * self.factor), 0
            self.load_state_dict(self.state_dict())  # the rate of the next step

    def state_dict(self) -> dict:
        """Steps, and what the validations said."""
        return super().state_dict() | {name: getattr(self, name) for name in ("fraction", "best", "waited")}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; a checkpoint of another schedule has seen no validation."""
        self.fraction, self.best = state.get("fraction", 1.0), state.get("best")
        self.waited = state.get("waited", 0)
        super().load_state_dict(state)


def in_groups(model: Module, groups: list[ParameterGroup] | None) -> list[tuple[dict, list[Parameter]]]:
    """What no group names, and then each group, with its parameters; the first that fits a name has it.

    Raises ValueError for a pattern that fits no name, and for Muon where there is no matrix.
    """
    found: list[tuple[dict, list[Parameter]]] = [({}, []), *((dict(group), []) for group in groups or [])]
    patterns = [
        [group["names"]] if isinstance(group["names"], str) else list(group["names"]) for group, _ in found[1:]
    ]
    parameters = dict(unwrapped(model).named_parameters())
    for pattern in (pattern for some in patterns for pattern in some):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            known = ", ".join([*parameters][:: max(1, len(parameters) // 4)][:5])
            raise ValueError(f"adamw_kwargs.groups: no parameter is named {pattern}; some names are {known}.")
    for name, parameter in parameters.items():
        fits = (i for i, some in enumerate(patterns, 1) if any(fnmatchcase(name, pattern) for pattern in some))
        found[next(fits, 0)][1].append(parameter)
    for group, some in found:
        if group.get("muon") and not any(parameter.ndim == 2 for parameter in some):
            raise ValueError(f"adamw_kwargs.groups: muon moves matrices, and none is left for names={group['names']}.")
    return found


def freeze(model: Module, groups: list[ParameterGroup] | None = None, **_) -> None:
    """Let the groups that are `frozen` train no more; the further arguments are `adamw`'s.

    Raises ValueError if nothing would train.
    """
    for group, parameters in in_groups(model, groups):
        if group.get("frozen"):
            for parameter in parameters:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("adamw_kwargs.groups freeze all parameters; leave some to train.")


def adamw(
    model: Module,
    *,
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    fused: bool = True,
    groups: list[ParameterGroup] | None = None,
) -> AdamW:
    """AdamW over what is not frozen, with Muon for matrices of groups that say so; moments have the parameters' type.

    Raises ValueError unless there are two betas of at least 0 and below 1.
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_kwargs.betas={betas} must be two numbers of at least 0 and below 1.")
    trained = []
    for group, parameters in in_groups(model, groups):
        own = {"lr": lr * group.get("lr_factor", 1), "weight_decay": group.get("weight_decay", weight_decay)}
        by_muon: dict[bool, list[Parameter]] = {False: [], True: []}
        for parameter in parameters:
            if parameter.requires_grad:
                by_muon[group.get("muon", False) and parameter.ndim == 2].append(parameter)
        trained += [{"params": some, "muon": muon, **own} for muon, some in by_muon.items() if some]
    optimizer = AdamW(trained, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=fused)
    optimizer.register_step_pre_hook(muon_first)
    return optimizer


def end_of_decay(num_warmup_steps: int, num_training_steps: int, decay_fraction: float) -> int:
    """The step at which it ends. Raises ValueError if the warm-up does not end before."""
    decay_end = round(decay_fraction * num_training_steps)
    if num_warmup_steps >= decay_end:
        raise ValueError(
            f"lr_scheduler_kwargs.num_warmup_steps={num_warmup_steps} must be less than {decay_end}, where the decay "
            f"ends (decay_fraction={decay_fraction} of num_training_steps={num_training_steps})."
        )
    return decay_end


def linear_schedule(
    optimizer: Optimizer,
    *,
    num_warmup_steps: NonNegativeInt,
    num_training_steps: PositiveInt,
    decay_fraction: PositiveFloat,
    min_lr_fraction: Fraction,
) -> Schedule:
    """Linear warm-up to the peak, linear decay to `min_lr_fraction` of it at `decay_fraction` of the run, then flat.

    Raises ValueError if the warm-up does not end before the decay does.
    """
    decay_end = end_of_decay(num_warmup_steps, num_training_steps, decay_fraction)

    def fraction_of_peak(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        done = min(1.0, (step - num_warmup_steps) / (decay_end - num_warmup_steps))
        return 1.0 - done * (1.0 - min_lr_fraction)

    return scheduled(optimizer, fraction_of_peak, num_warmup_steps)


def cosine_schedule(
    optimizer: Optimizer,
    *,
    num_warmup_steps: NonNegativeInt,
    num_training_steps: PositiveInt,
    decay_fraction: PositiveFloat,
    min_lr_fraction: Fraction,
) -> Schedule:
    """As `linear_schedule`, but the decay is half a cosine wave. Raises ValueError as there."""
    decay_end = end_of_decay(num_warmup_steps, num_training_steps, decay_fraction)

    def fraction_of_peak(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        done = min(1.0, (step - num_warmup_steps) / (decay_end - num_warmup_steps))
        return min_lr_fraction + (1.0 - min_lr_fraction) * (1.0 + math.cos(math.pi * done)) / 2

    return scheduled(optimizer, fraction_of_peak, num_warmup_steps)


def damped_cosine_schedule(
    optimizer: Optimizer,
    *,
    num_warmup_steps: NonNegativeInt,
    num_training_steps: PositiveInt,
    decay_fraction: PositiveFloat,
    min_lr_fraction: Fraction,
) -> Schedule:
    """As `linear_schedule`, but the warm-up begins at 0, and the decay is the line times half a cosine wave.

    Raises ValueError if the warm-up does not end before the decay does.
    """
    decay_end = end_of_decay(num_warmup_steps, num_training_steps, decay_fraction)

    def fraction_of_peak(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        done = min(1.0, (step - num_warmup_steps) / (decay_end - num_warmup_steps))
        line = 1.0 - done * (1.0 - min_lr_fraction)
        return min_lr_fraction + (1.0 - min_lr_fraction) * line * (1.0 + math.cos(math.pi * done)) / 2

    return scheduled(optimizer, fraction_of_peak, num_warmup_steps)


def scheduled(optimizer: Optimizer, fraction_of_peak: Callable[[int], float], num_warmup_steps: int) -> Schedule:
    """The schedule of these fractions, by steps made."""
    schedule = Schedule(optimizer, fraction_of_peak)
    schedule.num_warmup_steps = num_warmup_steps
    return schedule
