# SPDX-License-Identifier: Apache-2.0
"""What a run says of its machine."""

import torch

from common.run_facts import measured_tflops


def test_rates_are_measured():
    assert 1e-3 < measured_tflops(torch.float32) < 100
