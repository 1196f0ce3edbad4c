# SPDX-License-Identifier: Apache-2.0
"""Adapters beside the maps of a layer, whatever the layer: they add B A to the weight, and nothing else trains."""

import pytest
import torch

from modeling_esm2 import Esm2Config, Esm2ForMaskedLM
from tokens.layers import Form, PostNormLayer, attention_inputs
from tokens.lora import Adapted, add_adapters, add_after, first_value, is_adapter, joined, lora_settings, merged
from tokens.low_precision import LowPrecision


SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
TOKENS = torch.tensor([[0, 5, 9, 12, 7, 7, 30, 2]])
ALL = ["query", "key", "value", "dense"]


def models(targets, backend="torch", r=3):
    """One with adapters, and one with what they add in its weights."""
    torch.manual_seed(0)
    lora = lora_settings(r=r, lora_alpha=6, lora_dropout=0.0, target_modules=targets)
    config = Esm2Config(**SIZE, layer_backend=backend)
    adapted, plain = Esm2ForMaskedLM(config), Esm2ForMaskedLM(config)
    add_adapters(adapted, lora, backend)
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(dict(merged(adapted.state_dict(), lora, SIZE["num_attention_heads"])))
    return adapted.eval(), plain.eval()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("targets", [["query"], ["value", "query"], ["dense"], ["intermediate.dense"], ALL], ids=str)
def test_an_adapted_model_is_one_with_other_weights(targets, backend):
    adapted, plain = models(targets, backend)
    labels = torch.where(TOKENS == 7, TOKENS, -100)
    found, expected = (model(TOKENS, labels=labels) for model in (adapted, plain))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in adapted.state_dict() if is_adapter(name)}
    num_maps = len(lora_settings(r=1, lora_alpha=1, lora_dropout=0, target_modules=targets)["target_modules"])
    assert len(trained) == 2 * SIZE["num_hidden_layers"] * num_maps


@pytest.mark.parametrize("post_norm", [False, True], ids=["before", "behind"])
def test_a_hook_behind_a_module_adds_the_same(post_norm):
    """As behind TransformerEngine's, which have no `matmul`."""
    adapted, plain = models(["query", "value", "attention.output.dense"])
    if post_norm:
        for model in (adapted, plain):
            kept = model.esm.encoder.layer[0].self_attention
            layer = PostNormLayer(32, 48, 4, 1e-5, form=Form(post_norm=True)).self_attention
            layer.qkv.weight, layer.qkv.bias = kept.layernorm_qkv.weight, kept.layernorm_qkv.bias
            layer.proj = kept.proj
            if model is adapted:
                layer.qkv.matmul = kept.layernorm_qkv.matmul
            model.attention = layer
    else:
        for model in (adapted, plain):
            model.attention = model.esm.encoder.layer[0].self_attention
    for module in adapted.attention.modules():
        if isinstance(getattr(module, "matmul", None), Adapted):
            module.matmul.forward = torch.nn.functional.linear
            module.register_forward_hook(add_after)
    x_NE = torch.randn(1, 8, 32)
    inputs = attention_inputs(TOKENS, None, None, None, None, torch.ones(4))
    found, expected = (model.attention(x_NE, inputs) for model in (adapted, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_products_of_fewer_bits_are_those_of_the_weights_alone():
    adapted, _ = models(ALL)
    layers = adapted.esm.encoder.layer
    maps = [module for module in layers.modules() if isinstance(module, Adapted)]
    seen = []
    precision = LowPrecision(torch.device("cpu"), "fp32", "torch", 2, {}, False)
    precision.recipes = ["none"] * 2

    class Counting:
        @staticmethod
        def product(x, weight):
            seen.append(weight)
            return x @ weight.t()

    expected = adapted(TOKENS).logits
    precision.scalings = {"none": Counting}
    precision.prepare(layers)
    torch.testing.assert_close(adapted(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(maps) == 2 * 3 and len(seen) == 2 * 4  # the two of a feed-forward part are one module's
    assert {id(weight) for weight in seen} <= {id(weight) for weight in adapted.parameters()}


def test_queries_keys_and_values_have_the_rows_of_their_heads():
    torch.manual_seed(0)
    pairs = {name: (torch.randn(2, 8), torch.randn(8, 2)) for name in ("value", "query")}
    a_RI, b_OR = joined(pairs, num_heads=2)
    found = (b_OR @ a_RI).unflatten(0, (2, 3, 4))  # q, k and v of a head, then those of the next
    for place, name in enumerate(("query", "key", "value")):
        expected = pairs[name][1] @ pairs[name][0] if name in pairs else torch.zeros(8, 8)
        torch.testing.assert_close(found[:, place].flatten(0, 1), expected)


def test_the_first_values_are_pefts():
    a = first_value("layer.0.proj.matmul.proj.lora_A", torch.Size((8, 400)), 1)
    assert a.abs().max() <= 0.05 and a.std() == pytest.approx(0.05 / 3**0.5, rel=0.05)
    assert not first_value("layer.0.proj.matmul.proj.lora_B", torch.Size((400, 8)), 1).any()
    assert not torch.equal(a, first_value("layer.1.proj.matmul.proj.lora_A", torch.Size((8, 400)), 1))


def test_names_are_those_of_peft_and_ends_of_them():
    def chosen(*names):
        return lora_settings(r=2, lora_alpha=1, lora_dropout=0, target_modules=list(names))["target_modules"]

    assert chosen("value", "query") == ["query", "value"]
    assert chosen("output.dense") == ["proj", "fc2"] and chosen("dense") == ["proj", "fc1", "fc2"]
    assert chosen("attention.output.dense", "intermediate.dense") == ["proj", "fc1"]
    with pytest.raises(ValueError, match="no linear layer is named ense"):
        chosen("ense")


def test_what_has_no_room_is_refused():
    with pytest.raises(ValueError, match=r"r=33 must be at most 32, the width of attention\.self\.query"):
        models(["query"], r=33)
    lora = lora_settings(r=2, lora_alpha=1, lora_dropout=0, target_modules=["dense"])
    with pytest.raises(
        ValueError, match=r"TransformerEngine's layers cannot adapt intermediate\.dense, output\.dense"
    ):
        add_adapters(Esm2ForMaskedLM(Esm2Config(**SIZE, layer_backend="torch")), lora, "te")
