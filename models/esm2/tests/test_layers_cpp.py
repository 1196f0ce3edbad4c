# SPDX-License-Identifier: Apache-2.0
"""The CPU's kernels against PyTorch in float64, and whole models against those with plain layers."""

import copy
import ctypes
import os
import pickle
import shlex
import subprocess
import zlib
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ODD

from common import compile_cpp
from tokens import layers, layers_cpp
from tokens.backends import cpp_available


available, reason = cpp_available(16)
pytestmark = pytest.mark.skipif(not available, reason=reason)

# What one rounding to the type may be off, times a few.
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
LENGTHS = (1, 2, 63, 64, 65, 150, 0, 31, 32, 33)  # around the kernel's blocks of 64 or 32 queries, and 32 keys


def error(x, exact):
    """Largest difference, as a share of the largest value."""
    return ((x.double() - exact).abs().max() / exact.abs().max()).item()


def attention_inputs(lengths, dim):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    angles_SD = torch.arange(max(lengths))[:, None] * (10000.0 ** -torch.arange(0, 1, 2 / dim)).repeat(2)
    return layers.AttentionInputs(angles_SD, None, cu_seqlens, positions_T, max(lengths))


def attention_and_gradient(kernels, qkv, inputs, grad, selected_W=None):
    context = kernels.attention(qkv, inputs, selected_W)
    return context.detach(), *torch.autograd.grad(context, qkv, grad)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("dim", [2, 10, 12, 14, 16, 20, 24, 32, 40, 44, 64, 128])
def test_attention(dim, dtype):
    torch.manual_seed(dim)
    inputs, size = attention_inputs(LENGTHS, dim), (sum(LENGTHS), 3)
    qkv = (2 * torch.randn(*size, 3 * dim)).to(dtype).requires_grad_()
    grad = torch.randn(*size, dim).to(dtype)
    found = attention_and_gradient(layers_cpp.Kernels(dim), qkv, inputs, grad)
    exact = attention_and_gradient(
        layers.Kernels(), qkv.detach().double().requires_grad_(), attention_inputs(LENGTHS, dim), grad.double()
    )
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == dtype and error(x, y) < CLOSE[dtype]
    if dtype == torch.bfloat16:  # no worse than PyTorch's own
        plain = attention_and_gradient(layers.Kernels(), qkv, inputs, grad)
        for x, other, y in zip(found, plain, exact, strict=True):
            assert error(x, y) < 1.5 * error(other, y)


ASKING = {
    "none": [],
    "one": [131],
    "the first": [0],
    "the last": [sum(LENGTHS) - 1],
    "few": sorted({*range(3, sum(LENGTHS), 7), 65, 66, 129, 130}),
    "all of some sequences": [*range(1, 3), *range(130, 195), *range(345, 376)],
    "most": [i for i in range(sum(LENGTHS)) if i % 5],
}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("dim", [10, 12, 14, 16, 24, 40, 64])
@pytest.mark.parametrize("asking", ASKING)
def test_attention_of_selected_tokens(asking, dim, dtype, monkeypatch):
    """As if all had asked and the others' answers had been of no use; new memory is full of NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        agrees_with_attention_of_all(torch.tensor(ASKING[asking], dtype=torch.long), dim, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def agrees_with_attention_of_all(selected, dim, dtype):
    torch.manual_seed(dim)
    kernels, inputs = layers_cpp.Kernels(dim), attention_inputs(LENGTHS, dim)
    qkv = (2 * torch.randn(sum(LENGTHS), 3, 3 * dim)).to(dtype).requires_grad_()
    grad = torch.randn(len(selected), 3, dim).to(dtype)
    context, grad_qkv = attention_and_gradient(kernels, qkv, inputs, grad, selected)
    every_grad = torch.zeros(len(qkv), 3, dim, dtype=dtype).index_copy(0, selected, grad)
    every_context, expected_grad = attention_and_gradient(kernels, qkv, inputs, every_grad)
    assert context.shape == grad.shape and grad_qkv.shape == qkv.shape
    if len(selected):  # one block's queries round together
        assert error(context, every_context[selected].double()) < CLOSE[dtype] / 3
        assert error(grad_qkv, expected_grad.double()) < CLOSE[dtype] / 3
    others = torch.ones(len(qkv), dtype=torch.bool).index_fill(0, selected, False)
    assert not grad_qkv[others, :, :dim].any()
    sequences = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert not grad_qkv[~torch.isin(sequences, sequences[selected])].any()


def inputs_without_angles(lengths, dim):
    inputs = attention_inputs(lengths, dim)
    inputs.cos_SR, inputs.sin_SR = torch.ones_like(inputs.cos_SR), torch.zeros_like(inputs.sin_SR)
    inputs.cos_N1D, inputs.sin_N1D = torch.ones_like(inputs.cos_N1D), torch.zeros_like(inputs.sin_N1D)
    return inputs


def agrees_where_scores_are_large(qkv, lengths, dtype):
    """Heads of 16 channels without rotary angles, against float64 and PyTorch's own."""
    inputs = inputs_without_angles(lengths, 16)
    qkv, grad = qkv.to(dtype).requires_grad_(), torch.randn(len(qkv), 1, 16).to(dtype)
    found = attention_and_gradient(layers_cpp.Kernels(16), qkv, inputs, grad)
    exact = attention_and_gradient(layers.Kernels(), qkv.detach().double().requires_grad_(), inputs, grad.double())
    plain = attention_and_gradient(layers.Kernels(), qkv, inputs, grad)
    rounding = 1_600 * torch.finfo(torch.float32).eps  # of the scores, and of what becomes of them
    for x, other, y in zip(found, plain, exact, strict=True):
        assert error(x, y) < 3 * error(other, y) + CLOSE[dtype] + rounding


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(sign, dtype):
    """All of them: what pads a block has a score of 0, which is then far above or below the real ones."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(38, 1, 16) for _ in range(3))
    q, k = q * 0.1 + 20, sign * (k * 0.1 + 20)
    agrees_where_scores_are_large(torch.cat([q, k, v], -1), (5, 33), dtype)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("steps", [(0, 1, 9, 10), (3, 2, 1, 0), (0, 3, 0, 1), (-2, 0.2, 0.3, 0.1)], ids=str)
@pytest.mark.parametrize("queries", ["up and down", "all slopes", "the last of 32"])
def test_scores_that_rise_and_fall(queries, steps, dtype):
    """From 32 keys to the next 32, by up to 36 powers of 2 for a step of 1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(120, 1, 16) for _ in range(3))
    slopes = {
        "up and down": torch.tensor([4.0, -4.0]).repeat(60),
        "all slopes": torch.linspace(-4, 4, 120)[torch.randperm(120)],
        "the last of 32": torch.where(torch.arange(120) % 32 == 31, 4.0, 0.0),
    }
    q[..., 0] = slopes[queries][:, None]
    k[..., 0] = 25 * torch.tensor(steps).repeat_interleave(32)[:120, None]
    agrees_where_scores_are_large(torch.cat([q, k, v], -1), (120,), dtype)


@pytest.mark.parametrize("later", [-100.0, 0.0, 100.0], ids=str)
@pytest.mark.parametrize("least", [-2.5e6, -1e10, -3e38], ids=str)
def test_first_scores_far_below(least, later):
    """What they begin with costs later scores no digits: those come out as if the first keys were not there."""
    if not layers_cpp.has_bfloat16(16):
        pytest.skip("this processor has no BF16 products")
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(120, 1, 16) for _ in range(4))
    q[..., 0], k[..., 0] = 4, torch.where(torch.arange(120) < 32, least, later)[:, None]
    grad[:32] = 0
    whole = torch.cat([q, k, v], -1).bfloat16()
    results = []
    for qkv, own_grad in ((whole, grad), (whole[32:], grad[32:])):
        inputs = inputs_without_angles((len(qkv),), 16)
        found = attention_and_gradient(layers_cpp.Kernels(16), qkv.requires_grad_(), inputs, own_grad.bfloat16())
        context, grad_qkv = (x[-88:].double() for x in found)
        # The least weight is 2^-64, which times the largest keys would be seen in queries.
        results.append((context, grad_qkv[..., 16:32], grad_qkv[..., 32:]))
    assert all(error(x, y) < 2e-2 for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("dim", [14, 16, 24])
def test_a_sequence_does_not_see_its_neighbours(dim, dtype):
    """To the bit: alone, first, last, and on another number of threads."""
    torch.manual_seed(0)
    kernels, own, other = layers_cpp.Kernels(dim), *(torch.randn(n, 2, 3 * dim).to(dtype) for n in (70, 90))
    results = []
    for parts, at in (([own], 0), ([own, other], 0), ([other, own], 90)):
        for num_threads in (1, 2):
            qkv = torch.cat(parts).requires_grad_()
            torch.set_num_threads(num_threads)
            found = attention_and_gradient(
                kernels, qkv, attention_inputs([len(x) for x in parts], dim), torch.ones_like(qkv[..., :dim])
            )
            results.append([x[at : at + 70] for x in found])
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2])
def test_layer_norm(dtypes):
    torch.manual_seed(0)
    x = (3 * torch.randn(130, 75) + 1).to(dtypes[0]).requires_grad_()
    weight, bias = (torch.randn(75).requires_grad_() for _ in range(2))
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(130, 75).to(dtypes[1])
    y, *_ = layers_cpp.layer_norm(x, weight, bias, 1e-5, dtypes[1], 16)
    exact = F.layer_norm(exact_inputs[0], (75,), *exact_inputs[1:], 1e-5)
    assert y.dtype == dtypes[1] and error(y, exact) < CLOSE[dtypes[1]]
    found, expected = (
        torch.autograd.grad(y, (x, weight, bias), grad),
        torch.autograd.grad(exact, exact_inputs, grad.double()),
    )
    for g, e in zip(found, expected, strict=True):
        assert error(g, e) < CLOSE[dtypes[1]]


@pytest.mark.parametrize("used", [slice(2), slice(1), slice(1, 2)], ids=["both used", "the sum", "its norm"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2])
def test_sum_and_its_layer_norm(dtypes, used):
    torch.manual_seed(0)
    x, added = ((3 * torch.randn(130, 75) + 1).to(dtype).requires_grad_() for dtype in dtypes)
    weight, bias = (torch.randn(75).requires_grad_() for _ in range(2))
    grads = [torch.randn(130, 75).to(dtype) for dtype in dtypes][used]
    inputs, zeros = (x, added, weight, bias), {"allow_unused": True, "materialize_grads": True}
    total, y, *_ = layers_cpp.add_layer_norm(*inputs, 1e-5, 16)
    found = torch.autograd.grad((total, y)[used], inputs, grads, **zeros)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact_total = exact_inputs[0] + exact_inputs[1]
    exact = (exact_total, F.layer_norm(exact_total, (75,), *exact_inputs[2:], 1e-5))
    expected = torch.autograd.grad(exact[used], exact_inputs, [grad.double() for grad in grads], **zeros)
    assert (total.dtype, y.dtype) == dtypes and [g.dtype for g in found] == [t.dtype for t in inputs]
    for g, e in zip((total, y, *found), (*exact, *expected), strict=True):
        assert (error(g, e) < CLOSE[dtypes[1]]) if e.any() else not g.any()


def test_layer_norm_does_not_depend_on_threads():
    x, weight, grad = torch.randn(1000, 32).requires_grad_(), torch.randn(32).requires_grad_(), torch.randn(1000, 32)
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        y, *_ = layers_cpp.layer_norm(x, weight, torch.zeros(32), 1e-5, torch.float32, 16)
        found.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def linear_maps(num_tokens, *widths, dtype=torch.bfloat16):
    """Input, weights and biases, then the gradient of the output."""
    torch.manual_seed(num_tokens)
    pairs = [(torch.randn(out, width, dtype=dtype) / width**0.5, torch.randn(out)) for width, out in pairwise(widths)]
    inputs = [torch.randn(num_tokens, widths[0], dtype=dtype), *sum(pairs, ())]
    return [x.requires_grad_() for x in inputs], torch.randn(num_tokens, widths[-1], dtype=dtype)


def value_and_gradients(function, inputs, grad):
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, [x for x in inputs if x.requires_grad], grad)


def plain_mlp(x, weight_1, bias_1, weight_2, bias_2):
    return F.linear(F.gelu(F.linear(x, weight_1, bias_1.to(x.dtype))), weight_2, bias_2.to(x.dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 131])
@pytest.mark.parametrize("widths", [(32, 96), (96, 32), (48, 48), (32, 80, 32)], ids=str)
def test_linear_maps(widths, num_tokens):
    """In BF16: as near to the exact result as PyTorch's own operations."""
    if not layers_cpp.has_bfloat16(16):
        pytest.skip("this processor has no BF16 products")
    kernel, plain = (
        (lambda *inputs: layers_cpp.linear(*inputs, 16), lambda x, weight, bias: F.linear(x, weight, bias.to(x.dtype)))
        if len(widths) == 2
        else (lambda *inputs: layers_cpp.mlp(*inputs, 16)[0], plain_mlp)
    )
    inputs, grad = linear_maps(num_tokens, *widths)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    results = [value_and_gradients(kernel, inputs, grad), value_and_gradients(plain, inputs, grad)]
    results.append(value_and_gradients(plain, exact_inputs, grad.double()))
    for found, other, exact in zip(*results, strict=True):
        assert found.dtype == other.dtype and found.is_contiguous() and found.shape == exact.shape
        if not exact.any():  # of no tokens
            assert not found.any()
            continue
        assert error(found, exact) < 1.5 * error(other, exact) + 1e-6


@pytest.mark.parametrize(
    ("cpu", "capability", "built", "through_onednn"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("GenuineIntel", "AVX512", True, False),
    ],
)
def test_where_onednn_is_faster_in_float32(cpu, capability, built, through_onednn, monkeypatch):
    monkeypatch.setattr(layers_cpp.Path, "read_text", lambda path: f"vendor_id\t: {cpu}\nflags\t: fpu\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    assert layers_cpp.onednn_in_float32.__wrapped__() == through_onednn


@pytest.fixture(params=[True, False], ids=["oneDNN", "PyTorch"])
def through_onednn(request, monkeypatch):
    """Whether FP32 products are oneDNN's, on any processor."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(layers_cpp, "onednn_in_float32", lambda: request.param)
    return request.param


@pytest.mark.parametrize("frozen", [(), (1,), (2,), (1, 2), (0,)], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 131])
@pytest.mark.parametrize("widths", [(32, 96), (96, 32), (48, 48)], ids=str)
def test_linear_maps_in_float32(through_onednn, widths, num_tokens, frozen, monkeypatch):
    inputs, grad = linear_maps(num_tokens, *widths, dtype=torch.float32)
    for place in frozen:
        inputs[place].requires_grad_(False)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    products, plain = [], layers_cpp._linear
    monkeypatch.setattr(layers_cpp, "_linear", lambda *given: products.append(given) or plain(*given))
    found = value_and_gradients(layers_cpp.Kernels(16).linear, inputs, grad)
    if num_tokens or not through_onednn:
        assert len(products) == (0 if not through_onednn else 2 if frozen == (1, 2) else 3)
    for ours, theirs in zip(found, value_and_gradients(F.linear, exact, grad.double()), strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=CLOSE[torch.float32] * max(1, num_tokens**0.5))


def test_shapes_and_types_of_linear_maps(through_onednn):
    """Batches of rows, gradients that lie apart, other types, and NaN, which must stay in its row."""
    inputs, grad = linear_maps(6, 32, 48, dtype=torch.float32)
    linear = layers_cpp.Kernels(16).linear
    plain = value_and_gradients(linear, inputs, grad)
    three = value_and_gradients(lambda x, *weights: linear(x.view(2, 3, 32), *weights), inputs, grad.view(2, 3, 48))
    apart = value_and_gradients(linear, inputs, grad.T.contiguous().T)
    for one, other, another in zip(plain, three, apart, strict=True):
        torch.testing.assert_close(other.view_as(one), one)
        torch.testing.assert_close(another, one)
    with torch.autocast("cpu", torch.float16):
        assert linear(*inputs).dtype == torch.float16
    with pytest.raises(RuntimeError, match="dtype"):
        linear(inputs[0], inputs[1].double(), inputs[2])
    inputs[0].data[3, 5] = float("nan")
    y, of_x, *_ = value_and_gradients(linear, inputs, grad)
    assert torch.equal(y.isnan().any(1), torch.arange(6) == 3) and of_x.isfinite().all()


def test_a_second_derivative_is_refused(through_onednn):
    """With frozen weights too; PyTorch's products have one."""
    for frozen in (False, True):
        inputs, grad = linear_maps(6, 32, 48, dtype=torch.float32)
        inputs[1].requires_grad_(not frozen), inputs[2].requires_grad_(not frozen)
        y = layers_cpp.Kernels(16).linear(*inputs)
        (of_x,) = torch.autograd.grad(y, inputs[0], grad.requires_grad_(), create_graph=True)
        if not through_onednn:
            of_x.sum().backward()
            continue
        with pytest.raises(RuntimeError, match="no autograd formula"):
            of_x.sum().backward()


@pytest.mark.parametrize("asking", [None, torch.arange(3, 60, 7)], ids=["all", "some"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_in_float32_is_one_graph(through_onednn, frozen, asking, monkeypatch):
    torch._dynamo.reset()
    layer = layers_cpp.TransformerLayer(64, 160, 4, 1e-5)
    for name, x in layer.named_parameters():
        torch.nn.init.normal_(x, std=0.1)
        x.requires_grad_(not (frozen and "layer_norm" not in name))
    monkeypatch.setattr(layers_cpp, "onednn_in_float32", None)  # nothing that torch.compile cannot follow is asked now
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    x_TE, inputs = torch.randn(60, 64, requires_grad=True), attention_inputs((20, 40), 16)
    leaves = [x_TE, *(x for x in layer.parameters() if x.requires_grad)]
    grad = torch.randn(60 if asking is None else len(asking), 64)
    found, plain = ((y.detach(), *torch.autograd.grad(y, leaves, grad))
                    for y in (compiled(x_TE, inputs, asking), layer(x_TE, inputs, asking)))  # fmt: skip
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_gelu_everywhere():
    """Value and derivative at every BF16 number of up to +-16, through the kernels' own formula for erf."""
    if not layers_cpp.has_bfloat16(16):
        pytest.skip("this processor has no BF16 products")
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x_TE = numbers[numbers.abs() <= 16].repeat_interleave(16).view(-1, 16)
    identity, zero = torch.eye(16, dtype=torch.bfloat16), torch.zeros(16)
    inputs = [x.requires_grad_() for x in (x_TE, identity, zero)]
    y, _ = layers_cpp.mlp(inputs[0], *inputs[1:], identity, zero, 16)
    (derivative,) = torch.autograd.grad(y, inputs[0], torch.ones_like(y))
    exact_x = x_TE.detach().double().requires_grad_()
    exact_y = F.gelu(exact_x)
    (exact_derivative,) = torch.autograd.grad(exact_y, exact_x, torch.ones_like(exact_y))
    for found, exact in ((y.detach(), exact_y.detach()), (derivative, exact_derivative)):
        assert ((found.double() - exact).abs() <= exact.abs() / 2**8 + 1e-6).all()


def test_gelu_far_out():
    if not layers_cpp.has_bfloat16(16):
        pytest.skip("this processor has no BF16 products")
    x_TE = torch.tensor([[float("inf"), 3e38, 70, -70, -3e38, float("nan"), *[0] * 10]]).bfloat16()
    y_TE = torch.empty_like(x_TE)
    layers_cpp._call(16, "gelu_bfloat16", x_TE, y_TE, *x_TE.shape)
    assert torch.equal(y_TE[0, :3], x_TE[0, :3])
    assert y_TE[0, 3:5].abs().max() < 1e-15
    assert y_TE[0, 5].isnan() and (y_TE[0, 6:] == 0).all()


@pytest.fixture
def compiled_with(monkeypatch):
    """Compiles the kernels anew with more flags; skips where the compiler does not know them."""
    caches = layers_cpp.library, layers_cpp.has_bfloat16

    def clear():
        for cache in caches:
            cache.cache_clear()

    def compile_with(*flags, included=()):
        command = [*shlex.split(compile_cpp.get_cxx_compiler()), *flags, "-E", "-x", "c++", os.devnull]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"this compiler does not know {' '.join(flags)}")  # AMX came with gcc 11
        monkeypatch.setattr(compile_cpp, "FLAGS", (*compile_cpp.FLAGS, *flags, *included))
        clear()

    yield compile_with
    clear()


AMX = ("-mamx-tile", "-mamx-bf16")


@pytest.mark.parametrize("flags", [AMX, ("-mno-amx-bf16",), ("-mno-avx512bf16",), ("-mno-avx512f",)], ids=" ".join)
def test_other_compilers_and_processors(compiled_with, flags):
    """The kernels are compiled with AMX, which this processor may not have, or without some of what it can do."""
    remains = layers_cpp.has_bfloat16(24) and "avx512" not in flags[0]
    compiled_with(*flags)
    assert layers_cpp.has_bfloat16(24) == remains
    for dtype in (torch.float32, torch.bfloat16) if remains else (torch.float32,):
        test_attention(24, dtype)
        test_attention(64, dtype)
        agrees_with_attention_of_all(torch.tensor(ASKING["few"]), 24, dtype)
        with_dropout(24, dtype)
    test_layer_norm((torch.float32, torch.bfloat16))


def attention_of_two_sequences(dim):
    torch.manual_seed(0)
    qkv, grad = torch.randn(200, 2, 3 * dim).bfloat16().requires_grad_(), torch.randn(200, 2, dim).bfloat16()
    return attention_and_gradient(layers_cpp.Kernels(dim), qkv, attention_inputs((130, 70), dim), grad)


@pytest.mark.parametrize("dim", [14, 24, 64])
def test_tiles(compiled_with, dim):
    """What is written for AMX, with tiles in plain C++, whether the processor has them or not."""
    if not layers_cpp.has_bfloat16(dim):
        pytest.skip("this processor has no BF16 products")
    plain, tiles = attention_of_two_sequences(dim), Path(__file__).with_name("tiles.h")
    version = f"-DTILES={zlib.crc32(tiles.read_bytes())}"  # or else what another one made would be found again
    compiled_with(*AMX, included=("-include", str(tiles), version))
    for x, y in zip(attention_of_two_sequences(dim), plain, strict=True):
        assert error(x, y.double()) < 1e-2
    assert ctypes.c_long.in_dll(layers_cpp.library(dim), "tile_products").value > 0
    test_attention(dim, torch.bfloat16)
    agrees_with_attention_of_all(torch.tensor(ASKING["few"]), dim, torch.bfloat16)
    with_dropout(dim, torch.bfloat16)
    not_a_number_comes_through(dim, torch.bfloat16)


def with_dropout(dim, dtype):
    from test_dropout_draws import agrees_with_the_reference, rows_agree

    agrees_with_the_reference(dim, dtype, 0.3)
    rows_agree(33, dtype)


def not_a_number_comes_through(dim, dtype):
    """Only where it belongs, in each of two heads and sequences, whichever keys are looked at together."""
    for part, token in product(range(3), (5, 32, 40, 71)):
        qkv = torch.randn(100, 2, 3 * dim)
        qkv[token, 1, part * dim] = float("nan")
        own = slice(70) if token < 70 else slice(70, 100)
        qkv, grad = qkv.to(dtype).requires_grad_(), torch.ones(100, 2, dim, dtype=dtype)
        found = attention_and_gradient(layers_cpp.Kernels(dim), qkv, attention_inputs((70, 30), dim), grad)
        context, grad_qkv = (x.isnan() for x in found)
        reached = torch.zeros_like(context)
        if part == 0:  # its own row
            reached[token, 1] = True
        elif part == 1:  # all rows
            reached[own, 1] = True
        else:  # one channel of all
            reached[own, 1, 0] = True
        assert torch.equal(context, reached)
        assert grad_qkv[token, 1].any() and not grad_qkv[:, 0].any()
        grad_qkv[own] = False
        assert not grad_qkv.any()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("dim", [14, 16, 24])
def test_not_a_number_comes_through_attention(dim, dtype):
    if dtype == torch.bfloat16 and not layers_cpp.has_bfloat16(dim):
        pytest.skip("this processor has no BF16 products")
    torch.manual_seed(0)
    not_a_number_comes_through(dim, dtype)


def test_not_a_number_comes_through_all_else():
    for dtype in CLOSE:
        if dtype == torch.bfloat16 and layers_cpp.has_bfloat16(16):
            inputs, grad = linear_maps(40, 32, 64, 32)  # oneDNN's own products mix up rows of other widths
            inputs[0].data[3, 5] = float("nan")
            y, _ = layers_cpp.mlp(*inputs, 16)
            reached = torch.zeros(40, 32, dtype=torch.bool)
            reached[3] = True
            assert torch.equal(y.isnan(), reached)
            assert torch.equal(torch.autograd.grad(y, inputs[0], grad)[0].isnan(), reached)
        x = torch.tensor([[float("nan"), 1.0]], dtype=dtype)
        assert layers_cpp.layer_norm(x, torch.ones(2), torch.zeros(2), 1e-5, dtype, 16)[0].isnan().all()


WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["as made", "copied", "pickled"])  # fmt: skip
def test_the_feed_forward_part_is_one_operator(copied, monkeypatch):
    """In a copy too; not where another product has been put in its place."""
    if not layers_cpp.has_bfloat16(16):
        pytest.skip("this processor has no BF16 products")
    calls, mlp = [], layers_cpp.mlp
    monkeypatch.setattr(layers_cpp, "mlp", lambda *given: calls.append(1) or mlp(*given))
    layer, inputs = copied(layers_cpp.TransformerLayer(64, 160, 4, 1e-5)).bfloat16(), attention_inputs((20, 40), 16)
    for x in layer.parameters():
        torch.nn.init.normal_(x, std=0.1)
    layer(torch.randn(60, 64).bfloat16(), inputs)
    assert len(calls) == 1
    layer.layernorm_mlp.matmul = F.linear
    layer(torch.randn(60, 64).bfloat16(), inputs)
    assert len(calls) == 1


@pytest.mark.parametrize("size", [ODD, WIDE], ids=["odd", "wide"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_whole_models_agree(make_model, make_batches, through_onednn, layout, checkpointing, size, monkeypatch):
    batch, steps, products, product = make_batches((40, 200, 90))[layout], [], [], layers_cpp._linear
    monkeypatch.setattr(layers_cpp, "_linear", lambda *given: products.append(given) or product(*given))
    for backend in ("torch", "cpp"):
        model = make_model(size, layer_backend=backend)
        if checkpointing:
            model.activation_checkpointing_enable()
        loss = model(**batch).loss
        loss.backward()
        steps.append((loss.detach(), [x.grad for x in model.parameters()]))
    assert bool(products) == (through_onednn and size == WIDE)  # widths that do not divide by 16 stay PyTorch's
    torch.testing.assert_close(steps[0][0], steps[1][0], rtol=1e-6, atol=0)
    for plain, compiled in zip(steps[0][1], steps[1][1], strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["stored", "recomputed", "compiled"])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_whole_models_in_bfloat16(make_model, make_batches, layout, way):
    """As near to FP32 as PyTorch's operations are."""
    if not layers_cpp.has_bfloat16(16):
        pytest.skip("this processor has no BF16 products")
    batch, gradients = make_batches((40, 200, 90))[layout], []
    for backend, dtype in (("torch", torch.float32), ("torch", torch.bfloat16), ("cpp", torch.bfloat16)):
        model = make_model(WIDE, layer_backend=backend)
        if backend == "cpp" and way == "recomputed":
            model.activation_checkpointing_enable()
        if backend == "cpp" and way == "compiled":
            for layer in model.esm.encoder.layer:
                layer.compile(dynamic=True)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]).double())
    exact, plain, compiled = gradients
    assert 0 < (compiled - exact).norm() < 1.2 * (plain - exact).norm() < 0.1 * exact.norm()


def test_all_modules_are_called(make_model, make_batches):
    """What hangs on a module, as the search for the first that gives no number does, must see it."""
    called = []
    for backend in ("torch", "cpp"):
        model, seen = make_model(WIDE, layer_backend=backend), []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        model(**make_batches()[1])
        called.append(seen)
    assert called[0] == called[1] and "esm.encoder.layer.1.layernorm_mlp" in called[1]


def test_denormal_numbers_stay():
    """Loading the kernels must not change how the process computes."""
    layers_cpp.library(16)
    assert (torch.tensor([1e-39]) * 0.5).item() > 0


def test_borders_that_do_not_fit_are_refused():
    kernels, inputs, qkv = layers_cpp.Kernels(16), attention_inputs((20, 30), 16), torch.randn(50, 2, 48)
    expected = kernels.attention(qkv, inputs)
    inputs.cu_seqlens = torch.tensor([0, 20, 50])
    assert torch.equal(kernels.attention(qkv, inputs), expected)  # int64 will do
    for wrong in ([0, 20, 49], [0, 20, 51], [1, 20, 50], [0, 31, 20, 50], [0, 50]):
        inputs.cu_seqlens = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match="must rise from 0 to the 50 tokens, by at most max_seqlen 30 each"):
            kernels.attention(qkv, inputs)


def test_selected_tokens_that_do_not_fit_are_refused():
    kernels, inputs, qkv = layers_cpp.Kernels(16), attention_inputs((20, 30), 16), torch.randn(50, 2, 48)
    expected = kernels.attention(qkv, inputs)
    assert torch.equal(kernels.attention(qkv, inputs, torch.arange(0, 50, 3, dtype=torch.int32)), expected[::3])
    for wrong, at, number in (([-1, 3], 0, -1), ([3, 3], 1, 3), ([2, 4, 3], 2, 3), ([3, 50], 1, 50), ([50], 0, 50)):
        with pytest.raises(ValueError, match=f"to below 50; they do not at number {at}, which is {number}"):
            kernels.attention(qkv, inputs, torch.tensor(wrong))


def test_float16_goes_the_plain_way(make_model, make_batches):
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert make_model(layer_backend="cpp")(**make_batches()[1]).loss.isfinite()


def test_operators_keep_torchs_rules():
    """What torch.compile relies on: shapes without data, no hidden change of inputs, gradients registered."""
    cases = (
        (layers_cpp.attention, (torch.randn(50, 3, 48, requires_grad=True), torch.rand(30, 8), torch.rand(30, 8),
                                torch.tensor([0, 20, 50], dtype=torch.int32), None)),
        (layers_cpp.attention, (torch.randn(50, 3, 48, requires_grad=True), torch.rand(30, 8), torch.rand(30, 8),
                                torch.tensor([0, 20, 50], dtype=torch.int32), torch.arange(0, 50, 3))),
        (layers_cpp.attention, (torch.randn(50, 3, 48, requires_grad=True), torch.rand(30, 8), torch.rand(30, 8),
                                torch.tensor([0, 20, 50], dtype=torch.int32), None,
                                torch.arange(50, dtype=torch.int32), 0.1, 2)),
        (layers_cpp.drop, (torch.randn(70, 33, requires_grad=True), torch.arange(70, dtype=torch.int32), 1, 0.1, 16)),
        (layers_cpp.layer_norm, (torch.randn(70, 33, requires_grad=True), torch.rand(33, requires_grad=True),
                                 torch.rand(33, requires_grad=True), 1e-5, torch.float32, 16)),
        (layers_cpp.add_layer_norm, (*(torch.randn(70, 33, requires_grad=True) for _ in range(2)),
                                     *(torch.rand(33, requires_grad=True) for _ in range(2)), 1e-5, 16)),
    )  # fmt: skip
    dtypes = (torch.float32, torch.bfloat16) if layers_cpp.has_bfloat16(16) else (torch.float32,)
    for dtype in dtypes:
        cases += (
            (layers_cpp.linear, (*linear_maps(70, 32, 96, dtype=dtype)[0], 16)),
            (layers_cpp.linear, (*linear_maps(70, 96, 32, dtype=dtype)[0], 16)),
        )
    if torch.bfloat16 in dtypes:
        cases += ((layers_cpp.mlp, (*linear_maps(70, 32, 96, 32)[0], 16)),)
    for operator, inputs in cases:
        assert set(torch.library.opcheck(operator, inputs).values()) == {"SUCCESS"}


def test_one_file_for_all_ranks(monkeypatch, tmp_path):
    """Compiled once, moved into place whole."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    layers_cpp.library.cache_clear()
    first = layers_cpp.library(6)
    made = list(tmp_path.iterdir())
    changed = made[0].stat().st_mtime_ns
    layers_cpp.library.cache_clear()
    assert layers_cpp.library(6) is not first
    assert list(tmp_path.iterdir()) == made and made[0].stat().st_mtime_ns == changed
    layers_cpp.library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "told"), [("no_such_compiler", "there is no C\\+\\+ compiler"), ("false", "false fails: no reason")]
)
def test_without_a_compiler(monkeypatch, tmp_path, compiler, told):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RuntimeError, match=told):
        layers_cpp.library(8)
    assert not list(tmp_path.iterdir())
