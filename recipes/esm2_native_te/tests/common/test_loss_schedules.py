# SPDX-License-Identifier: Apache-2.0
"""Coefficients are exact where a schedule begins and ends, never turn back, and a resume notices another schedule."""

import json
import math
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

from common.loss_schedules import LossSchedules


EVERY = {
    "energy": {"kind": "linear", "start": 1.0, "end": 10.0, "first": 0, "last": 1000, "by": "step"},
    "forces": {"kind": "sigmoid", "start": 100, "end": 1, "first": 5, "last": 20, "by": "epoch"},
    "stress": {"kind": "step", "values": [0, 0.1, 1], "at": [1000, 5000]},
    "charge": {"kind": "constant", "value": 0.5},
}


def along(schedule: dict, counts) -> list[float]:
    schedules = LossSchedules({"a": schedule})
    by_epoch = schedule.get("by") == "epoch"
    return [schedules.coefficients(*((-1, n) if by_epoch else (n, -1)))["a"] for n in counts]


def test_every_kind():
    schedules = LossSchedules(EVERY)
    assert schedules.coefficients(1, 0) == {"energy": 1.009, "forces": 100.0, "stress": 0.0, "charge": 0.5}
    assert schedules.coefficients(500, 20) == {"energy": 5.5, "forces": 1.0, "stress": 0.0, "charge": 0.5}
    assert schedules.coefficients(1000, 7)["energy"] == 10.0 and schedules.coefficients(10**9, 7)["energy"] == 10.0
    assert all(type(value) is float for value in schedules.coefficients(3, 3).values())
    assert LossSchedules(OmegaConf.create(EVERY)).state_dict() == schedules.state_dict()


def test_none():
    for empty in (None, {}):
        assert LossSchedules(empty).coefficients(1, 0) == {} == LossSchedules(empty).state_dict()


@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
@pytest.mark.parametrize("by", ["step", "epoch"])
@pytest.mark.parametrize(("start", "end"), [(1, 10), (10, 1), (0.1, 0.7), (0.7, 0.1), (1e-8, 1e6), (0.3, 0.3), (0, 1)])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 7), (3, 1003), (999, 1000)])
def test_exact_at_both_ends_and_never_back(kind, by, start, end, first, last):
    schedule = {"kind": kind, "by": by, "start": start, "end": end, "first": first, "last": last}
    values = along(schedule, range(max(0, first - 2), last + 3))
    assert along(schedule, (0, first)) == [start, start] and along(schedule, (last, last + 1, 10**12)) == [end] * 3
    low, high = sorted((start, end))
    assert all(low <= value <= high for value in values)
    assert all(a <= b if start <= end else a >= b for a, b in pairwise(values))


@pytest.mark.parametrize("steepness", [0.01, 1, 10.0, 400, 1e6])
def test_the_sigmoid_is_a_logistic_curve_stretched_to_its_ends(steepness):
    values = along({"kind": "sigmoid", "start": 2, "end": 6, "last": 100, "steepness": steepness}, range(101))
    assert values[0] == 2 and values[100] == 6 and values[50] == pytest.approx(4)
    assert all(a <= b for a, b in pairwise(values))
    for n, value in enumerate(values):
        assert value + values[100 - n] == pytest.approx(8)
        if steepness < 500:
            ends = [1 / (1 + math.exp(sign * steepness / 2)) for sign in (1, -1)]
            logistic = 1 / (1 + math.exp(-steepness * (n / 100 - 0.5)))
            assert value == pytest.approx(2 + 4 * (logistic - ends[0]) / (ends[1] - ends[0]), rel=1e-6)


def test_the_sigmoid_is_slower_than_the_line_at_its_ends():
    ends = {"start": 0, "end": 1, "last": 100}
    line, curve = (along({"kind": kind, **ends}, range(101)) for kind in ("linear", "sigmoid"))
    assert curve[10] < line[10] / 2 and curve[90] > 1 - line[10] / 2


@pytest.mark.parametrize(
    ("forces", "energy", "where"),
    [
        ({"kind": "constant", "value": 0}, 0, "step 1"),
        ({"kind": "linear", "start": 0, "end": 1, "first": 2, "last": 9}, 0, "step 1"),
        ({"kind": "linear", "start": 1, "end": 0, "last": 9}, 0, "step 9"),
        ({"kind": "step", "values": [1, 0, 1], "at": [4, 6]}, 0, "step 4"),
        ({"kind": "step", "values": [1, 0], "at": [4], "by": "epoch"}, 0, "epoch 4"),
        ({"kind": "step", "values": [1, 0, 1], "at": [4, 6]}, 1, None),
        ({"kind": "linear", "start": 0, "end": 1, "last": 9}, 0, None),
        ({"kind": "linear", "start": 1, "end": 0, "last": 11}, 0, None),  # after the end
        ({"kind": "constant", "value": 0}, {"kind": "linear", "start": 0, "end": 1, "last": 3, "by": "epoch"}, None),
    ],
)
def test_one_weight_at_least_is_left(forces, energy, where):
    both = LossSchedules({"forces": forces} | ({"energy": energy} if energy and energy != 1 else {}))
    if where is None:
        both.check_some_left({"forces": 1.0, "energy": energy}, 10)
    else:
        with pytest.raises(ValueError, match=f"loss_schedules: all weights of the loss are 0 at {where}"):
            both.check_some_left({"forces": 1.0, "energy": energy}, 10)


def test_steps_hold_from_where_they_are_named():
    schedule = {"kind": "step", "values": [5, 3, 4], "at": [2, 10]}
    assert along(schedule, (0, 1, 2, 3, 9, 10, 11, 10**9)) == [5, 5, 3, 3, 3, 4, 4, 4]
    assert along({**schedule, "by": "epoch"}, (1, 2)) == [5, 3]
    assert along({"kind": "step", "values": [5], "at": []}, (0, 7)) == [5, 5]


def linear(**values) -> dict:
    return {"kind": "linear", "start": 1, "end": 2, "last": 10, **values}


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (3, "loss_schedules.a=3 must be a section with a kind, one of constant, linear, sigmoid, step."),
        (None, "loss_schedules.a=null must be a section with a kind, one of constant, linear, sigmoid, step."),
        ({"start": 1}, "loss_schedules.a.kind is not set; it is one of constant, linear, sigmoid, step."),
        ({"kind": "cosine"}, "loss_schedules.a.kind=cosine must be one of constant, linear, sigmoid, step."),
        ({"kind": ["step"]}, "loss_schedules.a.kind=['step'] must be one of constant, linear, sigmoid, step."),
        ({"kind": "linear", "start": 1, "end": 2}, "loss_schedules.a.last is not set; loss_schedules.a needs it."),
        (linear(start="low"), "loss_schedules.a.start=low must be a finite number of at least 0."),
        (linear(end=-1), "loss_schedules.a.end=-1 must be a finite number of at least 0."),
        (linear(end=math.inf), "loss_schedules.a.end=inf must be a finite number of at least 0."),
        (linear(end=math.nan), "loss_schedules.a.end=nan must be a finite number of at least 0."),
        (linear(last=1.5), "loss_schedules.a.last=1.5 must be a whole number above 0."),
        (linear(first=-1), "loss_schedules.a.first=-1 must be a whole number of at least 0."),
        (linear(first=10), "loss_schedules.a.last=10 must be above first=10."),
        (linear(by="batch"), "loss_schedules.a.by=batch must be one of step, epoch."),
        (linear(slope=1), "Unknown key loss_schedules.a.slope: known are loss_schedules.a.start, "),
        (linear(steepness=1), "Unknown key loss_schedules.a.steepness: known are "),
        (linear(kind="sigmoid", steepness=0), "loss_schedules.a.steepness=0 must be a number above 0."),
        ({"kind": "constant", "value": None}, "loss_schedules.a.value=null must be a finite number of at least 0."),
        ({"kind": "step", "values": [1, "x"], "at": [1]},
         "loss_schedules.a.values[1]=x must be a finite number of at least 0."),
        ({"kind": "step", "values": [1, 2], "at": [0]}, "loss_schedules.a.at[0]=0 must be a whole number above 0."),
        ({"kind": "step", "values": [1, 2], "at": [1, 2]},
         "loss_schedules.a.values=[1, 2] must be one more than at=[1, 2]."),
        ({"kind": "step", "values": [1, 2, 3], "at": [5, 5]},
         "loss_schedules.a.at=[5, 5] must be in ascending order."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(schedule, sentence):
    with pytest.raises(ValueError) as mistake:
        LossSchedules({"a": schedule})
    assert str(mistake.value).startswith(sentence)
    assert "\n" not in str(mistake.value)


def test_schedules_are_a_section():
    with pytest.raises(ValueError, match=r"^loss_schedules=3 must be a section of keys or null\.$"):
        LossSchedules(3)


def test_a_checkpoint_keeps_them_with_every_value_that_was_not_given():
    saved = json.loads(json.dumps(LossSchedules(EVERY).state_dict()))
    spelled_out = {**EVERY, "charge": {"by": "step", "kind": "constant", "value": 0.5}}  # a default that is said
    assert LossSchedules(dict(reversed(spelled_out.items()))).state_dict() == saved
    assert LossSchedules(saved).coefficients(7, 3) == LossSchedules(EVERY).coefficients(7, 3)
    assert LossSchedules(None).state_dict() == {}
