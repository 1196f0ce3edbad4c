# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in and out, and EuroBERT as plain transformers opens it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EVEN, ODD, published_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, EuroBertForMaskedLM

from convert_amplify import (
    eurobert_config,
    from_native,
    published_config,
    read_config,
    save,
    swiglu_width,
    to_native,
)
from modeling_amplify import SIZES, AmplifyConfig, AmplifyForMaskedLM


MODEL = Path(__file__).parents[1]


@pytest.mark.parametrize("size", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("format", ["amplify", "eurobert"])
def test_there_and_back(format, size):
    config = AmplifyConfig(**size)
    native = dict(to_native(published_weights(config), config, "amplify"))
    back = dict(to_native(dict(from_native(native, config, format)), config, format))
    assert back.keys() == native.keys() == AmplifyForMaskedLM(config).state_dict().keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


def test_eurobert_computes_the_same(make_model, make_batches):
    model, (padded, _) = make_model(), make_batches()
    other = EuroBertForMaskedLM(eurobert_config(model.config))
    other.load_state_dict(dict(from_native(model.state_dict(), model.config, "eurobert")))
    model, other = model.double(), other.double()  # EuroBERT's norms and angles are FP32 in any case
    ours, theirs = model(**padded), other(**padded)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-5, check_dtype=False)
    inputs, real = {k: v for k, v in padded.items() if k != "labels"}, padded["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], theirs.logits[real], rtol=0, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = from_native({name: x.grad for name, x in model.named_parameters()}, model.config, "eurobert")
    for name, x in other.named_parameters():
        if "mlp" not in name or "bias" not in name:
            assert (gradients[name] - x.grad).abs().max() < 1e-5 * max(1, x.grad.abs().max()), name


def test_a_published_folder_goes_both_ways(tmp_path):
    """By the command line: published, native, EuroBERT, native, published."""
    config = AmplifyConfig(**EVEN)
    (tmp_path / "a").mkdir()
    weights = {name: x.contiguous() for name, x in published_weights(config).items()}
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    (tmp_path / "a" / "config.json").write_text(json.dumps(published_config(config)))
    for source, format, target in (("a", "native", "b"), ("b", "eurobert", "c"), ("c", "amplify", "d")):
        command = [
            sys.executable,
            "convert_amplify.py",
            "--to",
            format,
            str(tmp_path / source),
            str(tmp_path / target),
        ]
        subprocess.run(command, cwd=MODEL, check=True, timeout=120)
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == published_config(config)
    back = load_file(tmp_path / "d" / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    tokens = torch.tensor([[3, 24, 6, 2, 11, 4]])
    native = AmplifyForMaskedLM.from_pretrained(tmp_path / "b")
    plain, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(plain(tokens).logits, native(tokens).logits, rtol=0, atol=1e-5)
    assert AutoModel.from_pretrained(tmp_path / "c")(tokens).last_hidden_state.shape == (1, 6, 64)


def test_public_configurations():
    for name, width in (("AMPLIFY_120M", 2560), ("AMPLIFY_350M", 3840)):
        assert published_config(AmplifyConfig(**SIZES[name]))["intermediate_size"] == width
    for width in range(8, 400, 8):
        config = AmplifyConfig(hidden_size=24, num_attention_heads=3, intermediate_size=width)
        assert swiglu_width(published_config(config)["intermediate_size"]) == width


def test_what_is_refused(tmp_path):
    config = AmplifyConfig(**EVEN)
    weights = published_weights(config)
    with pytest.raises(ValueError, match=r"missing decoder\.bias; unexpected x\."):
        to_native({k: v for k, v in weights.items() if k != "decoder.bias"} | {"x": weights["encoder.weight"]}, config,
                  "amplify")  # fmt: skip
    hf = dict(from_native(dict(to_native(weights, config, "amplify")), config, "eurobert"))
    hf["model.layers.1.mlp.up_proj.bias"] = torch.ones(96)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.bias is not 0"):
        to_native(hf, config, "eurobert")
    for change, words in (({"ffn_bias": True}, "ffn_bias is True"), ({"model_type": "esm"}, "model_type is esm")):
        (tmp_path / "config.json").write_text(json.dumps(published_config(config) | change))
        with pytest.raises(ValueError, match=words):
            read_config(tmp_path)
    with pytest.raises(ValueError, match="intermediate_size 90 must divide by 8"):
        published_config(AmplifyConfig(**EVEN | {"intermediate_size": 90}))


def test_native_folders_open(tmp_path, make_model):
    model = make_model()
    save(model.state_dict(), model.config, "native", tmp_path)
    again = AmplifyForMaskedLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
