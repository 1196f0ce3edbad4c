# SPDX-License-Identifier: Apache-2.0
"""Clipping, AdamW and the schedule, by the formulas of `reference.py`."""

import math

import numpy as np
import pytest
import reference
import torch

from common.gradients import clip_grad_norm_
from common.scheduler import adamw, linear_schedule


@pytest.mark.parametrize("max_norm", [1e-3, 3.0, 1e9])
def test_clipping_scales_all_gradients_by_their_common_norm(max_norm):
    random = torch.Generator().manual_seed(0)
    parameters = torch.nn.ParameterList(torch.zeros(shape) for shape in ((7, 5), (11,), (1, 3, 2)))
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=random)
    values = [value for parameter in parameters for value in parameter.grad.flatten().tolist()]
    expected = math.sqrt(math.fsum(value**2 for value in values))
    assert 3.0 < expected < 1e9
    assert float(clip_grad_norm_(parameters, max_norm)) == pytest.approx(expected, rel=1e-6)
    clipped = [value for parameter in parameters for value in parameter.grad.flatten().tolist()]
    # PyTorch divides by the norm plus 1e-6.
    assert clipped == pytest.approx([value * min(1.0, max_norm / expected) for value in values], rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_updates_by_hand(eps, weight_decay, fused):
    """Twelve updates of a few numbers with gradients of any size; in float64, so that only the formula counts."""
    random = np.random.default_rng(0)
    values, moments = random.normal(size=5).tolist(), [(0.0, 0.0)] * 5
    weight = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    options = {"lr": 0.05, "betas": [0.8, 0.95], "eps": eps, "weight_decay": weight_decay}
    optimizer = adamw(torch.nn.ParameterList([weight]), **options, fused=fused)
    for step in range(1, 13):
        gradient = (random.normal(size=5) * [1e-9, 1e-3, 0.1, 1, 100]).tolist()
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i in range(5):
            values[i], moments[i] = reference.adamw(values[i], gradient[i], moments[i], step, **options)
        assert weight.tolist() == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize(
    "warmup, total, decay_fraction, floor",
    [
        (3, 20, 0.9, 0.1),
        (0, 12, 0.5, 0.0),
        (1, 4, 1.0, 0.7),
        (2, 100, 0.29, 0.1),
    ],
)
def test_every_step_of_the_schedule(warmup, total, decay_fraction, floor):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = linear_schedule(
        optimizer, num_warmup_steps=warmup, num_training_steps=total, decay_fraction=decay_fraction,
        min_lr_fraction=floor,
    )  # fmt: skip
    end = round(decay_fraction * total)
    for step in range(1, total + 5):
        expected = reference.learning_rate(step, 0.3, warmup, end, floor)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        schedule.step()
