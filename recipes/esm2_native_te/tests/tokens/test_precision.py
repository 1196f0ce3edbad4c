# SPDX-License-Identifier: Apache-2.0
"""Which sizes compute in BF16 on CPUs, and what few bits do to which layers."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from build_model import build_precision, model_config
from collator import MaskedLMCollator
from common.distributed import Distributed
from modeling_esm2 import Esm2Config, Esm2ForMaskedLM
from tokens import backends
from tokens.formats import FP8, RECIPES, chosen_layers, ranges
from tokens.layout import SELECTED_MULTIPLE
from tokens.low_precision import LowPrecision
from tokens.torchao_formats import linear_by


EMULATED = [name for name, needs in RECIPES.items() if needs.torchao]


@pytest.mark.parametrize(
    ("size", "avx512_bf16", "dtype"),
    [
        ("esm2_t4_1M", True, None),
        ("esm2_t6_8M_UR50D", True, torch.bfloat16),
        ("esm2_t33_650M_UR50D", False, None),
    ],
)
def test_auto_takes_what_is_faster_on_such_a_cpu(distributed, monkeypatch, size, avx512_bf16, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    sections = {"fp8_config": {}, "fp4_config": {}, "quant_stats_config": {}, "fp8_layers": None, "fp4_layers": None}
    shape = model_config(size, "torch")
    for precision, expected in (("auto", dtype), ("bf16", torch.bfloat16), ("fp32", None)):
        config = OmegaConf.create({"precision": precision, **sections})
        assert build_precision(config, shape, distributed).dtype == expected


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        (None, None), ([], set()), ([0, 2], {0, 2}), (["1-3", 5], {1, 2, 3, 5}), ("0-1,4", {0, 1, 4}), ("3", {3}),
        (0, {0}), (["2-2"], {2}),
    ],
)  # fmt: skip
def test_layers_as_a_user_writes_them(asked, layers):
    assert chosen_layers("fp8_layers", asked, 6) == layers


def test_layers_as_they_are_logged():
    assert ranges({0, 1, 2, 4, 6, 7}) == "0-2, 4, 6-7"
    assert ranges(set()) == ""


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}


def in_few_bits(recipe: str | None, **options) -> tuple[LowPrecision, Esm2ForMaskedLM]:
    torch.manual_seed(0)
    config = Esm2Config(**SHAPE, layer_backend="torch")
    section = FP8(enabled=True, fp8_recipe=recipe) if recipe else FP8()
    widths = {key: SHAPE[key] for key in ("hidden_size", "intermediate_size")}
    chosen = LowPrecision(torch.device("cpu"), "fp32", "torch", 4, widths, True, section, **options)
    model = Esm2ForMaskedLM(config)
    chosen.prepare(model.esm.encoder.layer)
    return chosen, model


@pytest.mark.parametrize("recipe", EMULATED)
def test_only_the_chosen_layers_change(recipe):
    chosen, model = in_few_bits(recipe, fp8_layers=["1-2"])
    assert chosen.recipes == [None, recipe, recipe, None]
    assert chosen.layers == {recipe: "1-2"} and "layers 1-2" in chosen.notes[0]
    _, plain = in_few_bits(None)
    inputs = {"input_ids": torch.randint(4, 24, (1, 64))}
    states = [[], []]
    for one, seen in zip((model, plain), states, strict=True):
        for layer in one.esm.encoder.layer:
            layer.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].detach()))
        one(**inputs)
    same = [torch.equal(a, b) for a, b in zip(*states, strict=True)]
    assert same == [True, False, False, False]


def test_the_last_layers_rows_are_what_products_take():
    assert EMULATED and all(SELECTED_MULTIPLE % RECIPES[recipe].tokens == 0 for recipe in EMULATED)


@pytest.mark.parametrize("recipe", EMULATED)
def test_products_and_gradients_are_near(recipe):
    """Two formats' rounding: 2^-4 for E4M3, 2^-3 for the gradients' E5M2, averaged over long sums."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(64, 96), torch.randn(32, 96), torch.randn(64, 32)
    results = []
    for linear in (torch.nn.functional.linear, linear_by(RECIPES[recipe].torchao(True).product)):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = linear(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, grad)])
    for exact, found in zip(*results, strict=True):
        error = (found - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.1


@pytest.mark.parametrize("recipe", EMULATED)
def test_what_is_logged_of_rounding_is_so(recipe):
    round_trip = RECIPES[recipe].torchao(True).round_trip
    x = torch.randn(64, 64)
    rounded, scale, largest = round_trip(x, False)
    assert ((rounded - x).abs() <= x.abs() / 16 + 1e-3).all()
    assert (scale > 0).all() and scale.isfinite().all() and 0 < largest.float().mean() < 0.2
    tiny = torch.full((64, 64), 1e-9)
    tiny[0, 0] = 1.0
    rounded, _, _ = round_trip(tiny, False)
    assert (rounded[0, 1:32] == 0).all() and rounded[0, 0] == 1
    assert (rounded[32:] == 0).all() == (recipe == "Float8CurrentScaling")  # blocks have scales of their own


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("multiple", [16, 32, 128])
def test_padding_for_a_format_changes_neither_loss_nor_gradients(multiple, backend):
    random = np.random.default_rng(0)
    sample = {"items": [random.integers(4, 24, n) for n in (30, 7, 44, 1)], "name": (0, 0, 0)}  # 82 tokens
    results = []
    for each in (1, multiple):
        torch.manual_seed(0)
        model = Esm2ForMaskedLM(Esm2Config(**SHAPE, layer_backend=backend))
        batch = MaskedLMCollator(True, 0, 0.3, each)(sample)
        assert len(batch.inputs["input_ids"]) % each == 0
        loss = model(**batch.inputs, counts=batch.counts).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, padded in zip(*results, strict=True):
        assert (plain - padded).abs().max() <= 1e-6 * plain.abs().max() + 1e-9


def test_ranks_of_different_processors_take_what_all_have(distributed, monkeypatch):
    """Rank 1 has no compiler and no fast BF16."""
    other = {}
    monkeypatch.setattr(Distributed, "gather", lambda self, mine: [mine, other.get(type(mine), mine)])
    sections = {"fp8_config": {}, "fp4_config": {}, "quant_stats_config": {}, "fp8_layers": None, "fp4_layers": None}
    config = OmegaConf.create({"precision": "auto", **sections})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(backends, "cpp_available", lambda head_dim: (True, ""))
    shape = model_config("esm2_t6_8M_UR50D", "auto")
    found = build_precision(config, shape, distributed)
    assert (found.backend, found.dtype, found.notes) == ("cpp", torch.bfloat16, [])
    other |= {bool: False, tuple: ("torch", "The layers' kernels cannot be compiled (there is no C++ compiler).")}
    found = build_precision(config, shape, distributed)
    assert (found.backend, found.dtype, shape.layer_backend) == ("torch", None, "torch")
    assert found.notes[0].startswith("layer_backend: auto is PyTorch's on all ranks, because of rank 1. The layers'")
    assert found.notes[1] == "precision: auto is FP32 on all ranks, because BF16 is not faster on rank 1."
