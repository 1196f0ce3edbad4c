# SPDX-License-Identifier: Apache-2.0
"""What `precision: auto` resolves to on CPUs."""

import pytest
import torch

import precision
from modeling_esm2 import SIZES, Esm2Config
from precision import Precision


@pytest.mark.parametrize(
    ("size", "rates", "dtype"),
    [
        ("esm2_t6_8M_UR50D", {torch.float32: 0.3, torch.bfloat16: 3.0}, torch.bfloat16),
        ("esm2_t6_8M_UR50D", {torch.float32: 0.3, torch.bfloat16: 0.4}, None),
        ("esm2_t33_650M_UR50D", {torch.float32: 0.3, torch.bfloat16: 0.2}, None),
        ("esm2_t4_1M", {torch.float32: 0.3, torch.bfloat16: 3.0}, None),
    ],
)
def test_auto_takes_what_is_faster_for_wide_models(monkeypatch, size, rates, dtype):
    monkeypatch.setattr(precision, "measured_tflops", rates.__getitem__)
    config = Esm2Config(**SIZES[size], layer_backend="torch")
    assert Precision(torch.device("cpu"), "auto", config).dtype == dtype
    assert Precision(torch.device("cpu"), "bf16", config).dtype == torch.bfloat16
    assert Precision(torch.device("cpu"), "fp32", config).dtype is None


def test_rates_are_measured():
    assert 1e-3 < precision.measured_tflops(torch.float32) < 100
