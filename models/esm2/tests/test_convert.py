# SPDX-License-Identifier: Apache-2.0
"""Our model against transformers' `EsmForMaskedLM`, and the way of a checkpoint there and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ODD
from transformers import AutoModelForMaskedLM, EsmForMaskedLM

from common.weights import copy_parameters
from convert import hf_config, hf_to_native, native_config, native_to_hf, save_hf
from modeling_esm2 import SIZES, Esm2ForMaskedLM


TINY = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}


@pytest.fixture
def make_hf(make_model):
    def make(*args, **options) -> EsmForMaskedLM:
        model = make_model(*args, **options)
        hf = EsmForMaskedLM(hf_config(model.config)).eval()
        hf.load_state_dict(dict(native_to_hf(model.state_dict(), model.config)))
        return hf

    return make


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


def without_labels(batch):
    return {name: x for name, x in batch.items() if name != "labels"}


@pytest.mark.parametrize("masked_share", [0.0, 0.2])
@pytest.mark.parametrize("size", [ODD, TINY, SIZES["esm2_t6_8M_UR50D"]], ids=["odd", "tiny", "8M"])
@torch.no_grad()
def test_logits(make_model, make_hf, make_batches, size, masked_share):
    model, hf = make_model(size).eval(), make_hf(size)
    padded, packed = make_batches(masked_share=masked_share)
    real = padded["attention_mask"].bool()
    expected = hf(padded["input_ids"], padded["attention_mask"]).logits
    torch.testing.assert_close(model(**without_labels(padded)).logits[real], expected[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**without_labels(packed)).logits, expected[real], rtol=0, atol=1e-5)
    # Without a mask pads are tokens like others, here as there.
    torch.testing.assert_close(model(padded["input_ids"]).logits, hf(padded["input_ids"]).logits, rtol=0, atol=1e-5)


def test_gradients(make_model, make_hf, make_batches):
    model, hf = make_model(), make_hf()
    padded, _ = make_batches()
    model(**padded).loss.backward()
    hf(**padded).loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    converted = dict(native_to_hf(gradients | dict(model.named_buffers()), model.config))
    for name, x in hf.named_parameters():
        if x.grad is not None:
            torch.testing.assert_close(converted[name], x.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_from_hf(make_hf, dtype):
    hf = make_hf(rope_inv_freq_dtype=dtype)
    config = native_config(hf.config, hf.state_dict())
    assert config.rope_inv_freq_dtype == dtype
    assert_equal(dict(native_to_hf(hf_to_native(hf.state_dict(), config), config)), dict(hf.state_dict()))
    kept = hf.config.to_dict()
    assert {name: x for name, x in hf_config(config).to_dict().items() if kept[name] != x} == {}


def test_round_trip_from_native(make_model):
    model = make_model()
    state_dict = dict(model.state_dict())
    assert_equal(dict(hf_to_native(native_to_hf(state_dict, model.config), model.config)), state_dict)
    assert native_config(hf_config(model.config)).to_diff_dict() == model.config.to_diff_dict()


def test_float16_frequencies(make_model, make_hf, make_batches):
    """What the published checkpoints have: logits agree, and would not with unrounded frequencies."""
    model, hf = make_model(rope_inv_freq_dtype="float16").eval(), make_hf(rope_inv_freq_dtype="float16")
    padded, _ = make_batches(lengths=(700,))
    with torch.no_grad():
        expected = hf(padded["input_ids"]).logits
        torch.testing.assert_close(model(padded["input_ids"]).logits, expected, rtol=0, atol=1e-5)
        model.config.rope_inv_freq_dtype = "float32"
        assert (model(padded["input_ids"]).logits - expected).abs().max() > 1e-4
    with pytest.raises(ValueError, match="rope_inv_freq_dtype float32"):
        hf_to_native(hf.state_dict(), model.config)


def test_old_names(make_hf):
    """Checkpoints from before transformers 5: frequencies in every layer, positions, no decoder."""
    hf = make_hf()
    config = native_config(hf.config)
    new = dict(hf.state_dict())
    old = dict(new)
    inv_freq = old.pop("esm.rotary_embeddings.inv_freq")
    del old["lm_head.decoder.weight"]
    for i in range(config.num_hidden_layers):
        old[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = inv_freq
    old["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    old["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, config.hidden_size)
    assert_equal(dict(hf_to_native(old, config)), dict(hf_to_native(new, config)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_refused_configs(make_hf, change, message):
    config = make_hf().config
    config.update(change)
    with pytest.raises(ValueError, match=message):
        native_config(config)


def test_refused_weights(make_hf):
    hf = make_hf()
    config, weights = native_config(hf.config), dict(hf.state_dict())
    with pytest.raises(ValueError, match="differs from"):
        hf_to_native(weights | {"lm_head.decoder.weight": torch.zeros(33, 60)}, config)
    with pytest.raises(ValueError, match=r"unexpected esm.pooler.dense.weight"):
        hf_to_native(weights | {"esm.pooler.dense.weight": torch.zeros(60, 60)}, config)
    del weights["lm_head.bias"]
    with pytest.raises(ValueError, match=r"missing lm_head.bias"):
        hf_to_native(weights, config)


def test_lazy_values_fill_a_model(make_model, make_hf):
    model = make_model()
    other = Esm2ForMaskedLM(model.config)
    copy_parameters(other, hf_to_native(make_hf().state_dict(), model.config))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


@torch.no_grad()
def test_folders(make_model, make_batches, tmp_path):
    """Native weights, opened by AutoModelForMaskedLM, and its own save brought back by the command line."""
    model = make_model().eval()
    padded, _ = make_batches()
    save_hf(model.state_dict(), model.config, tmp_path / "hf")
    hf = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    assert isinstance(hf, EsmForMaskedLM)
    hf.save_pretrained(tmp_path / "resaved")
    (tmp_path / "resaved" / "vocab.txt").write_text("<cls>\n")
    script = Path(__file__).parents[1] / "convert.py"
    subprocess.run([sys.executable, script, "--to-native", "resaved", "native"], cwd=tmp_path, check=True)
    back = Esm2ForMaskedLM.from_pretrained(tmp_path / "native")
    assert_equal(dict(back.state_dict()), dict(model.state_dict()))
    assert (tmp_path / "native" / "vocab.txt").exists()
    batch = without_labels(padded)
    real = padded["attention_mask"].bool()
    assert torch.equal(back(**batch).logits, model(**batch).logits)
    torch.testing.assert_close(hf(**batch).logits[real], model(**batch).logits[real], rtol=0, atol=1e-5)
