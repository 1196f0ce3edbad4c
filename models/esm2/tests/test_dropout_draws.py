# SPDX-License-Identifier: Apache-2.0
"""The hash that decides what is dropped, and the CPU's kernels, attention's and that of rows, against it."""

import math
from itertools import product

import pytest
import torch
from test_layers_cpp import ASKING, CLOSE, LENGTHS, error

from tokens import dropout, layers, layers_cpp
from tokens.backends import cpp_available


compiled = pytest.mark.skipif(not cpp_available(16)[0], reason="no kernels can be compiled here")


def fold(word, number):
    """In plain whole numbers."""
    word = (word + number * 0x9E3779B9) % 2**32
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    return word ^ word >> 16


def draw(word, column):
    word = (word ^ fold(0, column)) * 0x7FEB352D % 2**32
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    return word - 2**32 if word >= 2**31 else word


def test_the_hash_in_plain_whole_numbers():
    seeds, places = (0, 1, -5, 2**31 - 1, -(2**31)), (0, 1, 2, 7)
    sequences, positions = torch.arange(3)[:, None], torch.arange(5)
    for seed, layer, place in product(seeds, (0, 1, 40), places):
        words = dropout.fold(dropout.token_words(torch.tensor(seed, dtype=torch.int32), sequences, positions), layer)
        kept = dropout.kept(dropout.fold(words, place), 6, 0.37)
        for b, s, column in product(range(3), range(5), range(6)):
            word = fold(fold(fold(fold(seed % 2**32, b), s), layer), place)
            assert kept[b, s, column] == (draw(word, column) >= 0.37 * 2**32 - 2**31)


def kept_of(seed=3, sequence=0, layer=1, place=dropout.HEADS, rate=0.1, size=512):
    """What is kept of a head's weights, or of a sequence's channels, [size, size]."""
    words = dropout.token_words(seed, torch.tensor([sequence]), torch.arange(size))
    return dropout.kept(dropout.fold(dropout.fold(words, layer), place), size, rate)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(rate):
    """Of all, and as a binomial distribution has it of rows, of columns and of squares of 8 by 8."""
    dropped = (~kept_of(rate=rate, size=1024)).double()
    expected = math.sqrt(rate * (1 - rate))
    squares = dropped.view(128, 8, 128, 8).mean((1, 3)).flatten()
    for means, number in ((dropped.mean().view(1), 1024**2), (dropped.mean(0), 1024), (dropped.mean(1), 1024),
                          (squares, 64)):  # fmt: skip
        off = (means - rate) / (expected / number**0.5)
        assert off.square().mean() < 1 + 6 * (2 / len(means)) ** 0.5 + 6 * (len(means) == 1)
        assert off.square().mean() > 1 - 6 * (2 / len(means)) ** 0.5


NEXT = {"seed": 4, "sequence": 1, "layer": 2, "place": dropout.HEADS + 1}


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("other", [*NEXT, "query", "key", "transposed"])
def test_neighbours_are_not_correlated(other, rate):
    """In the next micro-batch, sequence, layer, head, query or key, and not along the diagonal."""
    one = kept_of(rate=rate).double() - (1 - rate)
    two = kept_of(rate=rate, **{other: NEXT[other]}).double() - (1 - rate) if other in NEXT else one
    if other == "query":
        one, two = one[1:], one[:-1]
    elif other == "key":
        one, two = one[:, 1:], one[:, :-1]
    elif other == "transposed":
        one, two = one.triu(1), one.T.triu(1)
    number = one.count_nonzero()
    off = (one * two).sum() / (rate * (1 - rate) * number**0.5)
    assert 0 < abs(off) < 5
    # Nor is any row with the same one, or column.
    for dim in (0, 1):
        rows = (one * two).sum(dim) / (rate * (1 - rate) * one.count_nonzero(dim).clamp(min=1) ** 0.5)
        assert abs(rows[8:-8]).max() < 8 / min(rate * 10, 1) ** 0.5


def inputs_of(lengths, dim, seed=5, layer=3, turns=True):
    num_tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    frequencies = 10000.0 ** -torch.arange(0, 1, 2 / dim) if turns else torch.zeros(dim // 2)
    borders = (cu_seqlens, max(lengths), list(lengths))
    tokens = torch.zeros(num_tokens, dtype=torch.long)
    return layers.attention_inputs(tokens, None, *borders, frequencies, None, turns, seed).at(layer)


def attention_and_gradient(kernels, qkv, inputs, grad, *options):
    context = kernels.attention(qkv, inputs, *options)
    return context.detach(), *torch.autograd.grad(context, qkv, grad)


def agrees_with_the_reference(dim, dtype, rate, selected=None, first_head=0):
    torch.manual_seed(dim)
    inputs, num_asking = inputs_of(LENGTHS, dim), sum(LENGTHS) if selected is None else len(selected)
    qkv = (2 * torch.randn(sum(LENGTHS), 3, 3 * dim)).to(dtype).requires_grad_()
    dropped = dropout.Dropped(inputs.words_N, rate, first_head)
    grad, options = torch.randn(num_asking, 3, dim).to(dtype), (selected, dropped)
    found = attention_and_gradient(layers_cpp.Kernels(dim), qkv, inputs, grad, *options)
    exact_qkv = qkv.detach().double().requires_grad_()
    exact = attention_and_gradient(layers.Kernels(), exact_qkv, inputs, grad.double(), *options)
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == dtype and error(x, y) < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    if dtype == torch.bfloat16:  # no worse than PyTorch's own operations
        plain = attention_and_gradient(layers.Kernels(), qkv, inputs, grad, *options)
        for x, other, y in zip(found, plain, exact, strict=True):
            assert error(x, y) < 1.5 * error(other, y)


@compiled
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("dim", [2, 10, 12, 16, 24, 64, 128])
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_attention(rate, dim, dtype):
    agrees_with_the_reference(dim, dtype, rate, first_head=2)


@compiled
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("asking", ["one", "few", "all of some sequences", "most"])
def test_attention_of_selected_tokens(asking, dtype):
    agrees_with_the_reference(16, dtype, 0.3, torch.tensor(ASKING[asking]))


@compiled
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("selected", [None, torch.arange(2, 200, 7)], ids=["all", "some"])
def test_padded_batches(selected, masked, dtype):
    """As packed ones, wherever their padding is; what it gets itself is of no use."""
    lengths = (50, 70, 33, 1) if masked else (70,) * 4
    mask = torch.arange(70) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(4, 70, dtype=torch.long)
    borders = (mask if masked else None, None, None, None, torch.zeros(8), None, False)
    padded, packed = layers.attention_inputs(ids, *borders, seed=5).at(3), inputs_of(lengths, 16, turns=False)
    qkv, grad = torch.randn(4, 70, 3, 48).to(dtype), torch.randn(4, 70, 3, 16).to(dtype) * mask[..., None, None]
    kernels, dropped = layers_cpp.Kernels(16), dropout.Dropped(padded.words_N, 0.3, 1)
    of_packed = (qkv[mask].requires_grad_(), packed, grad[mask], None, dropped._replace(words=packed.words_N))
    expected, expected_grad = attention_and_gradient(kernels, *of_packed)
    if selected is None:
        found, found_grad = attention_and_gradient(kernels, qkv.requires_grad_(), padded, grad, None, dropped)
        assert torch.equal(found[mask], expected) and torch.equal(found_grad[mask], expected_grad)
        assert not found[~mask].any() and not found_grad[~mask].any()
    whole = torch.zeros_like(grad).masked_scatter(mask[..., None, None], expected).flatten(0, 1)
    found = kernels.attention(qkv, padded, selected, dropped)
    assert torch.equal(found.flatten(0, -3), whole if selected is None else whole[selected])


@compiled
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("width", [1, 33, 64])
def test_rows(width, dtype):
    rows_agree(width, dtype)


def rows_agree(width, dtype):
    words = dropout.token_words(7, torch.arange(3)[:, None], torch.arange(50))
    x = torch.randn(3, 50, width).to(dtype).requires_grad_()
    grad = torch.randn(3, 50, width).to(dtype)
    found, plain = (
        (y.detach(), *torch.autograd.grad(y, x, grad))
        for y in (layers_cpp.Kernels(16).drop(x, words, 1, 0.3), dropout.drop(x, words, 1, 0.3))
    )
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours == 0, theirs == 0)


@compiled
def test_on_any_number_of_threads():
    inputs, qkv = inputs_of(LENGTHS, 16), torch.randn(sum(LENGTHS), 3, 48).requires_grad_()
    options, found = (torch.ones(len(qkv), 3, 16), None, dropout.Dropped(inputs.words_N, 0.3)), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        found.append(attention_and_gradient(layers_cpp.Kernels(16), qkv, inputs, *options))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@compiled
@pytest.mark.parametrize("selected", [None, torch.arange(3, 60, 7)], ids=["all", "some"])
def test_layers_of_one_graph(selected):
    """`torch.compile` makes one for all layers: it knows of no layer's number."""
    torch._dynamo.reset()
    made = []

    def backend(graph, examples):
        made.append(1)
        return graph

    options = (64, 160, 4, 1e-5, 0.3, layers.Form(activation="relu", post_norm=True), 0.3)
    x_TE = torch.randn(60, 64)
    for number in range(1, 4):
        layer = layers_cpp.PostNormLayer(*options)
        for x in layer.parameters():
            torch.nn.init.normal_(x, std=0.1)
        inputs = inputs_of((20, 40), 16, layer=number, turns=False)
        expected = layer(x_TE, inputs, selected)
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
        torch.testing.assert_close(layer(x_TE, inputs, selected), expected)
    assert len(made) == 1


def test_a_layer_without_words_is_refused():
    layer = layers.TransformerLayer(64, 160, 4, 1e-5, 0.0, attention_dropout=0.3)
    with pytest.raises(AssertionError, match="no seed"):
        layer(torch.zeros(60, 64), inputs_of((20, 40), 16, seed=None))
