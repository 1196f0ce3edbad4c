# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped goes on as if it had not been, under the same strategy or another."""

import shutil

import pytest

from common.contract.running import EVERY, LAST, TRAINERS, assert_same_weights, curve, run_here, run_ranks, saving_to


@pytest.mark.parametrize("trainer", TRAINERS)
def test_stop_and_go_equals_straight_through_to_the_bit(trainer, straight, tmp_path):
    """Killed before its last checkpoint was there; `metrics.jsonl` has lines beyond the one before."""
    whole, newest = straight(trainer), f"step_{LAST - EVERY}"
    shutil.copytree(whole / newest, tmp_path / newest)
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    assert curve(run_here(trainer, tmp_path, *saving_to(tmp_path, LAST))) == curve(whole)
    assert_same_weights(tmp_path / f"step_{LAST}", whole / f"step_{LAST}")


def test_strategies_go_on_from_each_others_checkpoints(straight, tmp_path):
    """Saved on two ranks, resumed on one, and so on through all trainers."""
    whole, (first, *others) = straight(TRAINERS[0]), [*TRAINERS, *TRAINERS][: LAST // EVERY]
    run_ranks(first, 2, tmp_path, *saving_to(tmp_path, EVERY))
    for i, trainer in enumerate(others, 2):
        run_here(trainer, tmp_path, *saving_to(tmp_path, EVERY * i))
    assert curve(tmp_path) == pytest.approx(curve(whole), rel=1e-5)
    assert_same_weights(tmp_path / f"step_{LAST}", whole / f"step_{LAST}", rtol=1e-4, atol=1e-6)
