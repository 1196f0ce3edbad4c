# SPDX-License-Identifier: Apache-2.0
"""The trajectory belongs to (config, seed, data): not to the strategy, nor to the number of ranks."""

import pytest

from common.contract.running import TRAINERS, curve, metrics, run_here, run_ranks


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return curve(run_here(TRAINERS[0], tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_one_rank_gives_the_same_curve(trainer, reference, tmp_path):
    assert curve(run_here(trainer, tmp_path)) == pytest.approx(reference, rel=1e-5)


def test_two_ranks_give_the_same_curve(reference, tmp_path):
    trainer = "train_fsdp2" if "train_fsdp2" in TRAINERS else TRAINERS[-1]
    assert curve(run_ranks(trainer, 2, tmp_path, with_torchrun=True)) == pytest.approx(reference, rel=1e-5)


def test_another_seed_gives_another_curve(reference, tmp_path):
    losses = metrics(run_here(TRAINERS[0], tmp_path, "seed=1", "num_train_steps=2"), "train", "loss")
    assert losses != pytest.approx(reference[: len(losses)], rel=1e-3)
