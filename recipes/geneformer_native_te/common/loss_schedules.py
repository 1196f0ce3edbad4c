# SPDX-License-Identifier: Apache-2.0
"""Coefficients of the terms of a loss that change while training, e.g. from forces first to energies.

    energy: {kind: linear, start: 1.0, end: 10.0, first: 0, last: 1000}
    forces: {kind: sigmoid, start: 100.0, end: 1.0, first: 5, last: 20, by: epoch}
    stress: {kind: step, values: [0.0, 0.1, 1.0], at: [1000, 5000]}
    charge: {kind: constant, value: 0.5}

Steps are counted from 1 and epochs from 0, as in `metrics.jsonl`.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from omegaconf import DictConfig, OmegaConf
from pydantic import AllowInfNan, NonNegativeInt, PositiveFloat, PositiveInt

from common.type_hints import as_text, misfit


Coefficient = Annotated[float, Ge(0), AllowInfNan(False)]
Unit = Literal["step", "epoch"]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Always `value`."""

    value: Coefficient
    by: Unit = "step"

    def mistake(self) -> str | None:
        """What is wrong with these values together, if anything."""

    def at_count(self, count: int) -> float:
        """The coefficient at this step, or in this epoch."""
        return float(self.value)

    def turns(self) -> list[int]:
        """Where it may become 0, which it then is for a while."""
        return []


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`start` up to the step or epoch `first`, `end` from `last` on, and straight between."""

    start: Coefficient
    end: Coefficient
    last: PositiveInt
    first: NonNegativeInt = 0
    by: Unit = "step"

    def mistake(self) -> str | None:
        return None if self.first < self.last else f"last={self.last} must be above first={self.first}"

    def at_count(self, count: int) -> float:
        passed = min(max(count - self.first, 0), self.last - self.first) / (self.last - self.first)
        if passed == 1:
            return float(self.end)
        value = self.start + self.share(passed) * (self.end - self.start)
        return float(min(value, self.end) if self.start < self.end else max(value, self.end))  # rounding may overshoot

    def turns(self) -> list[int]:
        return [self.last]

    def share(self, passed: float) -> float:
        """How much of the way from `start` to `end` is done when `passed` of the time is."""
        return passed


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Linear):
    """As linear, but slow at both ends: a logistic curve of this steepness, stretched to meet `start` and `end`."""

    steepness: PositiveFloat = 10.0

    def share(self, passed: float) -> float:
        # The logistic function is a tanh, and that is odd to the last bit: so 0 at the start and 1 at the end.
        return (1 + math.tanh(self.steepness / 2 * (passed - 0.5)) / math.tanh(self.steepness / 4)) / 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """The first of `values`, the next one from `at[0]` on, and so forth."""

    values: Annotated[list[Coefficient], MinLen(1)]
    at: list[PositiveInt]
    by: Unit = "step"

    def mistake(self) -> str | None:
        if len(self.values) != len(self.at) + 1:
            return f"values={self.values} must be one more than at={self.at}"
        if any(a >= b for a, b in pairwise(self.at)):
            return f"at={self.at} must be in ascending order"
        return None

    def at_count(self, count: int) -> float:
        return float(self.values[bisect_right(self.at, count)])

    def turns(self) -> list[int]:
        return self.at


KINDS = {"constant": Constant, "linear": Linear, "sigmoid": Sigmoid, "step": Step}


class LossSchedules:
    """The coefficients of a run; `schedules` are as in the example above, by the loss term's name.

    They depend on the step and the epoch alone, so a resumed run goes on with them. Raises ValueError for a mistake.
    """

    def __init__(self, schedules: Mapping[str, Mapping] | None, key: str = "loss_schedules"):
        if isinstance(schedules, DictConfig):
            schedules = OmegaConf.to_container(schedules, resolve=True)
        if sentence := misfit(key, schedules, dict | None):
            raise ValueError(sentence)
        self.key = key
        self.schedules = {name: parsed(f"{key}.{name}", values) for name, values in (schedules or {}).items()}

    def coefficients(self, step: int, epoch: int) -> dict[str, float]:
        """What each term is multiplied by in this step, which is made in this epoch."""
        return {
            name: schedule.at_count(step if schedule.by == "step" else epoch)
            for name, schedule in self.schedules.items()
        }

    def check_some_left(self, fixed: Mapping[str, float], last_step: int) -> None:
        """Raise ValueError if at some step all are 0; `fixed` are those that no schedule names.

        Not checked where some go by steps and others by epochs.
        """
        units = {schedule.by for schedule in self.schedules.values()}
        if len(units) != 1:
            return
        unit, turns = units.pop(), [n for schedule in self.schedules.values() for n in schedule.turns()]
        first, last = (0, max(turns, default=0)) if unit == "epoch" else (1, last_step)
        for count in sorted({first, *(n for n in turns if first <= n <= last)}):
            if not any((dict(fixed) | self.coefficients(count, count)).values()):
                raise ValueError(f"{self.key}: all weights of the loss are 0 at {unit} {count}.")

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the schedules, with every value that was not given."""
        kinds = {kind: name for name, kind in KINDS.items()}
        return {name: {"kind": kinds[type(one)], **asdict(one)} for name, one in self.schedules.items()}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: step and epoch say all. A changed schedule is a changed key, which a resume compares."""


def parsed(key: str, values: object) -> Constant | Linear | Step:
    """One schedule. Raises ValueError with a sentence that names the key."""
    known = ", ".join(KINDS)
    if not isinstance(values, dict):
        raise ValueError(f"{key}={as_text(values)} must be a section with a kind, one of {known}.")
    if "kind" not in values:
        raise ValueError(f"{key}.kind is not set; it is one of {known}.")
    kind, others = values["kind"], {name: value for name, value in values.items() if name != "kind"}
    if kind not in list(KINDS):  # it may be a list itself
        raise ValueError(f"{key}.kind={as_text(kind)} must be one of {known}.")
    if sentence := misfit(key, others, KINDS[kind]):
        raise ValueError(sentence)
    schedule = KINDS[kind](**others)
    if wrong := schedule.mistake():
        raise ValueError(f"{key}.{wrong}.")
    return schedule
