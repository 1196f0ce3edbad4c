# SPDX-License-Identifier: Apache-2.0
"""Weights go to plain `transformers` and back unchanged, as folders too, and what is no Geneformer is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BIONEMO, EVEN, ODD, PUBLISHED, plain_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from convert_geneformer import TIED, from_native, hf_config, read_config, save, to_native
from modeling_geneformer import SIZES, GeneformerConfig, GeneformerForMaskedLM
from vocabulary import open_vocabulary


MODEL = Path(__file__).parents[1]
FAMILIES = {"published": PUBLISHED, "bionemo": BIONEMO}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [ODD, EVEN], ids=["odd", "even"])
def test_there_and_back_to_the_bit(size, family):
    config = GeneformerConfig(**FAMILIES[family], **size)
    weights = plain_model(config).state_dict()
    back = dict(from_native(dict(to_native(weights, config)), config))
    assert weights.keys() - back.keys() == TIED.keys() and not back.keys() - weights.keys()
    assert all(torch.equal(weights[name], back[name]) for name in back)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_go_both_ways(tmp_path, family):
    """By the command line: what `transformers` has saved, native, what it opens; nothing missing, nothing too much."""
    config = GeneformerConfig(**FAMILIES[family], **EVEN)
    plain = plain_model(config)
    plain.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "vocabulary.json").write_text(json.dumps({f"<{i}>": i for i in range(83)}))
    for source, format, target in (("a", "native", "b"), ("b", "hf", "c")):
        command = [sys.executable, "convert_geneformer.py", "--to", format]
        subprocess.run([*command, str(tmp_path / source), str(tmp_path / target)], cwd=MODEL, check=True, timeout=120)
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert first.keys() - TIED.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in last)
    assert (tmp_path / "c" / "vocabulary.json").exists()
    tokens = torch.tensor([[3, 24, 6, 2, 11, 4]])
    native = GeneformerForMaskedLM.from_pretrained(tmp_path / "b").eval()
    opened, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(opened) is type(plain)
    torch.testing.assert_close(opened(tokens).logits, plain(tokens).logits, rtol=0, atol=0)
    torch.testing.assert_close(opened(tokens).logits, native(tokens).logits, rtol=0, atol=1e-5)
    assert AutoModel.from_pretrained(tmp_path / "c")(tokens).last_hidden_state.shape == (1, 6, 64)
    found, kind = read_config(tmp_path / "c")
    assert kind == "hf" and found.norm == config.norm and found.hidden_act == config.hidden_act


@pytest.mark.parametrize("name", SIZES)
def test_a_published_configuration_is_read_as_that_size(tmp_path, name):
    size = SIZES[name]
    config = GeneformerConfig(**size, vocab_size=open_vocabulary(size["vocabulary"]).size)
    hf_config(config).save_pretrained(tmp_path)
    found, _ = read_config(tmp_path)
    assert {key: getattr(found, key) for key in size} == size


def test_what_is_refused(tmp_path):
    config = GeneformerConfig(**PUBLISHED, **EVEN)
    weights = plain_model(config).state_dict()
    wrong = {k: v for k, v in weights.items() if k != "cls.predictions.bias"}
    wrong["bert.pooler.dense.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"missing cls\.predictions\.bias; unexpected bert\.pooler\.dense\.bias"):
        to_native(wrong, config)
    untied = weights | {"cls.predictions.decoder.weight": torch.zeros(83, 64)}
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight is not bert\.embeddings"):
        to_native(untied, config)
    given = hf_config(config).to_dict()
    for change, words in (
        ({"is_decoder": True}, "is_decoder is True"),
        ({"model_type": "esm"}, "model_type is esm"),
        ({"hidden_act": "silu"}, "hidden_act 'silu' must be one of relu, gelu"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(given | change))
        with pytest.raises(ValueError, match=words):
            read_config(tmp_path)


def test_native_folders_open(tmp_path, make_models):
    model, _ = make_models()
    save(model.state_dict(), model.config, "native", tmp_path)
    again = GeneformerForMaskedLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
