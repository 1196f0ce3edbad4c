# SPDX-License-Identifier: Apache-2.0
"""What a run says of its machine."""

import time

import torch
import torch.nn.functional as F

from common.run_facts import measured_tflops


def test_rates_are_measured():
    assert 1e-3 < measured_tflops(torch.float32, F.linear) < 100


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    def slow(*_):
        time.sleep(0.02)

    def instant(x, weight):
        return x

    monkeypatch.setattr(torch, "mm", slow)
    assert measured_tflops(torch.float32, instant) > 100 * measured_tflops(torch.float32, slow)
