# SPDX-License-Identifier: Apache-2.0
"""The full sizes: each configuration, with a narrow model, runs to its last save; each size's export fits."""

import pytest
import torch
from transformers import AutoModelForMaskedLM

from build_model import model_config
from common import RECIPE
from common.contract import running
from common.contract.running import metrics, run_here
from convert_geneformer import from_native, hf_config
from modeling_geneformer import SIZES, model_for


CONFIGS = {"10M": "MegatronBert", "106M": "MegatronBert", "V1_10M": "Bert", "V2_104M": "Bert", "V2_316M": "Bert",
           "4b": "Bert"}  # fmt: skip
NARROW = ("model_kwargs.num_hidden_layers=1", "model_kwargs.hidden_size=16", "model_kwargs.num_attention_heads=2",
          "model_kwargs.intermediate_size=16", "num_train_steps=2", "micro_batches_per_step=2",
          "logger.peak_tflops=1", "logger.frequency=1",
          "dataset.token_micro_batch_size=null", "dataset.micro_batch_size=2", "dataset.num_workers=0",
          "dataset.load_dataset_kwargs.path=parquet",
          f"dataset.load_dataset_kwargs.data_files={RECIPE}/data/train.parquet")  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_runs_to_its_last_save(name, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "TINY", [])
    run_here("train_ddp", tmp_path, "--config-name", name, *NARROW, f"checkpoint.ckpt_dir={tmp_path}")
    assert (tmp_path / "step_2" / ".metadata").exists()
    losses = metrics(tmp_path, "train", "loss")
    assert len(losses) == 2 and all(9 < loss < 11 for loss in losses)
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "final_model", output_loading_info=True)
    assert type(model).__name__ == f"{CONFIGS[name]}ForMaskedLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[5, 310, 17, 1, 204]])).logits
    assert logits.shape == (1, 5, model.config.vocab_size) and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", SIZES)
def test_the_export_of_a_size_has_the_names_and_shapes_of_transformers(name):
    """Without storage, also of the largest."""
    shape = model_config(name, "torch")
    with torch.device("meta"):
        ours, theirs = model_for(shape).state_dict(), AutoModelForMaskedLM.from_config(hf_config(shape))
    exported = from_native(ours, shape)
    expected = {name: tensor.shape for name, tensor in theirs.named_parameters()}  # what is tied is there once
    assert {name: exported[name].shape for name in exported} == expected
