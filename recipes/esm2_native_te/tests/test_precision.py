# SPDX-License-Identifier: Apache-2.0
"""What `precision: auto` resolves to on CPUs."""

import pytest
import torch

import precision
from modeling_esm2 import SIZES, Esm2Config
from precision import Precision


@pytest.mark.parametrize(
    ("size", "amx", "avx512_bf16", "dtype"),
    [
        ("esm2_t4_1M", True, True, None),
        ("esm2_t6_8M_UR50D", True, True, torch.bfloat16),
        ("esm2_t6_8M_UR50D", False, True, None),
        ("esm2_t12_35M_UR50D", False, True, torch.bfloat16),
        ("esm2_t33_650M_UR50D", False, False, None),
    ],
)
def test_auto_takes_what_is_faster_on_such_a_cpu(monkeypatch, size, amx, avx512_bf16, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    config = Esm2Config(**SIZES[size], layer_backend="torch")
    assert Precision(torch.device("cpu"), "auto", config).dtype == dtype
    assert Precision(torch.device("cpu"), "bf16", config).dtype == torch.bfloat16
    assert Precision(torch.device("cpu"), "fp32", config).dtype is None


def test_rates_are_measured():
    assert 1e-3 < precision.measured_tflops(torch.float32) < 100
