# SPDX-License-Identifier: Apache-2.0
"""The model against itself: padded and packed, with and without recomputation, whole and from parts."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ODD
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.weights import copy_parameters
from modeling_esm2 import (
    SIZES,
    Embeddings,
    Esm2Config,
    Esm2ForMaskedLM,
    Esm2Model,
    training_flops,
)
from tokens.layout import select_tokens
from tokens.masked_lm import init_parameters


def loss_and_gradients(model, batch, **options):
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in model.named_parameters()}


def assert_same_step(left, right):
    torch.testing.assert_close(left[0], right[0], rtol=1e-6, atol=0)
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], rtol=1e-4, atol=1e-6, msg=name)


def assert_equal_step(left, right):
    assert torch.equal(left[0], right[0])
    assert all(torch.equal(left[1][name], right[1][name]) for name in right[1])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("align", [1, 32], ids=["exact", "aligned"])
def test_padded_and_packed_agree(make_model, make_batches, align, checkpointing):
    model = make_model()
    padded, packed = make_batches(align=align)
    assert len(packed["input_ids"]) % align == 0
    expected = loss_and_gradients(model, padded)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert_same_step(loss_and_gradients(model, padded), expected)
    assert_same_step(loss_and_gradients(model, packed), expected)


def test_recomputation_happens(make_model, make_batches):
    model = make_model()
    padded, _ = make_batches()
    calls = []
    mlp = model.esm.encoder.layer[0].layernorm_mlp
    mlp.matmul = lambda *args: calls.append(1) or F.linear(*args)
    loss_and_gradients(model, padded)
    assert len(calls) == 2
    model.activation_checkpointing_enable()
    loss_and_gradients(model, padded)
    assert len(calls) == 6


def test_padding_does_not_matter(make_model, make_batches):
    """More pads, a row of pads, and an empty sequence in the pack leave loss and gradients alone."""
    model = make_model()
    padded, packed = make_batches()
    expected = loss_and_gradients(model, padded)
    fill = {"input_ids": 1, "labels": -100, "attention_mask": 0}
    assert_same_step(
        loss_and_gradients(model, {k: F.pad(x, (0, 4, 0, 1), value=fill[k]) for k, x in padded.items()}), expected
    )
    cu_seqlens = packed["cu_seqlens"]
    packed["cu_seqlens"] = torch.cat([cu_seqlens[:2], cu_seqlens[1:]])
    assert_same_step(loss_and_gradients(model, packed), expected)


def test_token_dropout_counts_within_a_sequence():
    config = Esm2Config(**ODD)
    embeddings = Embeddings(config)
    torch.nn.init.ones_(embeddings.word_embeddings.weight)
    # Two of 8 masked, none of 4, then a tail of pads.
    padded = torch.tensor([[0, 5, 32, 6, 32, 7, 8, 2], [0, 5, 6, 2, 1, 1, 1, 1]])
    mask = padded != 1
    x_BSE = embeddings(padded, mask, None)
    scale = torch.tensor([0.88 / (1 - 2 / 8), 0.88])[:, None] * (mask & (padded != 32))
    torch.testing.assert_close(x_BSE, scale[..., None].expand_as(x_BSE))
    packed = F.pad(padded[mask], (0, 4), value=1)
    x_TE = embeddings(packed, None, torch.tensor([0, 8, 12, 16], dtype=torch.int32))
    torch.testing.assert_close(x_TE[:12], x_BSE[mask])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(17, 5, 30), (40, 200, 90), (300, 250)], ids=str)
def test_head_on_labels_only(make_model, make_batches, lengths):
    model = make_model()
    _, packed = make_batches(lengths)
    output = model(**packed)
    labels = packed.pop("labels")
    logits_TV = model(**packed).logits
    assert logits_TV.shape == (len(labels), 33)
    num_labels = int((labels != -100).sum())
    assert output.logits.shape == (min(len(labels), 64 * math.ceil(num_labels / 64)), 33)
    torch.testing.assert_close(output.logits[output.labels != -100], logits_TV[labels != -100])
    assert torch.equal(output.labels[output.labels != -100], labels[labels != -100])
    torch.testing.assert_close(output.loss, F.cross_entropy(logits_TV, labels))
    for given in (2 * num_labels, 2.0 * num_labels, torch.tensor(2 * num_labels)):
        halved = model(**packed, labels=labels, counts={"labels": given, "tokens": 1})
        torch.testing.assert_close(halved.loss, output.loss / 2)
    assert output.parts is None


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_what_a_collator_knows_changes_nothing(make_model, make_batches, layout, backend):
    """Lengths and selected tokens that come with the batch; they need not be read from a device then."""
    model, batch = make_model(layer_backend=backend), make_batches((40, 200, 90))[layout]
    known = {"selected": torch.from_numpy(select_tokens(batch["labels"].numpy()))}
    known |= {"counts": {"labels": int((batch["labels"] != -100).sum())}}
    expected = loss_and_gradients(model, batch)
    if layout == 1:
        known["seq_lens"] = batch["cu_seqlens"].diff().tolist()
        batch.pop("max_seqlen")
        assert_equal_step(loss_and_gradients(model, batch), expected)
        known["max_seqlen"] = max(known["seq_lens"])
    assert_equal_step(loss_and_gradients(model, batch, **known), expected)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_selected_tokens(make_model, make_batches, layout, num_layers, backend, checkpointing):
    """Outputs and gradients are as if all tokens had been computed, and the others left aside."""
    model = make_model(ODD | {"num_hidden_layers": num_layers}, layer_backend=backend).esm
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = make_batches((17, 5, 40))[layout]
    num_tokens = batch.pop("labels").numel()
    for selected in (
        torch.tensor([3, 4, 11, num_tokens - 1]),
        torch.arange(num_tokens),
        torch.tensor([], dtype=torch.long),
    ):
        model.zero_grad()
        found_WE = model(**batch, selected_W=selected).last_hidden_state
        factors_WE = torch.randn(found_WE.shape)
        (found_WE * factors_WE).sum().backward()
        found = {name: x.grad for name, x in model.named_parameters()}
        model.zero_grad()
        expected_WE = model(**batch).last_hidden_state.flatten(0, -2)[selected]
        (expected_WE * factors_WE).sum().backward()
        assert found_WE.shape == (len(selected), ODD["hidden_size"])
        torch.testing.assert_close(found_WE, expected_WE, rtol=1e-5, atol=1e-5)
        for name, x in model.named_parameters():
            torch.testing.assert_close(found[name], x.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("num_labels", [0, 1, 63, 64, 65, 128, 190, 200])
def test_which_tokens_are_selected(num_labels):
    labels = torch.full((200,), -100)
    labels[torch.randperm(200)[:num_labels]] = 5
    for layout in (labels, labels.view(4, 50)):
        selected = torch.from_numpy(select_tokens(layout.numpy()))
        assert selected.dtype == torch.int64 and len(selected) == min(200, 64 * max(1, math.ceil(num_labels / 64)))
        assert (selected.diff() > 0).all() and selected[0] >= 0 and selected[-1] < 200
        assert (labels[selected] != -100).sum() == num_labels


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_last_layer_computes_labelled_tokens_only(make_model, make_batches, layout, backend):
    model, batch, rows = make_model(layer_backend=backend), make_batches((40, 200, 90))[layout], {}

    def watched(name, x, *weights):
        rows.setdefault(name, x.shape[:-1])
        return F.linear(x, *weights)

    for name, module in model.esm.encoder.named_modules():
        if hasattr(module, "matmul"):
            module.matmul = partial(watched, name)
    model(**batch)
    all_tokens, selected = batch["input_ids"].shape, (64,)  # filled up
    assert 10 < (batch["labels"] != -100).sum() < 64
    parts = ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp")
    assert [rows[f"layer.0.{part}"] for part in parts] == [all_tokens] * 3
    assert [rows[f"layer.1.{part}"] for part in parts] == [all_tokens, selected, selected]


@pytest.mark.parametrize("lengths", [(17, 5, 30), (40, 200, 90)], ids=str)
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_no_labels(make_model, make_batches, layout, lengths):
    batch = make_batches(lengths)[layout]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = loss_and_gradients(make_model(), batch)
    assert loss == 0
    for name, gradient in gradients.items():
        assert gradient is not None and not gradient.any(), name


def test_padded_vocabulary_stays_zero(make_model, make_batches):
    model = make_model()
    _, gradients = loss_and_gradients(model, make_batches()[0])
    assert not gradients["esm.embeddings.word_embeddings.weight"][33:].any()


def test_initial_values():
    config = Esm2Config(**SIZES["esm2_t4_1M"])
    torch.manual_seed(3)
    direct = Esm2ForMaskedLM(config).state_dict()
    with torch.device("meta"):
        model = Esm2ForMaskedLM(config)
    model.to_empty(device="cpu")
    init_parameters(model, seed=3)
    for name, x in model.state_dict().items():
        assert torch.equal(x, direct[name]), name
        if x.ndim == 1:
            assert (x == (0 if name.endswith("bias") else 1)).all(), name
        elif x.numel() > 1000:
            torch.testing.assert_close(x[x != 0].std(), torch.tensor(0.02), rtol=0.1, atol=0)
    embedding = model.esm.embeddings.word_embeddings.weight
    assert not embedding[1].any() and not embedding[33:].any()
    for name, x in Esm2Model(config).state_dict().items():
        assert torch.equal(x, direct["esm." + name]), name
    init_parameters(model, seed=4)
    assert not torch.equal(model.lm_head.dense.weight, direct["lm_head.dense.weight"])


def test_copy_refuses(make_model):
    model = make_model()
    values = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head\.bias has shape"):
        copy_parameters(model, values | {"lm_head.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match="unexpected head"):
        copy_parameters(model, values | {"head": torch.zeros(1)})
    del values["lm_head.bias"]
    with pytest.raises(ValueError, match=r"missing lm_head\.bias"):
        copy_parameters(model, values)


def test_save_and_load(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    loaded = Esm2ForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict().items() >= model.config.to_diff_dict().items()
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, expected[name]), name
    for name, x in Esm2Model.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(x, expected["esm." + name]), name


def test_load_fills_what_is_missing(make_model, tmp_path):
    model = make_model()
    weights = {name: x for name, x in model.state_dict().items() if name != "lm_head.dense.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    torch.manual_seed(5)
    loaded = Esm2ForMaskedLM.from_pretrained(tmp_path).state_dict()
    torch.manual_seed(5)
    assert torch.equal(loaded["lm_head.dense.weight"], Esm2ForMaskedLM(model.config).lm_head.dense.weight)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_bf16(make_model, make_batches):
    """Autocast, and weights in BF16 as FSDP2 has them: near the FP32 loss, every gradient finite."""
    model = make_model()
    for batch in make_batches():
        expected, _ = loss_and_gradients(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(model, batch)
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
        assert all(x.isfinite().all() for x in gradients.values())
    low = make_model().bfloat16()
    output = low(**batch)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_compiled_layers(make_model, make_batches, layout):
    """Each layer compiled by itself, as the recipes do; new lengths must not compile again for ever."""
    torch._dynamo.reset()  # what other tests have compiled counts
    model, compiled = make_model(), make_model()
    for layer in compiled.esm.encoder.layer:
        layer.compile(dynamic=True, backend="aot_eager")
    # One for all layers but the last, one for the last, whose selected tokens may also be all there are.
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for lengths in ((17, 5, 30), (9, 41), (40, 200, 90), (12, 8, 7, 33), (300, 250, 2), (31, 2, 6)):
            batch = make_batches(lengths)[layout]
            assert_same_step(loss_and_gradients(compiled, batch), loss_and_gradients(model, batch))


def test_wrong_batches(make_model, make_batches):
    padded, packed = make_batches()
    with pytest.raises(ValueError, match="without cu_seqlens"):
        make_model()(packed["input_ids"])
    with pytest.raises(ValueError, match="with cu_seqlens"):
        make_model()(padded["input_ids"], cu_seqlens=packed["cu_seqlens"])
    with pytest.raises(ValueError, match=r"labels \[51\] must have the shape of input_ids, \[52\]"):
        make_model()(**packed | {"labels": packed["labels"][1:]})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 66}, "multiple of 12"),
        ({"padded_vocab_size": 32}, "padded_vocab_size 32"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob 1.0 must be at least 0 and below 1"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob -0.1"),
        ({"layer_backend": "jax"}, "layer_backend 'jax'"),
    ],
)
def test_wrong_configs(options, message):
    with pytest.raises(ValueError, match=message):
        Esm2Config(**ODD | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_te_without_cuda_says_why():
    with pytest.raises(ValueError, match="no CUDA device"):
        Esm2ForMaskedLM(Esm2Config(**ODD, layer_backend="te"))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_parameters_are_those_of_transformer_engine(make_model, backend):
    """As its 2.20.2 has them; without a GPU it cannot be asked (with one, test_layers_te.py does)."""
    tensors, begin = make_model(layer_backend=backend).state_dict(), "esm.encoder.layer.1."
    width, wide = ODD["hidden_size"], ODD["intermediate_size"]
    norm = {"layer_norm_weight": (width,), "layer_norm_bias": (width,)}
    qkv = norm | {"weight": (3 * width, width), "bias": (3 * width,)}
    proj = {"weight": (width, width), "bias": (width,)}
    mlp = norm | {"fc1_weight": (wide, width), "fc1_bias": (wide,), "fc2_weight": (width, wide), "fc2_bias": (width,)}
    parts = {"self_attention.layernorm_qkv": qkv, "self_attention.proj": proj, "layernorm_mlp": mlp}
    assert {name.removeprefix(begin): tuple(x.shape) for name, x in tensors.items() if name.startswith(begin)} == {
        f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "name, millions", [("8M", 8), ("35M", 34), ("150M", 148), ("650M", 651), ("3B", 2839), ("15B", 15129)]
)
def test_published_sizes(name, millions):
    size = next(size for full_name, size in SIZES.items() if f"_{name}_" in full_name)
    with torch.device("meta"):
        model = Esm2ForMaskedLM(Esm2Config(**size))
    assert round(sum(x.numel() for x in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)


def counts(lengths, num_labels):
    """Those of a batch, as a collator gives them."""
    pairs = sum(length**2 for length in lengths)
    return {"labels": num_labels, "tokens": sum(lengths), "token_pairs": pairs}


def test_training_flops(make_model, make_batches):
    model = make_model(layer_backend="torch")
    lengths = (40, 200, 90)
    _, packed = make_batches(lengths)
    num_labels = len(select_tokens(packed["labels"].numpy()))
    assert num_labels == 64  # those that fill up are computed as if they had a label
    # The counter knows matrix products, not the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**packed)
    # The plain layers' attention is of all tokens, also in the last one.
    beside = 3 * 4 * 60 * sum(length**2 for length in lengths) * (1 - num_labels / sum(lengths))
    expected = 3 * counter.get_total_flops() - beside
    assert training_flops(model.config, counts(lengths, num_labels), "torch") == pytest.approx(expected, rel=1e-12)
    packed.pop("labels")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**packed)
    assert training_flops(model.config, counts(lengths, sum(lengths))) == 3 * counter.get_total_flops()
    # By hand, for one protein of 10 tokens with 2 labels and E = 60, F = 91, P = 64.
    products = 10 * 2 * (60 * 180 + 60 * 60 + 60 * 91 + 91 * 60)
    attention = 2 * (2 * 10 * 10 * 60)
    head = 2 * 2 * (60 * 60 + 60 * 64)
    assert training_flops(model.config, counts([10], 2)) == 3 * (2 * (products + attention) + head)
    last = 10 * 2 * 60 * 180 + 2 * 2 * (60 * 60 + 60 * 91 + 91 * 60) + 2 * (2 * 2 * 10 * 60)
    assert training_flops(model.config, counts([10], 2), "torch") == 3 * (products + attention + last + head)
