# SPDX-License-Identifier: Apache-2.0
"""The model against plain `transformers`, in all layouts and on all layers that a CPU has."""

import pytest
import torch
from conftest import BIONEMO, EVEN, ODD, PUBLISHED

from convert_geneformer import from_native
from modeling_geneformer import SIZES, GeneformerConfig, GeneformerForMaskedLM, training_flops
from tokens.backends import cpp_available
from tokens.layers import attention_inputs
from tokens.masked_lm import init_parameters
from vocabulary import open_vocabulary


CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
FAMILIES = {"published": PUBLISHED, "bionemo": BIONEMO}
compiled = pytest.mark.skipif(not cpp_available(16)[0], reason="no kernels can be compiled here")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=compiled)])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [ODD, EVEN], ids=["odd", "even"])
def test_loss_logits_and_gradients(make_models, make_batches, size, dtype, layout, backend, family):
    options = FAMILIES[family]
    ours, plain = (x.to(dtype) for x in make_models(size, **options, layer_backend=backend))
    batches = make_batches(pad=options.get("pad_token_id", 0))
    expected, found = plain(**batches[0]), ours(**batches[layout])
    expected.loss.backward()
    found.loss.backward()
    close = {"rtol": 0, "atol": CLOSE[dtype]}
    torch.testing.assert_close(found.loss, expected.loss, **close)
    gradients = from_native({name: x.grad for name, x in ours.named_parameters()}, ours.config)
    for name, x in plain.named_parameters():  # without those of names that are tied
        assert (gradients[name] - x.grad).abs().max() < CLOSE[dtype] * max(1, x.grad.abs().max()), name
    inputs = {key: value for key, value in batches[layout].items() if key != "labels"}
    logits, real = ours(**inputs).logits, batches[0]["attention_mask"].bool()
    torch.testing.assert_close(logits[real] if layout == 0 else logits, expected.logits[real], **close)


@compiled
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_bf16(make_models, make_batches, layout, family):
    """The kernels are no farther from FP32 than PyTorch's own BF16."""
    options = FAMILIES[family] | {"max_position_embeddings": 128}
    exact, plain, fast = (make_models(EVEN, **options, layer_backend=name)[0] for name in ("torch", "torch", "cpp"))
    batch = make_batches((40, 100, 90), pad=options.get("pad_token_id", 0))[layout]
    exact(**batch).loss.backward()
    errors = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append(sum((x.grad - y.grad).square().sum() / y.grad.square().sum().clamp(min=1e-9) for x, y in pairs))
    assert 0 < errors[1] < 1.5 * errors[0] and errors[0] < 1


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=compiled)])
def test_recomputed_layers_agree_with_dropout(make_models, make_batches, backend):
    _, packed = make_batches()
    losses = []
    for recomputed in (False, True):
        model, _ = make_models(EVEN, layer_backend=backend, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        loss = model.train()(**packed).loss
        loss.backward()
        losses.append((loss.item(), *(x.grad.sum().item() for x in model.parameters())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


def inputs_of(length, seed):
    borders = (torch.tensor([0, length], dtype=torch.int32), length, [length])
    tokens = torch.zeros(length, dtype=torch.long)
    return attention_inputs(tokens, None, *borders, torch.zeros(8), turns=False, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_dropped_in_every_layout_and_backend(make_models, make_batches, family):
    """In attention and behind both parts of a layer, also where the last layer computes labelled tokens alone."""
    options = FAMILIES[family] | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    steps = []
    for backend in ["torch", "cpp"] if cpp_available(16)[0] else ["torch"]:
        for batch in (*make_batches(pad=options.get("pad_token_id", 0)), make_batches(align=16)[1]):
            model = make_models(EVEN, **options, layer_backend=backend)[0].train()
            torch.manual_seed(5)
            loss = model(**batch).loss
            loss.backward()
            steps.append((loss.detach(), torch.cat([x.grad.flatten() for x in model.parameters()])))
    for loss, gradient in steps[1:]:
        torch.testing.assert_close(loss, steps[0][0], rtol=1e-5, atol=0)
        assert (gradient - steps[0][1]).norm() < 1e-5 * gradient.norm()
    torch.manual_seed(6)
    assert model(**batch).loss.item() != pytest.approx(steps[0][0].item(), rel=1e-3)


def test_dropout_is_in_training_only_and_of_its_share(make_models, make_batches):
    padded, _ = make_batches()
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        model, plain = make_models(EVEN, **{name: 0.3})
        assert model(**padded).loss.item() == pytest.approx(plain(**padded).loss.item(), rel=1e-5), name
        assert model.train()(**padded).loss.item() != pytest.approx(plain(**padded).loss.item(), rel=1e-4), name
    # In the mean over many draws, attention with dropout is attention without.
    attention = model.geneformer.layer[0].self_attention
    assert attention.dropout == 0.3
    x_NE = torch.randn(12, 64)
    with torch.no_grad():
        draws = torch.stack([attention(x_NE, inputs_of(12, seed)) for seed in range(2000)])
        off = (draws.mean(0) - attention.eval()(x_NE, inputs_of(12, 0))).abs() / (draws.std(0) / 2000**0.5)
    assert off.mean() < 1.2 and off.max() < 6


def test_extra_padding_changes_nothing(make_models, make_batches):
    model, _ = make_models()
    losses = [model(**make_batches(align=align)[1]).loss for align in (1, 32)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_cell_longer_than_the_positions_is_refused(make_models, make_batches):
    model, _ = make_models()
    for batch in make_batches((41, 3)):
        with pytest.raises(ValueError, match="a cell of 41 tokens is longer than max_position_embeddings 40"):
            model(**batch)


def test_published_sizes():
    numbers = {}
    for name, size in SIZES.items():
        with torch.device("meta"):
            vocab_size = open_vocabulary(size["vocabulary"]).size
            model = GeneformerForMaskedLM(GeneformerConfig(**size, vocab_size=vocab_size))
        numbers[name] = round(model.num_parameters() / 1e6)
    assert numbers == {
        "geneformer_1M": 4, "Geneformer-V1-10M": 10, "gf-12L-30M-i2048": 40, "gf-12L-95M-i4096": 38,
        "gf-20L-95M-i4096": 151, "Geneformer-V2-104M": 104, "Geneformer-V2-316M": 316, "geneformer_10M": 10,
        "geneformer_106M": 107, "geneformer_1B": 981, "geneformer_4b": 2909,
    }  # fmt: skip


def test_first_weights():
    model, again = (GeneformerForMaskedLM(GeneformerConfig(**PUBLISHED, **ODD)) for _ in range(2))
    for one in (model, again):
        init_parameters(one, seed=3)
    for name, x in model.named_parameters():
        if x.ndim == 1:
            assert (x == (0 if name.endswith("bias") else 1)).all(), name
        elif x.numel() > 1000:
            x = x[1:83] if name.endswith("word_embeddings.weight") else x
            assert x.std().item() == pytest.approx(0.02, rel=0.2) and abs(x.mean()) < 0.002, name
    embedding = model.geneformer.embeddings.word_embeddings.weight
    assert not embedding[0].any() and not embedding[83:].any() and embedding[1].any()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_flops_are_what_torch_counts(make_models, make_batches):
    from torch.utils.flop_counter import FlopCounterMode

    (model, _), (padded, _) = make_models(layer_backend="torch"), make_batches((30, 30))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(padded["input_ids"])
    counts = {"tokens": 60, "labels": 60, "token_pairs": 2 * 30**2}
    assert training_flops(model.config, counts) == pytest.approx(3 * counter.get_total_flops(), rel=1e-3)
