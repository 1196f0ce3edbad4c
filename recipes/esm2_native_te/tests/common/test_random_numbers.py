# SPDX-License-Identifier: Apache-2.0
"""What a model draws follows from the seed and the micro-batch: not from the rank, its past, or how often it drew."""

import json

import pytest
import torch

from common.contract.running import TRAINERS, curve, run_here, run_ranks
from common.random_numbers import seed_from, seed_micro_batch


DROPOUT = ("model_kwargs.hidden_dropout_prob=0.1", "use_sequence_packing=true", "layer_backend=torch")


@pytest.fixture(scope="module")
def reference_curve(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("dropout"), *DROPOUT))


QUICK = [("train_ddp", 2), ("train_mfsdp", 2), ("train_fsdp2", 4)]  # the resume below has FSDP2 on one rank


@pytest.mark.parametrize(
    ("trainer", "num_ranks"),
    [
        pytest.param(trainer, num_ranks, marks=[] if (trainer, num_ranks) in QUICK else [pytest.mark.slow])
        for trainer in TRAINERS
        for num_ranks in (1, 2, 4)
    ],
)
def test_one_curve_on_any_ranks(trainer, num_ranks, reference_curve, tmp_path):
    start = run_here if num_ranks == 1 else lambda trainer, *more: run_ranks(trainer, num_ranks, *more)
    assert curve(start(trainer, tmp_path, *DROPOUT)) == pytest.approx(reference_curve, rel=1e-5)


def test_dropout_is_on_and_belongs_to_the_seed(reference_curve, tmp_path):
    without = curve(run_here("train_ddp", tmp_path / "without", *DROPOUT[1:]))
    assert without != pytest.approx(reference_curve, rel=1e-3)


@pytest.mark.parametrize(
    "options", [("layer_backend=cpp",), ("use_activation_checkpointing=true",), ("use_sequence_packing=false",)]
)
def test_not_to_the_backend_recomputation_or_layout(options, reference_curve, tmp_path):
    assert curve(run_here("train_ddp", tmp_path, *DROPOUT, *options)) == pytest.approx(reference_curve, rel=1e-5)


@pytest.mark.parametrize(
    "trainer", [t if t == "train_fsdp2" else pytest.param(t, marks=pytest.mark.slow) for t in TRAINERS]
)
def test_after_a_resume_it_is_the_same_to_the_bit(trainer, reference_curve, tmp_path):
    whole = curve(run_here(trainer, tmp_path / "whole", *DROPOUT))
    assert whole == pytest.approx(reference_curve, rel=1e-5)
    saving = (f"checkpoint.ckpt_dir={tmp_path / 'cut'}", "checkpoint.save_every_n_steps=2")
    for last in (4, 6):
        run_here(trainer, tmp_path / "cut", *DROPOUT, *saving, f"num_train_steps={last}")
    # The cut run validates at its own end too, so its training steps are compared.
    assert curve(tmp_path / "cut")[:12] == whole[:12]


def test_a_step_computed_again_draws_the_same(tmp_path, monkeypatch):
    """Where only what is dropped decides whether a number is finite, the second look finds what the first did."""
    import modeling_esm2

    forward = modeling_esm2.LMHead.forward

    def fragile(self, x, embedding):  # no number if a certain draw comes up: one in sixteen forward passes or so
        return forward(self, x, embedding) / (torch.rand(()) > 0.06).float()

    monkeypatch.setattr(modeling_esm2.LMHead, "forward", fragile)
    run_here("train_ddp", tmp_path, *DROPOUT, "anomalies.on_nonfinite=skip", "num_train_steps=12",
             "validation.load_dataset_kwargs=null")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "anomalies.jsonl").read_text().splitlines()]
    assert lines and all(line["module"] == "lm_head" and line["what"] == "output" for line in lines)


def test_seeds_differ_by_every_part_of_the_key(monkeypatch):
    keys = [(seed, epoch, part) for seed in range(8) for epoch in range(8) for part in range(8)]
    assert len({seed_from(*key) for key in keys}) == len(keys)
    seed_micro_batch(1, (0, 0, 3))
    first = torch.rand(3)
    seed_micro_batch(1, (0, 0, 4))
    assert not torch.equal(torch.rand(3), first)
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    for part in (0, 1, 2):
        seed_micro_batch(1, (0, 0, 3), part)
        assert torch.equal(torch.rand(3), first)
    assert len({*seeds}) == 3  # what the last call for each part leaves is its own
