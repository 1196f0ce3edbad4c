# SPDX-License-Identifier: Apache-2.0
"""Models with weights that hide nothing, and batches in both layouts."""

import os
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_esm2 import Esm2Config, Esm2ForMaskedLM


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Sizes that are not powers of two, so that a wrong reshape cannot pass.
ODD = {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 91}


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")


@pytest.fixture
def make_model():
    def make(size: dict = ODD, **options) -> Esm2ForMaskedLM:
        """A model in which no norm is the identity and no bias is 0."""
        torch.manual_seed(0)
        model = Esm2ForMaskedLM(Esm2Config(**size, **options))
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x += 0.05 * torch.randn_like(x)
            model.esm.embeddings.word_embeddings.weight[model.config.vocab_size :] = 0
        return model

    return make


@pytest.fixture
def make_batches():
    def make(lengths=(17, 5, 30), masked_share=0.2, align=1) -> tuple[dict, dict]:
        """The same proteins padded and packed; `align` adds pad tokens as a last sequence up to a multiple of it."""
        generator = torch.Generator().manual_seed(1)
        proteins = [torch.randint(4, 24, (length,), generator=generator) for length in lengths]
        labels = []
        for protein in proteins:
            protein[0], protein[-1] = 0, 2
            chosen = torch.rand(len(protein), generator=generator) < masked_share
            chosen[[0, -1]] = False
            labels.append(protein.where(chosen, -100))
            # Every other chosen token stays visible: ratios of <mask> and of labels differ.
            protein[chosen & (torch.arange(len(protein)) % 2 == 0)] = 32
        padded = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(proteins, True, 1),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, True, -100),
        }
        padded["attention_mask"] = (padded["input_ids"] != 1).long()
        num_pads = -sum(lengths) % align
        lengths = [*lengths, *([num_pads] if num_pads else [])]
        packed = {
            "input_ids": torch.cat([*proteins, torch.full((num_pads,), 1)]),
            "labels": torch.cat([*labels, torch.full((num_pads,), -100)]),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "max_seqlen": max(lengths),
        }
        return padded, packed

    return make
