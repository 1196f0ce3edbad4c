# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped goes on as if it had not been, under the same strategy or another."""

import pytest
import torch

from common.contract.running import TRAINERS, curve, run_here, run_ranks
from common.step_folder import read_weights


def save_to(path, *more):
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=3", *more]


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_stop_and_go_equals_straight_through_to_the_bit(trainer, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here(trainer, whole, *save_to(whole)))
    run_here(trainer, parts, *save_to(parts), "num_train_steps=3")
    # The validation at the end of the shorter run is at a step that the longer one validates too.
    assert curve(run_here(trainer, parts, *save_to(parts))) == straight
    assert_same(read_weights(whole / "step_6"), read_weights(parts / "step_6"))


def test_strategies_go_on_from_each_others_checkpoints(tmp_path):
    """Saved on two ranks, resumed on one, and so on through all trainers."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    last = 3 * len(TRAINERS)
    straight = curve(run_here(TRAINERS[0], whole, *save_to(whole), f"num_train_steps={last}"))
    run_ranks(TRAINERS[0], 2, parts, *save_to(parts), "num_train_steps=3")
    for i, trainer in enumerate(TRAINERS[1:], 2):
        run_here(trainer, parts, *save_to(parts), f"num_train_steps={3 * i}")
    assert curve(parts) == pytest.approx(straight, rel=1e-5)
    ours, theirs = (read_weights(path / f"step_{last}") for path in (whole, parts))
    assert_same(ours, theirs, rtol=1e-4, atol=1e-6)
