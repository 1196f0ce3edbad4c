# SPDX-License-Identifier: Apache-2.0
"""Dropout of what layers add to the residual stream: alike in every implementation and where layers are recomputed."""

from itertools import pairwise

import pytest
import torch
from conftest import ODD

from common.random_numbers import seed_micro_batch
from tokens.backends import cpp_available


RATE = 0.3
CPP = pytest.param("cpp", marks=pytest.mark.skipif(not cpp_available(10)[0], reason=cpp_available(10)[1]))
BACKENDS = pytest.mark.parametrize("backend", ["torch", CPP])


def step(model, batch, name=(0, 0, 1)):
    """Loss and all gradients of a micro-batch of this name."""
    model.zero_grad(set_to_none=True)
    seed_micro_batch(7, name)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([x.grad.flatten() for x in model.parameters()])


@pytest.mark.skipif(not cpp_available(10)[0], reason=cpp_available(10)[1])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_the_same_numbers_are_dropped_in_every_backend(make_model, make_batches, checkpointing):
    _, packed = make_batches((40, 200, 90))
    steps = []
    for backend in ("torch", "cpp"):
        model = make_model(layer_backend=backend, hidden_dropout_prob=RATE)
        if checkpointing:
            model.activation_checkpointing_enable()
        steps.append(step(model, packed))
    torch.testing.assert_close(steps[0][0], steps[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(steps[0][1], steps[1][1], rtol=1e-4, atol=1e-6)
    without, _ = step(make_model(layer_backend="cpp"), packed)
    assert (without - steps[1][0]).abs() > 1e-3


@BACKENDS
def test_none_in_evaluation(make_model, make_batches, backend):
    _, packed = make_batches()
    model, without = (make_model(layer_backend=backend, hidden_dropout_prob=rate).eval() for rate in (RATE, 0.0))
    state = torch.get_rng_state()
    with torch.no_grad():
        output, expected = model(**packed), without(**packed)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert torch.equal(torch.get_rng_state(), state)


@BACKENDS
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_recomputed_layers_drop_the_same(make_model, make_batches, layout, backend):
    batch = make_batches((40, 200, 90))[layout]
    model = make_model(layer_backend=backend, hidden_dropout_prob=RATE)
    stored = step(model, batch)
    model.activation_checkpointing_enable()
    recomputed = step(model, batch)
    assert torch.equal(stored[0], recomputed[0])
    torch.testing.assert_close(stored[1], recomputed[1], rtol=1e-5, atol=1e-7)


@BACKENDS
def test_padded_and_packed_drop_the_same(make_model, make_batches, backend):
    """And a sequence of pads at the end of the packed ones moves nothing."""
    batches = (*make_batches((40, 200, 90)), make_batches((40, 200, 90), align=64)[1])
    model = make_model(layer_backend=backend, hidden_dropout_prob=RATE)
    first, *others = (step(model, batch) for batch in batches)
    for other in others:
        torch.testing.assert_close(first[0], other[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(first[1], other[1], rtol=1e-4, atol=1e-6)


@BACKENDS
def test_what_is_dropped_belongs_to_the_micro_batch(make_model, make_batches, backend):
    """Another name drops others; the same name the same, whatever has been drawn meanwhile."""
    _, packed = make_batches()
    model = make_model(layer_backend=backend, hidden_dropout_prob=RATE)
    first = step(model, packed)
    other = step(model, packed, (0, 0, 2))
    torch.rand(1000)
    again = step(model, packed)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@BACKENDS
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_what_both_parts_of_a_layer_add_is_dropped(make_model, make_batches, monkeypatch, layout, backend):
    """At this rate, scaled up so that the mean stays, and of selected tokens only in the last layer."""
    model = make_model(ODD | {"num_hidden_layers": 3}, layer_backend=backend, hidden_dropout_prob=RATE)
    kernels = type(model.esm.encoder.layer[0].self_attention.kernels)
    dropped, drop = [], kernels.drop

    def watched(self, x, words, place, rate):
        y = drop(self, x, words, place, rate)
        dropped.append((x.detach(), y.detach()))
        return y

    monkeypatch.setattr(kernels, "drop", watched)
    batch = make_batches((40, 200, 90))[layout]
    step(model, batch)
    assert [x.shape[:-1] for x, _ in dropped] == [batch["input_ids"].shape] * 4 + [(64,)] * 2
    masks = [y != 0 for _, y in dropped]
    assert all(not torch.equal(one, other) for one, other in pairwise(masks[:4]))
    for (x, y), kept in zip(dropped, masks, strict=True):
        assert 1 - RATE - 0.03 < kept.float().mean() < 1 - RATE + 0.03
        torch.testing.assert_close(y[kept], x[kept] / (1 - RATE))


def test_a_rate_of_zero_draws_nothing(make_model, make_batches):
    _, packed = make_batches()
    model = make_model().train()
    state = torch.get_rng_state()
    model(**packed)
    assert torch.equal(torch.get_rng_state(), state)
