# SPDX-License-Identifier: Apache-2.0
"""Published weights that hide nothing, models of them, and batches in both layouts."""

import os
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from convert_amplify import from_native, to_native
from modeling_amplify import AmplifyConfig, AmplifyForMaskedLM


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Sizes that are not powers of two, so that a wrong reshape cannot pass.
ODD = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 56}
EVEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")


def published_weights(config: AmplifyConfig) -> dict[str, torch.Tensor]:
    """Random FP32 weights in the published format; no norm is the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {
            k: x.shape for k, x in from_native(AmplifyForMaskedLM(config).state_dict(), config, "amplify").items()
        }
    return {
        name: torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1 and "norm" in name)
        for name, shape in shapes.items()
    }


@pytest.fixture
def make_model():
    def make(size: dict = ODD, **options) -> AmplifyForMaskedLM:
        """A model with `published_weights`."""
        config = AmplifyConfig(**size, **options)
        model = AmplifyForMaskedLM(config)
        model.load_state_dict(to_native(published_weights(config), config, "amplify"))
        return model

    return make


@pytest.fixture
def make_batches():
    def make(lengths=(17, 5, 30), align=1) -> tuple[dict, dict]:
        """The same proteins padded and packed; `align` adds pad tokens as a last sequence up to a multiple of it."""
        generator = torch.Generator().manual_seed(1)
        proteins = [torch.randint(5, 27, (length,), generator=generator) for length in lengths]
        labels = []
        for protein in proteins:
            protein[0], protein[-1] = 3, 4
            chosen = torch.rand(len(protein), generator=generator) < 0.2
            chosen[[0, -1]] = False
            labels.append(protein.where(chosen, -100))
            protein[chosen & (torch.arange(len(protein)) % 2 == 0)] = 2
        padded = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(proteins, True, 0),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, True, -100),
        }
        padded["attention_mask"] = (padded["input_ids"] != 0).long()
        num_pads = -sum(lengths) % align
        lengths = [*lengths, *([num_pads] if num_pads else [])]
        packed = {
            "input_ids": torch.cat([*proteins, torch.full((num_pads,), 0)]),
            "labels": torch.cat([*labels, torch.full((num_pads,), -100)]),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "max_seqlen": max(lengths),
        }
        return padded, packed

    return make
