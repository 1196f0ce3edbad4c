# SPDX-License-Identifier: Apache-2.0
"""The trajectory belongs to (config, seed, data): not to strategy, ranks, accumulation, layout or workers."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM

from common.contract.running import TRAINERS, assert_same_weights, curve, metrics, run_here, run_ranks
from common.step_folder import read_weights


PACKED = "use_sequence_packing=true"
# Of options that each trainer runs alike, one trainer is tested; the rest is slow.
ONE_QUICK = [
    trainer if trainer == "train_fsdp2" else pytest.param(trainer, marks=pytest.mark.slow) for trainer in TRAINERS
]


@pytest.fixture(scope="module")
def reference_curve(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("reference")))


@pytest.mark.rotated
@pytest.mark.parametrize("options", [[PACKED], ["dataset.num_workers=2"]], ids=["packed", "workers"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_rank_gives_the_same_curve(trainer, options, reference_curve, tmp_path):
    assert curve(run_here(trainer, tmp_path, *options)) == pytest.approx(reference_curve, rel=1e-5)


# Quick are FSDP2 on two in the contract, all three on two in the small matrix of test_curve_matrix.py, and on two and
# four with dropout, where more has to be the same, in common/test_random_numbers.py.
@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "num_ranks"), [("train_ddp", 2), ("train_mfsdp", 2), ("train_fsdp2", 4)])
def test_more_ranks_give_the_same_curve(trainer, num_ranks, reference_curve, tmp_path):
    assert curve(run_ranks(trainer, num_ranks, tmp_path, PACKED)) == pytest.approx(reference_curve, rel=1e-5)


def saved(path, *options):
    return (f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=2", *options)


def assert_same_run(one, other, last=6):
    assert curve(one) == curve(other)
    assert_same_weights(one / f"step_{last}", other / f"step_{last}")


@pytest.mark.parametrize("trainer", ONE_QUICK)
def test_two_runs_are_the_same_to_the_bit(trainer, tmp_path):
    """What runs beside the training moves nothing."""
    plain, busy = tmp_path / "plain", tmp_path / "busy"
    beside = ("dataset.num_workers=2", "checkpoint.async_save=true", "deterministic=true")
    assert_same_run(run_here(trainer, plain, *saved(plain)), run_here(trainer, busy, *saved(busy, *beside)))


# For two threads.
WIDE_ENOUGH = (
    "model_kwargs.hidden_size=256", "model_kwargs.intermediate_size=1024", "model_kwargs.num_hidden_layers=1",
    "num_train_steps=2",
)  # fmt: skip


def test_two_runs_of_two_threads_are_the_same_to_the_bit(tmp_path):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [run_here("train_fsdp2", path, *saved(path, *WIDE_ENOUGH)) for path in (tmp_path / "1", tmp_path / "2")]
    finally:
        torch.set_num_threads(num_threads)
    assert json.loads((runs[0] / "run.json").read_text())["threads_per_rank"] == 2
    assert_same_run(*runs, last=2)


@pytest.mark.slow
def test_two_runs_on_two_ranks_of_two_threads_are_the_same_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    runs = [  # threads are counted at the start
        run_ranks("train_fsdp2", 2, path, *saved(path, *WIDE_ENOUGH), with_torchrun=True)
        for path in (tmp_path / "one", tmp_path / "two")
    ]
    assert_same_run(*runs, last=2)


CLIPPED = ("max_grad_norm=0.01", "num_train_steps=3")


@pytest.fixture(scope="module")
def clipped_curve(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("clipped"), *CLIPPED))


def test_clipping_bounds_the_update(clipped_curve, reference_curve):
    assert clipped_curve[:3] != pytest.approx(reference_curve[:3], rel=1e-6)


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_every_strategy_clips_alike(trainer, clipped_curve, tmp_path):
    assert curve(run_here(trainer, tmp_path, *CLIPPED)) == pytest.approx(clipped_curve, rel=1e-5)


@pytest.mark.rotated
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_hugging_faces_own_model_follows_the_same_curve(trainer, layout, reference_curve, tmp_path):
    path = run_here(trainer, tmp_path, "model_tag=facebook/esm2_t6_8M_UR50D", *layout)
    assert curve(path) == pytest.approx(reference_curve, rel=2e-4)


@pytest.mark.rotated
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_activation_checkpointing_changes_nothing(trainer, layout, reference_curve, tmp_path):
    path = run_here(trainer, tmp_path, "use_activation_checkpointing=true", *layout)
    assert curve(path) == pytest.approx(reference_curve, rel=1e-5)


# Where `cpp` can be had, it is what `auto` has taken for the reference.
@pytest.mark.rotated
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_backends_follow_one_curve(trainer, layout, backend, reference_curve, tmp_path):
    path = run_here(trainer, tmp_path, f"layer_backend={backend}", *layout)
    assert curve(path) == pytest.approx(reference_curve, rel=1e-5)


@pytest.mark.rotated
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
def test_bf16_stays_near_fp32(trainer, layout, reference_curve, tmp_path):
    losses = metrics(run_here(trainer, tmp_path, "precision=bf16", *layout), "train", "loss")
    assert losses == pytest.approx(reference_curve[: len(losses)], rel=5e-3)
    assert losses != reference_curve[: len(losses)]


WIDE = ("model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=96")  # what MXFP8 needs
LOW = {
    "FP8": ("fp8_config.enabled=true",),
    "MXFP8": ("fp8_config.enabled=true", "fp8_config.fp8_recipe=MXFP8BlockScaling"),
    "one layer": ("fp8_config.enabled=true", "fp8_layers=[1]"),
}


@pytest.fixture(scope="module")
def wide_losses(tmp_path_factory):
    return metrics(run_here("train_ddp", tmp_path_factory.mktemp("wide"), *WIDE), "train", "loss")


QUICK = [("FP8", "padded"), ("MXFP8", "packed"), ("one layer", "packed")]
PAIRS = [
    pytest.param(
        options, [PACKED] if layout == "packed" else [], id=f"{name}-{layout}",
        marks=[] if (name, layout) in QUICK else [pytest.mark.slow],
    )
    for name, options in LOW.items() for layout in ("padded", "packed")
]  # fmt: skip


@pytest.mark.rotated
@pytest.mark.parametrize(("options", "layout"), PAIRS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_few_bits_stay_near_fp32_and_say_that_they_are_emulated(
    trainer, options, layout, wide_losses, tmp_path, capsys
):
    losses = metrics(run_here(trainer, tmp_path, *WIDE, *options, *layout), "train", "loss")
    assert losses == pytest.approx(wide_losses, rel=2e-2)
    assert losses != pytest.approx(wide_losses, rel=1e-6)
    message = capsys.readouterr().err
    assert "emulated" in message and ("in layers 1 by" if options == LOW["one layer"] else "in all layers") in message


@pytest.mark.rotated
@pytest.mark.parametrize(
    "options", [pytest.param(LOW[name], id=name, marks=[pytest.mark.slow] if name != "FP8" else []) for name in LOW]
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_few_bits_packed_to_the_final_model(trainer, options, tmp_path):
    """Stopped and gone on with it is the same to the bit, and plain transformers opens what it comes to."""
    options = (*WIDE, PACKED, *options)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here(trainer, whole, *saved(whole, *options))
    shutil.copytree(whole / "step_4", cut / "step_4")
    shutil.copy(whole / "metrics.jsonl", cut)
    run_here(trainer, cut, *saved(cut, *options, "checkpoint.save_final_model=true"))
    assert_same_run(cut, whole)
    model = AutoModelForMaskedLM.from_pretrained(cut / "final_model")
    assert type(model).__module__.startswith("transformers.") and model.dtype == torch.float32
    own, theirs = read_weights(whole / "step_6"), dict(model.named_parameters())
    assert torch.equal(
        own["esm.encoder.layer.1.layernorm_mlp.fc2_weight"], theirs["esm.encoder.layer.1.output.dense.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
@pytest.mark.parametrize("trainer", ["train_ddp", "train_fsdp2"])
def test_compiled_layers_give_the_same_curve(trainer, layout, reference_curve, tmp_path):
    path = run_here(trainer, tmp_path, "use_torch_compile=true", *layout)
    assert curve(path) == pytest.approx(reference_curve, rel=1e-4)


def test_real_proteins(real_proteins, tmp_path):
    path = run_here(
        "train_fsdp2", tmp_path, f"dataset.load_dataset_kwargs.data_files={real_proteins}", PACKED,
        "dataset.micro_batch_size=null", "dataset.token_micro_batch_size=1024", "dataset.max_seq_length=512",
        "num_train_steps=12", "adamw_kwargs.lr=0.005",
    )  # fmt: skip
    losses, fill = metrics(path, "train", "loss"), metrics(path, "train", "fill")
    assert losses[-1] < 3.0 < losses[0]
    assert min(fill) == 1.0  # a packed batch has no padding at all
