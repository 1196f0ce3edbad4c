# SPDX-License-Identifier: Apache-2.0
"""The trajectory belongs to (config, seed, data): not to the strategy, nor to the number of ranks."""

import pytest

from common.contract.running import LAST, TRAINERS, curve, metrics, run_here, run_ranks


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_one_rank_gives_the_same_curve(trainer, straight):
    assert curve(straight(trainer)) == pytest.approx(curve(straight(TRAINERS[0])), rel=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_two_ranks_give_the_same_curve(trainer, straight, tmp_path):
    """Each adds up several micro-batches a step. One is started as users start it."""
    found = run_ranks(trainer, 2, tmp_path, f"num_train_steps={LAST}", with_torchrun=trainer == TRAINERS[1])
    assert curve(found) == pytest.approx(curve(straight(TRAINERS[0])), rel=1e-5)


def test_another_seed_gives_another_curve(straight, tmp_path):
    losses = metrics(run_here(TRAINERS[0], tmp_path, "seed=1", "num_train_steps=2"), "train", "loss")
    assert losses != pytest.approx(metrics(straight(TRAINERS[0]), "train", "loss")[: len(losses)], rel=1e-3)
