# SPDX-License-Identifier: Apache-2.0
"""The model against the loop-written reference, in all layouts and on all layers that a CPU has."""

import copy

import pytest
import reference
import torch
from conftest import EVEN, ODD, published_weights

from convert_amplify import from_native
from modeling_amplify import SIZES, AmplifyConfig, AmplifyForMaskedLM, training_flops
from tokens.backends import cpp_available
from tokens.masked_lm import init_parameters


CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
compiled = pytest.mark.skipif(not cpp_available(16)[0], reason="no kernels can be compiled here")


def published_gradients(model):
    gradients = {name: x.grad for name, x in model.named_parameters()}
    return dict(from_native(gradients, model.config, "amplify"))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=compiled)])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [ODD, EVEN], ids=["odd", "even"])
def test_loss_logits_and_gradients(make_model, make_batches, size, dtype, layout, backend):
    model, batches = make_model(size, layer_backend=backend).to(dtype), make_batches()
    weights = {name: x.double() for name, x in published_weights(model.config).items()}
    loss, gradients = reference.loss_and_gradients(weights, size["num_attention_heads"], batches[0])
    output = model(**batches[layout])
    output.loss.backward()
    close = {"rtol": 0, "atol": CLOSE[dtype], "check_dtype": False}
    torch.testing.assert_close(output.loss.detach(), loss, **close)
    found = published_gradients(model)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() < CLOSE[dtype] * max(1, gradient.abs().max()), name
    inputs = {key: value for key, value in batches[layout].items() if key != "labels"}
    logits = model(**inputs).logits.detach()
    first = logits[0, :17] if layout == 0 else logits[:17]
    expected = reference.logits(weights, size["num_attention_heads"], batches[1]["input_ids"][:17])
    torch.testing.assert_close(first, expected, **close)


@compiled
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_bf16(make_model, make_batches, layout):
    """The kernels are no farther from FP32 than PyTorch's own BF16."""
    exact, plain, fast = (make_model(EVEN, layer_backend=name) for name in ("torch", "torch", "cpp"))
    batch = make_batches((40, 100, 90))[layout]
    exact(**batch).loss.backward()
    errors = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append(sum((x.grad - y.grad).square().sum() / y.grad.square().sum() for x, y in pairs))
    assert 0 < errors[1] < 1.5 * errors[0] and errors[0] < 1


@compiled
@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}], ids=["stored", "recomputed"])
def test_compiled_and_recomputed_layers_agree(make_model, make_batches, options):
    _, packed = make_batches()
    plain, other = make_model(EVEN, layer_backend="cpp"), make_model(EVEN, layer_backend="cpp")
    if options:
        other.activation_checkpointing_enable(options)
    else:
        other = copy.deepcopy(other)
    for model in (plain, other):
        model.train()(**packed).loss.backward()
    for x, y in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


def test_extra_padding_changes_nothing(make_model, make_batches):
    model = make_model()
    losses = [model(**make_batches(align=align)[1]).loss for align in (1, 32)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_published_sizes():
    with torch.device("meta"):
        numbers = {name: AmplifyForMaskedLM(AmplifyConfig(**size)).num_parameters() for name, size in SIZES.items()}
    assert {name: round(n / 1e6) for name, n in numbers.items()} == {
        "AMPLIFY_1M": 1, "AMPLIFY_10M": 11, "AMPLIFY_120M": 118, "AMPLIFY_350M": 354,
    }  # fmt: skip
    assert SIZES["AMPLIFY_120M"]["intermediate_size"] == 1712 and SIZES["AMPLIFY_350M"]["intermediate_size"] == 2560


def test_first_weights():
    model = AmplifyForMaskedLM(AmplifyConfig(**ODD))
    init_parameters(model, seed=3)
    for name, x in model.named_parameters():
        if x.ndim == 1:
            assert (x == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert 0.019 < x.max() <= 0.02 and -0.02 <= x.min() < -0.019 and abs(x.mean()) < 0.002, name
    assert model.amplify.embeddings.weight[0].any()  # padding too
    again = AmplifyForMaskedLM(AmplifyConfig(**ODD))
    init_parameters(again, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_flops_are_what_torch_counts(make_model, make_batches):
    from torch.utils.flop_counter import FlopCounterMode

    model, (padded, _) = make_model(layer_backend="torch"), make_batches((30, 30))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(padded["input_ids"])
    counts = {"tokens": 60, "labels": 60, "token_pairs": 2 * 30**2}
    assert training_flops(model.config, counts) == pytest.approx(3 * counter.get_total_flops(), rel=1e-3)
