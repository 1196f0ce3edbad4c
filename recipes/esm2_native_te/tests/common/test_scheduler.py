# SPDX-License-Identifier: Apache-2.0
"""The optimizer and the schedule, with the numbers of ESM-2 (Lin et al. 2023, A.2.4) where a test gives none."""

import math

import pytest
import torch
from torch.nn import Parameter, ParameterList

from common import scheduler


ADAMW = {"lr": 4e-4, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
SCHEDULE = {
    "num_warmup_steps": 2000, "num_training_steps": 500_000, "decay_fraction": 0.9, "min_lr_fraction": 0.1,
}  # fmt: skip


AMPLIFY = SCHEDULE | {"num_warmup_steps": 1000, "num_training_steps": 1_000_000}


def adamw(parameters, **options):
    return scheduler.adamw(parameters, **ADAMW | options)


def linear_schedule(optimizer, **options):
    return scheduler.linear_schedule(optimizer, **SCHEDULE | options)


def parameter(**options) -> Parameter:
    return Parameter(torch.ones(3), **options)


def learning_rates(**kwargs):
    """The rate with which step 1, 2, ... is made, for any step at once."""
    optimizer = adamw(ParameterList([parameter()]))
    (fraction_of_peak,) = linear_schedule(optimizer, **kwargs).lr_lambdas
    return lambda step: optimizer.defaults["lr"] * fraction_of_peak(step - 1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 4e-4 / 2000),  # not 0: the first step is a step
        (2, 4e-4 / 1000),
        (1000, 2e-4),
        (2000, 4e-4),  # the peak
        (2001, 4e-4),
        (226_001, 2.2e-4),  # half-way down
        (450_001, 4e-5),  # a tenth at 90%
        (500_000, 4e-5),  # then flat
        (600_000, 4e-5),
    ],
)
def test_published_schedule(step, rate):
    assert learning_rates()(step) == pytest.approx(rate, rel=1e-9)


def test_just_before_the_end_of_the_decay():
    one_step = (4e-4 - 4e-5) / (450_000 - 2000)
    assert learning_rates()(450_000) == pytest.approx(4e-5 + one_step, rel=1e-9)


def test_it_rises_and_then_never_rises_again():
    rate = learning_rates(num_warmup_steps=10, num_training_steps=100)
    rates = [rate(step) for step in range(1, 121)]
    assert rates[:10] == sorted(rates[:10]) and rates[9] == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[90:] == [pytest.approx(4e-5)] * 30


def test_other_shapes():
    rate = learning_rates(num_warmup_steps=0, num_training_steps=100, decay_fraction=1.0, min_lr_fraction=0.0)
    assert [rate(step) for step in (1, 51, 101)] == [pytest.approx(x) for x in (4e-4, 2e-4, 0.0)]


def test_amplifys_cosine():
    """As their code has it: a line times half a cosine wave, above the floor."""
    (fraction,) = scheduler.damped_cosine_schedule(adamw(ParameterList([parameter()])), **AMPLIFY).lr_lambdas
    assert [fraction(s) for s in (0, 1, 500, 1000, 900_000, 999_999)] == pytest.approx([0, 0.001, 0.5, 1, 0.1, 0.1])
    w, end, r = 1000, 900_000, 0.1
    for s in (1001, 50_000, 450_500, 899_999):
        line = ((end - s) + r * (s - w)) / (end - w)
        expected = r + (1 - r) * line * (1 + math.cos(math.pi * (s - w) / (end - w))) / 2
        assert fraction(s) == pytest.approx(expected, rel=1e-12)
    stage_2 = AMPLIFY | {"num_warmup_steps": 0, "min_lr_fraction": 1.0}
    (constant,) = scheduler.damped_cosine_schedule(adamw(ParameterList([parameter()])), **stage_2).lr_lambdas
    assert {constant(s) for s in (0, 1, 700_000, 2_000_000)} == {1.0}


def test_cosine_with_hold():
    """As BioNeMo 2 trains Geneformer: up for 1%, half a cosine wave, and the last 5% at a hundredth of the peak."""
    options = {"num_warmup_steps": 10, "num_training_steps": 1000, "decay_fraction": 0.95, "min_lr_fraction": 0.01}
    (fraction,) = scheduler.cosine_schedule(adamw(ParameterList([parameter()])), **options).lr_lambdas
    middle = 0.01 + 0.99 / 2
    assert [fraction(s) for s in (0, 9, 10, 480, 950, 999)] == pytest.approx([0.1, 1, 1, middle, 0.01, 0.01])


def test_a_resumed_schedule_goes_on():
    def start():
        optimizer = adamw(ParameterList([parameter()]))
        return optimizer, linear_schedule(optimizer, num_warmup_steps=3, num_training_steps=20)

    def go_on(optimizer, schedule, steps):
        rates = []
        for _ in range(steps):
            rates += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        return rates

    whole = go_on(*start(), 20)
    (first, schedule), (second, resumed) = start(), start()
    assert go_on(first, schedule, 7) == whole[:7]
    resumed.load_state_dict(schedule.state_dict())
    second.load_state_dict(first.state_dict())
    assert go_on(second, resumed, 13) == whole[7:]


@pytest.mark.parametrize("warmup", [90, 91, 1000])
def test_a_warm_up_longer_than_the_schedule(warmup):
    with pytest.raises(ValueError) as error:
        linear_schedule(adamw(ParameterList([parameter()])), num_warmup_steps=warmup, num_training_steps=100)
    for part in (f"lr_scheduler_kwargs.num_warmup_steps={warmup}", "less than 90", "num_training_steps=100"):
        assert part in str(error.value)


def test_the_optimizer_has_what_is_trained():
    trained, frozen = parameter(), parameter(requires_grad=False)
    optimizer = adamw(ParameterList([trained, frozen]))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert group["params"] == [trained]
    expected = ADAMW | {"fused": True}
    assert {key: group[key] for key in expected} == expected


def test_one_step_by_hand():
    weight = Parameter(torch.tensor([1.0, 1.0]))
    weight.grad = torch.tensor([0.5, -2.0])
    optimizer = adamw(ParameterList([weight]), lr=0.1)
    optimizer.step()
    # Decoupled decay, then a step of lr against the gradient's sign: the first one has no other length.
    expected = 1.0 - 0.1 * 0.01 - 0.1 * weight.grad.sign()
    torch.testing.assert_close(weight.data, expected, rtol=1e-6, atol=1e-6)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.98, 0.99], [0.9, 1.0], [-0.1, 0.98], []])
def test_betas_that_are_none(betas):
    with pytest.raises(ValueError, match=r"adamw_kwargs\.betas=.* must be two numbers of at least 0 and below 1"):
        adamw(ParameterList([parameter()]), betas=betas)


def test_a_warm_up_that_outlasts_the_run_is_said():
    schedule = linear_schedule(adamw(ParameterList([parameter()])), num_warmup_steps=2000)
    sentence = schedule.note(3)
    assert "num_warmup_steps=2000" in sentence and "num_train_steps=3," in sentence
    assert schedule.note(2001) is None


def test_a_resume_goes_on_at_the_place_with_the_rates_of_now():
    optimizer = adamw(ParameterList([parameter()]), lr=1.0)
    schedule = linear_schedule(optimizer, num_warmup_steps=4, num_training_steps=100)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    changed = adamw(ParameterList([parameter()]), lr=1e-3)
    resumed = linear_schedule(changed, num_warmup_steps=6, num_training_steps=100)
    resumed.load_state_dict(state)
    assert resumed.get_last_lr() == [1e-3 * 3 / 6] == [changed.param_groups[0]["lr"]]
    changed.step()
    resumed.step()
    assert resumed.get_last_lr() == [1e-3 * 4 / 6]
