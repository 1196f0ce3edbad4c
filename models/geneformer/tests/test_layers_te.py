# SPDX-License-Identifier: Apache-2.0
"""TransformerEngine's layers against the plain ones; needs a GPU and TransformerEngine."""

import pytest
import torch
from conftest import BIONEMO, ODD, PUBLISHED

from common.weights import copy_parameters, named_tensors
from modeling_geneformer import GeneformerConfig, GeneformerForMaskedLM
from tokens.backends import te_available


available, reason = te_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available, reason=reason)]

SIZE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
FAMILIES = {
    "published": PUBLISHED | {"max_position_embeddings": 256},
    "bionemo": BIONEMO | {"max_position_embeddings": 256},
}


@pytest.fixture(params=FAMILIES)
def models(make_models, request):
    """The same weights in both backends, on the GPU."""
    options = FAMILIES[request.param]
    plain, _ = make_models(SIZE, **options, layer_backend="torch")
    with torch.device("meta"):
        fast = GeneformerForMaskedLM(GeneformerConfig(**options, **SIZE, layer_backend="te"))
    fast.to_empty(device="cuda")
    copy_parameters(fast, plain.state_dict())
    return plain.cuda(), fast


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [ODD, SIZE], ids=["odd", "even"])
def test_names_and_shapes(size, family):
    options = {**FAMILIES[family], **size}
    with torch.device("meta"):
        plain, fast = (
            GeneformerForMaskedLM(GeneformerConfig(**options, layer_backend=name)) for name in ("torch", "te")
        )
    shapes = [{name: (x.shape, x.dtype) for name, x in named_tensors(model).items()} for model in (plain, fast)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_loss_and_gradients(models, make_batches, layout, checkpointing):
    batch = make_batches((40, 200, 90), align=16)[layout]
    batch = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    losses = []
    for model in models:
        if checkpointing:
            model.activation_checkpointing_enable()
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01, atol=0)
    plain, fast = (dict(model.named_parameters()) for model in models)
    # One by one: on some GPUs only gradients of packed batches were wrong.
    for name in plain:
        left, right = plain[name].grad.flatten(), fast[name].grad.flatten()
        assert torch.cosine_similarity(left, right, dim=0) > 0.99, name
        torch.testing.assert_close(left.norm(), right.norm(), rtol=0.05, atol=1e-4, msg=name)


@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_selected_tokens(models, make_batches, layout):
    """In both backends as if all tokens had been asked for, and the others left aside."""
    batch = make_batches((40, 200, 90), align=16)[layout]
    num_tokens = batch.pop("labels").numel()
    batch = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    for model in models:
        gradients = []
        for selected in (torch.arange(3, num_tokens, 7, device="cuda"), None):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                x_WE = model.geneformer(**batch, selected_W=selected).last_hidden_state
            if selected is None:
                x_WE = x_WE.flatten(0, -2)[3::7]
            (x_WE.float() * torch.linspace(-1, 1, x_WE.numel(), device="cuda").view(x_WE.shape)).sum().backward()
            gradients.append(torch.cat([x.grad.flatten() for x in model.geneformer.layer.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_padded_and_packed_agree(models, make_batches):
    _, model = models
    losses = []
    for batch in make_batches((40, 200, 90)):
        batch = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        with torch.autocast("cuda", torch.bfloat16):
            losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01, atol=0)
