# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every trainer, backend, layout and number format trains, saves and resumes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train_fsdp2
from build_model import sharded_parts
from common import RECIPE
from common.contract.running import TRAINERS, curve, metrics, run_here, run_ranks
from common.contract.test_final_model import opened
from common.contract.test_on_a_gpu import on_cpu
from common.distributed import Distributed
from tokens.backends import te_available
from tokens.context_parallel import ContextParallel
from tokens.formats import RECIPES


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
needs_te = pytest.mark.skipif(not te_available()[0], reason=str(te_available()[1]))
BACKENDS = ["torch", pytest.param("te", marks=needs_te)]
# Widths that every format's blocks divide, and enough tokens to be worth rounding.
SHAPE = (
    "model_kwargs.hidden_size=128", "model_kwargs.intermediate_size=256", "use_sequence_packing=true",
    "precision=bf16", "deterministic=true",
)  # fmt: skip


def fits(recipe):
    """Whether this GPU has the format."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return RECIPES[recipe].runs_on(capability)


def formats():
    """Recipe and backend, for all that this GPU has."""
    for name, needs in RECIPES.items():
        section, key = f"fp{needs.bits}_config", f"fp{needs.bits}_recipe"
        there = pytest.mark.skipif(not fits(name), reason=f"needs {needs.hardware}")
        options = (f"{section}.enabled=true", f"{section}.{key}={name}")
        yield pytest.param((*options, "layer_backend=te"), id=f"te-{name}", marks=[needs_te, there])
        if needs.torchao:
            yield pytest.param((*options, "layer_backend=torch"), id=f"torchao-{name}", marks=there)


def saves(path, *more):
    switch = "checkpoint.allow_pickled_scales=true"  # for delayed scaling
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=3", switch, *more]


@pytest.fixture(scope="module")
def bf16_losses(tmp_path_factory):
    return metrics(
        run_here("train_ddp", tmp_path_factory.mktemp("bf16"), *SHAPE, "layer_backend=torch"), "train", "loss"
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_packed_in_fp32_the_curve_is_the_cpus(trainer, tmp_path):
    options = ("layer_backend=torch", "use_sequence_packing=true")
    gpu, cpu = run_here(trainer, tmp_path / "gpu", *options), on_cpu(tmp_path / "cpu", *options)
    assert curve(gpu) == pytest.approx(curve(cpu), rel=1e-3)


@needs_te
@pytest.mark.parametrize("layout", ["true", "false"], ids=["packed", "padded"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_in_fp32_te_follows_the_curve(trainer, layout, tmp_path):
    options = (*SHAPE, "precision=fp32", f"use_sequence_packing={layout}")
    plain, te = (run_here(trainer, tmp_path / name, *options, f"layer_backend={name}") for name in ("torch", "te"))
    # Its activation may be another form (GELU's tanh), and some of its products are TF32's.
    assert metrics(te, "train", "loss") == pytest.approx(metrics(plain, "train", "loss"), rel=0.005)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_final_model_opens(backend, tmp_path):
    saved = saves(tmp_path, "checkpoint.save_final_model=true")
    run_here("train_fsdp2", tmp_path, *SHAPE, f"layer_backend={backend}", *saved)
    assert opened(tmp_path / "final_model", tmp_path).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_parallels_hooks_on_one_gpu(backend, bf16_losses, tmp_path, monkeypatch):
    """A group of one exchanges with itself: what two GPUs do, but for the sending."""
    alone = lambda distributed, key, size: replace(distributed, group=dist.group.WORLD)  # noqa: E731
    monkeypatch.setattr(Distributed, "in_groups", alone)
    exchanged = []
    way = ContextParallel.tokens_to_heads
    monkeypatch.setattr(ContextParallel, "tokens_to_heads", lambda self, x: exchanged.append(x.shape) or way(self, x))
    path = run_here("train_ddp", tmp_path, *SHAPE, f"layer_backend={backend}")
    assert metrics(path, "train", "loss") == pytest.approx(bf16_losses, rel=0.01)
    assert len(exchanged) >= 2 * 6 * 4  # layers, steps, micro-batches


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["true", "false"], ids=["packed", "padded"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_in_bf16_all_are_near(trainer, layout, backend, bf16_losses, tmp_path):
    path = run_here(trainer, tmp_path, *SHAPE, f"layer_backend={backend}", f"use_sequence_packing={layout}")
    assert metrics(path, "train", "loss") == pytest.approx(bf16_losses, rel=0.01)


@pytest.mark.parametrize("options", formats())
@pytest.mark.parametrize("trainer", TRAINERS)
def test_few_bits_train_save_and_go_on(trainer, options, bf16_losses, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = run_here(trainer, whole, *SHAPE, *options, *saves(whole))
    assert metrics(straight, "train", "loss") == pytest.approx(bf16_losses, rel=0.03)
    run_here(trainer, parts, *SHAPE, *options, *saves(parts, "num_train_steps=3"))
    run_here(trainer, parts, *SHAPE, *options, *saves(parts, "checkpoint.save_final_model=true"))
    assert curve(parts) == pytest.approx(curve(straight), rel=1e-6)
    saved = load_file(parts / "final_model" / "model.safetensors")
    assert not any("_extra_state" in name for name in saved)
    assert {str(x.dtype) for x in saved.values()} == {"torch.float32"}


@pytest.mark.parametrize("options", formats())
def test_few_bits_in_some_layers_recomputed(options, bf16_losses, tmp_path, monkeypatch):
    layers = f"{options[0][:3]}_layers=[1]"
    calls = {}
    build = train_fsdp2.build_model

    def counted(*args):
        model = build(*args)
        for i, layer in enumerate(sharded_parts(model)[:-1]):
            layer.self_attention.proj.register_forward_pre_hook(
                lambda *_, i=i: calls.update({i: calls.get(i, 0) + torch.is_grad_enabled()})
            )
        return model

    monkeypatch.setattr(train_fsdp2, "build_model", counted)
    path = run_here("train_fsdp2", tmp_path, *SHAPE, *options, layers, "use_activation_checkpointing=true")
    assert calls == dict.fromkeys(range(2), 2 * 6 * 4)  # steps and micro-batches, each computed twice
    assert metrics(path, "train", "loss") == pytest.approx(bf16_losses, rel=0.03)


@pytest.mark.parametrize("options", formats())
def test_statistics_of_rounding(options, tmp_path):
    asked = ("quant_stats_config.enabled=true", "quant_stats_config.every_n_steps=2")
    path = run_here("train_ddp", tmp_path, *SHAPE, *options, *asked)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "quantization"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert len(line["tensors"]) == 2 * 4 * 3
        assert all(1e-6 < one["mse"] < 0.1 and 0 <= one["underflow"] < 0.5 for one in line["tensors"].values())
    done = subprocess.run([sys.executable, RECIPE / "plot_metrics.py", path], capture_output=True, text=True)
    assert done.returncode == 0 and (path / "quantization.png").exists(), done.stderr


@needs_te
def test_one_checkpoint_for_both_backends(tmp_path):
    run_here("train_ddp", tmp_path / "log", *SHAPE, "layer_backend=te", *saves(tmp_path, "num_train_steps=3"))
    run_here("train_fsdp2", tmp_path / "log", *SHAPE, "layer_backend=torch", *saves(tmp_path))
    whole = run_here("train_ddp", tmp_path / "whole", *SHAPE, "layer_backend=torch")
    assert metrics(tmp_path / "log", "train", "loss") == pytest.approx(metrics(whole, "train", "loss"), rel=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpus_checkpoint_goes_on_on_a_cpu(backend, tmp_path):
    options = (*SHAPE[:-2], "checkpoint.allow_config_change=true")
    run_here(
        "train_fsdp2", tmp_path / "log", *options, f"layer_backend={backend}", *saves(tmp_path, "num_train_steps=3")
    )
    on_cpu(tmp_path / "log", *options, "layer_backend=auto", *saves(tmp_path))
    whole = on_cpu(tmp_path / "whole", *options, "layer_backend=torch")
    assert metrics(tmp_path / "log", "train", "loss") == pytest.approx(metrics(whole, "train", "loss"), rel=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["use_torch_compile=true", "checkpoint.async_save=true"])
def test_with_other_options(option, backend, bf16_losses, tmp_path):
    path = run_here("train_fsdp2", tmp_path, *SHAPE, f"layer_backend={backend}", option, *saves(tmp_path))
    assert metrics(path, "train", "loss") == pytest.approx(bf16_losses, rel=0.01)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("cp_size", [1, 2])
def test_two_gpus(cp_size, trainer, backend, bf16_losses, tmp_path):
    assert "RANK" not in os.environ
    path = run_ranks(trainer, 2, tmp_path, *SHAPE, f"layer_backend={backend}", f"cp_size={cp_size}")
    assert metrics(path, "train", "loss") == pytest.approx(bf16_losses, rel=0.01)
