# SPDX-License-Identifier: Apache-2.0
"""Weights that hide nothing, plain `transformers` models of them, and batches in both layouts."""

import os
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import BertForMaskedLM, MegatronBertForMaskedLM

from convert_geneformer import hf_config, to_native
from modeling_geneformer import GeneformerConfig, GeneformerForMaskedLM


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Sizes that are not powers of two, so that a wrong reshape cannot pass.
ODD = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 56}
EVEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
PUBLISHED = {"vocab_size": 83, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
BIONEMO = PUBLISHED | {"norm": "pre", "hidden_act": "gelu", "pad_token_id": 2}


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")


def plain_model(config: GeneformerConfig) -> BertForMaskedLM | MegatronBertForMaskedLM:
    """Of `transformers`, with random weights; no norm is the identity, no bias and no type's embedding is 0."""
    torch.manual_seed(0)
    model = (BertForMaskedLM if config.norm == "post" else MegatronBertForMaskedLM)(hf_config(config)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_scale = x.ndim == 1 and name.lower().endswith(("norm.weight", "ln.weight"))
            x.normal_(mean=1.0 if is_scale else 0.0, std=0.1)
    return model


@pytest.fixture
def make_models():
    def make(size: dict = ODD, **options) -> tuple[GeneformerForMaskedLM, torch.nn.Module]:
        """Ours and the plain one, with the same weights."""
        config = GeneformerConfig(**{**PUBLISHED, **size, **options})
        plain, ours = plain_model(config), GeneformerForMaskedLM(config).eval()
        ours.load_state_dict(to_native(plain.state_dict(), config))
        return ours, plain

    return make


@pytest.fixture
def make_batches():
    def make(lengths=(17, 5, 30), align=1, pad=0, vocab_size=83) -> tuple[dict, dict]:
        """The same cells padded and packed; `align` adds pad tokens as a last cell up to a multiple of it."""
        generator = torch.Generator().manual_seed(1)
        cells = [torch.randint(5, vocab_size, (length,), generator=generator) for length in lengths]
        labels = []
        for cell in cells:
            chosen = torch.rand(len(cell), generator=generator) < 0.3
            labels.append(cell.where(chosen, -100))
            cell[chosen & (torch.arange(len(cell)) % 2 == 0)] = 1
        padded = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(cells, True, pad),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, True, -100),
        }
        padded["attention_mask"] = (padded["input_ids"] != pad).long()
        num_pads = -sum(lengths) % align
        lengths = [*lengths, *([num_pads] if num_pads else [])]
        packed = {
            "input_ids": torch.cat([*cells, torch.full((num_pads,), pad)]),
            "labels": torch.cat([*labels, torch.full((num_pads,), -100)]),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "max_seqlen": max(lengths),
        }
        return padded, packed

    return make
