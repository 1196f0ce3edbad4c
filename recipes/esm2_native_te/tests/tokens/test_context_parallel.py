# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a micro-batch compute what one alone computes."""

import json
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist

from collator import MaskedLMCollator
from common.contract.ranks import call_on_ranks
from common.contract.running import TRAINERS, curve, metrics, run_here, run_ranks
from common.distributed import Distributed
from modeling_esm2 import Esm2Config, Esm2ForMaskedLM
from tokens.context_parallel import ContextParallel
from tokens.layout import select_tokens


PACKED = "use_sequence_packing=true"
LENGTHS = (97, 3, 1, 160, 20)  # 281: stretches begin and end within sequences


@pytest.fixture(scope="module")
def reference_curve(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("reference"), PACKED))


# ---- the curve


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)  # quick: with other options, and FSDP2 on four
def test_two_ranks_that_share_give_the_same_curve(trainer, reference_curve, tmp_path):
    assert curve(run_ranks(trainer, 2, tmp_path, PACKED, "cp_size=2")) == pytest.approx(reference_curve, rel=1e-5)


@pytest.mark.slow
def test_four_ranks_for_each(reference_curve, tmp_path):
    path = run_ranks("train_fsdp2", 4, tmp_path, PACKED, "cp_size=4")
    assert curve(path) == pytest.approx(reference_curve, rel=1e-5)
    assert json.loads((path / "run.json").read_text())["ranks_per_micro_batch"] == 4


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("train_mfsdp", ["layer_backend=torch", "model_kwargs.num_attention_heads=3"]),  # two heads here, one there
        (
            "train_ddp",
            [
                "use_activation_checkpointing=true",
                "dataset.micro_batch_size=null",
                "dataset.token_micro_batch_size=96",
            ],
        ),
    ],
    ids=["heads", "tokens"],
)
def test_with_other_options(trainer, options, tmp_path):
    alone = run_here("train_ddp", tmp_path / "alone", PACKED, *options)
    shared = run_ranks(trainer, 2, tmp_path / "shared", PACKED, "cp_size=2", *options)
    assert curve(shared) == pytest.approx(curve(alone), rel=1e-5)


def test_in_fp8_each_rank_scales_its_own_tokens(reference_curve, tmp_path):
    path = run_ranks("train_fsdp2", 2, tmp_path, PACKED, "cp_size=2", "fp8_config.enabled=true")
    losses = metrics(path, "train", "loss")
    assert losses == pytest.approx(reference_curve[: len(losses)], rel=2e-2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 2), (1, 1)),
        pytest.param((1, 1), (2, 2), marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_checkpoints_serve_with_and_without(before, after, reference_curve, tmp_path):
    saved = (PACKED, f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_every_n_steps=3")
    for (num_ranks, cp_size), steps in ((before, 3), (after, 6)):
        options = (
            *saved,
            f"cp_size={cp_size}",
            f"num_train_steps={steps}",
            "lr_scheduler_kwargs.num_training_steps=6",
        )
        run_ranks("train_fsdp2", num_ranks, tmp_path / "log", *options)
        assert json.loads((tmp_path / "log" / "run.json").read_text())["ranks_per_micro_batch"] == cp_size
    whole = run_here("train_ddp", tmp_path / "whole", PACKED, "lr_scheduler_kwargs.num_training_steps=6")
    assert curve(tmp_path / "log") == pytest.approx(curve(whole), rel=1e-5)


def test_a_step_that_is_no_number_is_reported_once(tmp_path):
    path = run_ranks("train_ddp", 2, tmp_path, PACKED, "cp_size=2", "adamw_kwargs.lr=1e30", "max_grad_norm=1e30",
                     "anomalies.on_nonfinite=skip")  # fmt: skip
    line = json.loads((path / "anomalies.jsonl").read_text().splitlines()[0])
    assert line["kind"] == "nonfinite"
    names = [tuple(one["name"]) for one in line["micro_batches"]]
    assert len(names) == len(set(names)) == 4
    assert all(one["num_labels"] > 0 and one["rank"] == 0 for one in line["micro_batches"])


# ---- loss, gradients, and what is exchanged


def make_batch(num_parts: int = 1, labelled: str = "everywhere", part: int = 0):
    """This part's batch of so many."""
    random = np.random.default_rng(0)
    lengths = [40, 50, 30] if labelled == "few tokens" else LENGTHS
    tokens = [random.integers(4, 24, n) for n in lengths]
    batch = MaskedLMCollator(True, 0, 0.15, num_parts, part, num_parts)({"items": tokens, "name": (0, 0, 0)})
    if labelled == "at the start":  # which is the first rank's
        batch.inputs["labels"][40:] = -100
        batch.counts["labels"] = int((batch.inputs["labels"] != -100).sum())
        own_labels = batch.inputs["labels"].chunk(num_parts)[part]
        batch.inputs["selected"] = torch.from_numpy(select_tokens(own_labels.numpy()))
    return batch


def make_model(num_heads: int) -> Esm2ForMaskedLM:
    torch.manual_seed(0)
    return Esm2ForMaskedLM(Esm2Config(num_hidden_layers=2, hidden_size=60, num_attention_heads=num_heads,
                                      intermediate_size=96))  # fmt: skip


CASES = {2: [(6, "everywhere"), (5, "at the start")],
         4: [(6, "everywhere"), (10, "at the start"), (6, "few tokens")]}  # fmt: skip
HEADS = {2: [3, 2], 4: [2, 1, 1, 1]}  # of five
TYPES = (torch.float32, torch.bfloat16)


def compute(distributed: Distributed) -> dict:
    """What these ranks find in all cases, so that they start once."""
    found = {case: loss_and_gradients(distributed, *case) for case in CASES[distributed.num_ranks]}
    return found | {dtype: exchange_there_and_back(distributed, dtype) for dtype in TYPES}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[int], list[dict]]:
    """For a number of ranks what each has found."""
    return cache(lambda num_ranks: call_on_ranks(tmp_path_factory.mktemp("ranks"), compute, num_ranks))


def loss_and_gradients(distributed: Distributed, num_heads: int, labelled: str) -> tuple[float, dict]:
    distributed = distributed.in_groups("cp_size", distributed.num_ranks)
    model, batch = make_model(num_heads), make_batch(distributed.num_ranks, labelled, distributed.group_rank)
    model.esm.context_parallel = ContextParallel(distributed.group)
    loss = model(**batch.inputs, counts=batch.counts).loss
    loss.backward()
    del batch.inputs["selected"]  # the model then finds the same tokens
    assert model(**batch.inputs, counts=batch.counts).loss.item() == loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return distributed.sum(loss.item())[0], {name: g.numpy() for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("num_ranks", "num_heads", "labelled"), [(num_ranks, *case) for num_ranks in CASES for case in CASES[num_ranks]]
)
def test_loss_and_gradients(num_ranks, num_heads, labelled, found):
    model, batch = make_model(num_heads), make_batch(1, labelled)
    model(**batch.inputs).loss.backward()
    expected = model(**batch.inputs).loss.item()
    for loss, gradients in (rank[num_heads, labelled] for rank in found(num_ranks)):
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, p in model.named_parameters():
            largest = p.grad.abs().max().item()
            assert np.abs(gradients[name] - p.grad.numpy()).max() <= 1e-5 * largest + 1e-9, name


def exchange_there_and_back(distributed: Distributed, dtype: torch.dtype) -> tuple:
    context_parallel = ContextParallel(distributed.in_groups("cp_size", distributed.num_ranks).group)
    whole = torch.arange(12 * 5 * 2).view(12, 5, 2).to(dtype)
    there = context_parallel.tokens_to_heads(context_parallel.part(whole))
    back = context_parallel.heads_to_tokens(there, 5)
    assert torch.equal(back, context_parallel.part(whole))
    first = sum(context_parallel.num_heads(5)[: context_parallel.rank])
    return torch.equal(there, whole[:, first : first + there.shape[1]]), there.shape[1]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("num_ranks", HEADS)
def test_heads_that_do_not_divide(num_ranks, dtype, found):
    assert [rank[dtype] for rank in found(num_ranks)] == [(True, share) for share in HEADS[num_ranks]]


def test_tokens_that_do_not_divide(distributed):
    context_parallel = ContextParallel(dist.group.WORLD)
    context_parallel.size = 2
    with pytest.raises(ValueError, match="281 tokens are not the same number on each of 2 ranks"):
        context_parallel.part(torch.zeros(281))
    for size in (2, 3):  # whether the ranks divide its rows or not
        context_parallel.size = size
        model, padded = make_model(6), torch.ones(4, 30, dtype=torch.long)
        model.esm.context_parallel = context_parallel
        for labels in ({}, {"labels": padded}):
            with pytest.raises(ValueError, match="Context parallelism takes packed batches only"):
                model(padded, **labels)
