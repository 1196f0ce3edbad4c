# SPDX-License-Identifier: Apache-2.0
"""What `precision: auto` resolves to, and where a forward pass runs in BF16."""

import pytest
import torch

from common.precision import Precision


CPU = torch.device("cpu")


@pytest.mark.parametrize("bf16_pays", [False, True])
@pytest.mark.parametrize("avx512_bf16", [False, True])
def test_auto_takes_what_is_faster_on_such_a_cpu(monkeypatch, bf16_pays, avx512_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert Precision(CPU, "auto", bf16_pays).dtype == (torch.bfloat16 if bf16_pays and avx512_bf16 else None)
    assert Precision(CPU, "bf16", bf16_pays).dtype == torch.bfloat16
    assert Precision(CPU, "fp32", bf16_pays).dtype is None


@pytest.mark.parametrize("supported", [False, True])
def test_auto_takes_bf16_on_every_gpu_that_has_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert Precision(torch.device("cuda", 0), "auto", False).dtype == (torch.bfloat16 if supported else None)


@pytest.mark.parametrize(
    ("precision", "autocast", "dtype"),
    [("bf16", True, torch.bfloat16), ("bf16", False, torch.float32), ("fp32", True, torch.float32)],
)
def test_a_forward_pass_is_cast_where_no_strategy_does_it(precision, autocast, dtype):
    model = torch.nn.Linear(4, 4)
    chosen = Precision(CPU, precision, False)
    chosen.prepare([model])
    with chosen.forward(autocast=autocast):
        assert model(torch.ones(1, 4)).dtype == dtype
    assert model.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert (chosen.multiple, chosen.notes, chosen.layers) == (1, [], {}) and chosen.stats is chosen.backend is None
