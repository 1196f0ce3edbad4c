# SPDX-License-Identifier: Apache-2.0
"""The trajectory belongs to (config, seed, data): not to strategy, ranks, accumulation, layout or workers."""

import pytest
import torch
from transformers import AutoModelForMaskedLM

from common.contract.running import TRAINERS, curve, metrics, run_here, run_ranks
from common.step_folder import read_weights


PACKED = "use_sequence_packing=true"


@pytest.fixture(scope="module")
def reference_curve(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("reference")))


@pytest.mark.rotated
@pytest.mark.parametrize("options", [[], [PACKED], ["dataset.num_workers=2"]], ids=["padded", "packed", "workers"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_rank_gives_the_same_curve(trainer, options, reference_curve, tmp_path):
    assert curve(run_here(trainer, tmp_path, *options)) == pytest.approx(reference_curve, rel=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_ranks_give_the_same_curve(trainer, reference_curve, tmp_path):
    path = run_ranks(trainer, 2, tmp_path, PACKED, with_torchrun=True)
    assert curve(path) == pytest.approx(reference_curve, rel=1e-5)


def test_without_accumulation_the_curve_is_the_same(reference_curve, tmp_path):
    assert curve(run_ranks("train_fsdp2", 4, tmp_path)) == pytest.approx(reference_curve, rel=1e-5)


def test_another_seed_gives_another_curve(reference_curve, tmp_path):
    losses = metrics(run_here("train_ddp", tmp_path, "seed=1"), "train", "loss")
    assert losses != pytest.approx(reference_curve[: len(losses)], rel=1e-3)


def saved(path, *options):
    return (f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=2", *options)


def weights_of(path):
    return {name: tensor.numpy().tobytes() for name, tensor in read_weights(path / "step_6").items()}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_runs_are_the_same_to_the_bit(trainer, tmp_path):
    runs = [run_here(trainer, path, *saved(path)) for path in (tmp_path / "plain", tmp_path / "again")]
    path = tmp_path / "busy"  # what runs beside the training moves nothing
    runs.append(run_here(trainer, path, *saved(path, "dataset.num_workers=2", "checkpoint.async_save=true")))
    path = tmp_path / "switch"
    runs.append(run_here(trainer, path, *saved(path, "deterministic=true")))
    assert all(curve(run) == curve(runs[0]) for run in runs[1:])
    assert all(weights_of(run) == weights_of(runs[0]) for run in runs[1:])


def test_two_runs_on_two_ranks_of_two_threads_are_the_same_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    wide = ("model_kwargs.hidden_size=256", "model_kwargs.intermediate_size=1024")  # wide enough for both threads
    runs = [
        run_ranks("train_fsdp2", 2, path, *saved(path, *wide), with_torchrun=True)  # threads are counted at the start
        for path in (tmp_path / "one", tmp_path / "two")
    ]
    assert curve(runs[0]) == curve(runs[1])
    assert weights_of(runs[0]) == weights_of(runs[1])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_clipping_bounds_the_update(trainer, reference_curve, tmp_path):
    clipped = curve(run_here(trainer, tmp_path / "clipped", "max_grad_norm=0.01", "num_train_steps=3"))
    free = curve(run_here("train_ddp", tmp_path / "free", "max_grad_norm=0.01", "num_train_steps=3"))
    assert clipped == pytest.approx(free, rel=1e-5)
    assert clipped[:3] != pytest.approx(reference_curve[:3], rel=1e-6)


@pytest.mark.rotated
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_hugging_faces_own_model_follows_the_same_curve(trainer, layout, reference_curve, tmp_path):
    path = run_here(trainer, tmp_path, "model_tag=facebook/esm2_t6_8M_UR50D", *layout)
    assert curve(path) == pytest.approx(reference_curve, rel=2e-4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_activation_checkpointing_changes_nothing(trainer, reference_curve, tmp_path):
    path = run_here(trainer, tmp_path, "use_activation_checkpointing=true")
    assert curve(path) == pytest.approx(reference_curve, rel=1e-5)


@pytest.mark.rotated
@pytest.mark.parametrize("backend", ["torch", "cpp"])
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


@pytest.mark.rotated
@pytest.mark.parametrize("layout", [[], [PACKED]], ids=["padded", "packed"])
@pytest.mark.parametrize("options", LOW.values(), ids=LOW)
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
@pytest.mark.parametrize("options", LOW.values(), ids=LOW)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_few_bits_packed_to_the_final_model(trainer, options, tmp_path):
    """Stopped and gone on with it is the same to the bit, and plain transformers opens what it comes to."""
    options = (*WIDE, PACKED, *options, "lr_scheduler_kwargs.num_training_steps=6")
    whole = run_here(trainer, tmp_path / "whole", *saved(tmp_path / "whole", *options))
    for last in (4, 6):
        steps = (f"num_train_steps={last}", f"checkpoint.save_final_model={str(last == 6).lower()}")
        run_here(trainer, tmp_path / "cut", *saved(tmp_path / "cut", *options, *steps))
    assert curve(tmp_path / "cut")[:6] == curve(whole)[:6]
    assert weights_of(tmp_path / "cut") == weights_of(whole)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "cut" / "final_model")
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
