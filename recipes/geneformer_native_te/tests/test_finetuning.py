# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on classes of cells and genes and on lengths: from a model that is there, to one that others open."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from common import RECIPE
from common.contract.running import metrics, run_here
from common.step_folder import read_weights
from evaluate import main as evaluate
from metrics import Classes
from modeling_geneformer import GeneformerConfig, GeneformerForLength, model_for


CELL = [2, 17, 300, 41, 399, 8, 130, 77, 3]


def finetuned(folder, base, *options, trainer="train_ddp", steps=2):
    start = (f"model_tag={base}", f"init_from={base}", f"checkpoint.ckpt_dir={folder}")
    return run_here(trainer, folder, *start, "checkpoint.save_final_model=true", f"num_train_steps={steps}", *options)


def trained_model(folder, step):
    shape = GeneformerConfig(**json.loads((folder / f"step_{step}" / "run.json").read_text())["model"])
    model = model_for(shape)
    model.load_state_dict(read_weights(folder / f"step_{step}"))
    return model.eval()


def test_cells(tmp_path, base, capfd):
    options = ("model_kwargs.task=cells", "dataset.label_column=cell_type", "adamw_kwargs.lr=4e-3",
               "validation.max_rows=40", "validation.every_n_steps=160", "use_sequence_packing=true",
               "lr_scheduler_kwargs.num_training_steps=160")  # fmt: skip
    finetuned(tmp_path, base, *options, trainer="train_fsdp2", steps=160)
    assert metrics(tmp_path, "validation", "accuracy")[-1] > 0.7
    kinds = pq.read_table(RECIPE / "data" / "train.parquet")["cell_type"].unique().to_pylist()
    opened, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "final_model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert [*opened.config.id2label.values()] == sorted(kinds)
    tokens = torch.tensor([CELL])
    ours = trained_model(tmp_path, 160)(tokens).logits[:, 0]
    torch.testing.assert_close(opened.eval()(tokens).logits, ours, rtol=0, atol=1e-5)
    capfd.readouterr()
    evaluate([str(tmp_path / "final_model"), f"--out={tmp_path / 'out'}", "--config-name=L0_sanity",
              "dataset.label_column=cell_type", "validation.max_rows=40", "dataset.max_seq_length=96"])  # fmt: skip
    found = json.loads(capfd.readouterr().out)
    assert found["macro_f1"] == pytest.approx(metrics(tmp_path, "validation", "macro_f1")[-1], rel=1e-5)
    assert np.sum(found["confusion"]) == 40 and (tmp_path / "out" / "confusion.png").exists()


def test_genes_and_frozen_layers(tmp_path, base, gene_classes):
    frozen = "adamw_kwargs.groups=[{names: [geneformer.embeddings.*, geneformer.layer.0.*], frozen: true}]"
    options = ("model_kwargs.task=genes", f"dataset.gene_classes={gene_classes}", frozen)
    finetuned(tmp_path, base, *options)
    assert metrics(tmp_path, "validation", "num_labels")[-1] > 100
    opened, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "final_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokens = torch.tensor([CELL])
    ours = trained_model(tmp_path, 2)(tokens).logits
    torch.testing.assert_close(opened.eval()(tokens).logits, ours, rtol=0, atol=1e-5)
    first, last = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "final_model"))
    moved = {name for name in last if name in first and not torch.equal(first[name], last[name])}
    assert moved and all("encoder.layer.1." in name for name in moved)
    again = finetuned(tmp_path / "again", tmp_path / "final_model", f"dataset.gene_classes={gene_classes}")
    assert (again / "final_model" / "config.json").read_text().count("early") == 2


def test_lengths(tmp_path, base):
    finetuned(tmp_path, base, "model_kwargs.task=length", "use_sequence_packing=true")
    found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["loss"] == pytest.approx(found["masked_lm_loss"] + found["length_rmse"] ** 2, rel=1e-6)
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "final_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert {*load_file(tmp_path / "final_model" / "regression_head.safetensors")} == {
        f"regression_head.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_loss_of_lengths_is_bionemos(packed):
    """Masked genes' cross-entropy, and the mean over cells of (found - tokens)^2 by the first token."""
    from collator import LengthCollator, Rule
    from vocabulary import Vocabulary

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = GeneformerConfig(**size, vocab_size=50, max_position_embeddings=32, task="length", layer_backend="torch")
    torch.manual_seed(0)
    model = GeneformerForLength(config).eval()
    cells = [np.arange(5, 5 + n) for n in (9, 4, 21)]
    collate = LengthCollator(packed, 1, 0.4)
    collate.rule = Rule(Vocabulary(50, 0, 1, 2, 3, (0, 1, 2, 3)))
    batch = collate({"items": cells, "name": (0, 0, 0)})
    found = model(**batch.inputs, counts=batch.counts)
    assert batch.counts["cells"] == 3
    rows = LengthCollator(False, 1, 0.4)
    rows.rule = collate.rule
    padded = rows({"items": cells, "name": (0, 0, 0)}).inputs
    hidden = model.geneformer(padded["input_ids"], padded["attention_mask"]).last_hidden_state
    head = model.regression_head
    lengths = head.fc2(F.relu(head.fc1(hidden[:, 0])))[:, 0]
    expected = F.cross_entropy(model.predict(hidden).transpose(1, 2), padded["labels"])
    expected = expected + F.mse_loss(lengths, torch.tensor([9.0, 4.0, 21.0]))
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)


def test_macro_f1_is_over_classes_that_occur():
    confusion = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = Classes(["a", "b", "c", "d"]).summary({"loss": 7.0, "confusion": confusion})
    f1 = [2 * 3 / (4 + 4), 2 * 2 / (2 + 3), 0.0]
    assert found["macro_f1"] == pytest.approx(np.mean(f1)) and found["accuracy"] == 5 / 7 and found["loss"] == 1.0
    assert found["f1/a"] == f1[0] and found["confusion"] == confusion.tolist()
