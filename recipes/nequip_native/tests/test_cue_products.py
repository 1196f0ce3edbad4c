# SPDX-License-Identifier: Apache-2.0
"""cuEquivariance gives the numbers of plain PyTorch, and all gradients, by its own form for CPUs.

It runs where that package is: pip install cuequivariance-torch, which needs no GPU.
"""

import pytest
import torch
from test_faster_ways import answers, batch, built, once_and_row

from atoms import cue_products
from atoms.kernels import products
from atoms.tensor_product import TORCH


@pytest.mark.parametrize("name", ["nequip", "with parity", "allegro"])
def test_it_gives_one_answer(name):
    pytest.importorskip("cuequivariance_torch")
    model, inputs = built(name), batch(0, 3, 5)
    plain, shared = answers(model, inputs), inputs | once_and_row(inputs)
    for given in (inputs, shared):
        model.kernels = cue_products.products_by("naive")
        for expected, found in zip(plain, answers(model, given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["nequip", "with parity", "allegro"])
def test_its_kernels_give_one_answer(name):
    if package := cue_products.missing():
        pytest.skip(f"{package} is not installed")
    device = torch.device("cuda")
    model, inputs = built(name).to(device), {k: v.to(device) for k, v in batch(0, 3, 5).items()}
    plain = answers(model, inputs)
    model.kernels = products("cue", device)[0]
    for expected, found in zip(plain, answers(model, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_it_is_asked_for_where_it_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match=r"layer_backend=cue needs an NVIDIA GPU, and this is cpu"):
        products("cue", torch.device("cpu"))
    monkeypatch.setattr(cue_products, "PACKAGES", ("a_package_that_nobody_has",))
    with pytest.raises(ValueError, match=r"needs the package a_package_that_nobody_has: pip install -r"):
        products("cue", torch.device("cuda"))
    assert products("torch", torch.device("cuda"))[0] is TORCH
