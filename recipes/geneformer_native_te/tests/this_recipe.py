# SPDX-License-Identifier: Apache-2.0
"""What the tests of common/contract/ know of this recipe. They load it by its path, also where nothing of ours can be
imported, so at the top it imports nothing of the recipe."""

import json
import shutil
from pathlib import Path


DATA = Path(__file__).parents[1] / "data"
# The smallest run that has everything, dropout of both kinds included. Odd widths, so that shards are uneven.
# The rate of the machine is given: to measure it takes each process half a second.
TINY = [
    "model_kwargs.hidden_size=48", "model_kwargs.num_hidden_layers=2", "model_kwargs.num_attention_heads=4",
    "model_kwargs.intermediate_size=88", "model_kwargs.max_position_embeddings=96", "dataset.max_seq_length=96",
    "model_kwargs.hidden_dropout_prob=0.1", "model_kwargs.attention_probs_dropout_prob=0.1",
    "dataset.micro_batch_size=2", "micro_batches_per_step=4", "num_train_steps=6", "logger.frequency=1",
    "validation.max_rows=11", "validation.every_n_steps=3", "precision=fp32", "lr_scheduler_kwargs.num_warmup_steps=2",
    "adamw_kwargs.lr=4e-4", "use_sequence_packing=false", "logger.peak_tflops=1",
]  # fmt: skip
# What metrics.jsonl has that the trajectory decides, by kind of line.
CURVE = {"train": ["loss", "grad_norm", "learning_rate", "num_tokens"], "validation": ["loss", "accuracy"]}
# What configs leave open that others build on.
OPEN_CONFIGS = {
    "defaults": ["model_tag=geneformer_1M", "num_train_steps=2", "dataset.load_dataset_kwargs.path=parquet"],
    "pretraining": ["model_tag=geneformer_1M", "num_train_steps=2"],
    "continue": ["model_tag=geneformer_1M"],
    "L0_cells": ["model_tag=geneformer_1M"],
    "finetune_cells": ["model_tag=geneformer_1M"],
    "finetune_genes": ["model_tag=geneformer_1M"],
    "finetune_length": ["model_tag=geneformer_1M"],
}
# What ranks and workers of tests need not import again.
PRELOAD = ["datasets", "transformers.models.bert.modeling_bert"]
# This recipe's own mistakes, and words of the sentence that each ends with.
BAD_INPUTS = [
    (["model_tag=Geneformer-V3"], ["model_tag=Geneformer-V3: no local folder and none of", "Geneformer-V2-104M"]),
    (["model_kwargs.num_attention_heads=5"], ["hidden_size 48", "num_attention_heads 5", "a multiple of 10"]),
    (["model_kwargs.attention_probs_dropout_prob=1"], ["model_kwargs.attention_probs_dropout_prob=1", "below 1"]),
    (["model_kwargs.norm=sideways"], ["model_kwargs.norm=sideways", "post", "pre"]),
    (["dataset.max_seq_length=97"], ["dataset.max_seq_length=97 must be at most the model's positions, 96"]),
    (["dataset.vocabulary=V1"], ["dataset.vocabulary=V1 is not that of the model"]),
    (["model_kwargs.vocabulary=V9"], ["vocabulary=V9: no such file, and none of V1, V2, BioNeMo"]),
    (["dataset.input_ids_column=length"], ["dataset.input_ids_column=length", "not lists of whole numbers"]),
    (
        ["dataset.input_ids_column=tokens"],
        ["dataset.input_ids_column=tokens: the data has no such column; it has input_ids"],
    ),
    (
        ["dataset.load_dataset_kwargs.path=h5ad", "dataset.load_dataset_kwargs.data_files=data/train.h5ad"],
        ["dataset.counts.medians is not set: ranks need each gene's median"],
    ),
    (["dataset.load_dataset_kwargs.data_files=data/train.h5ad"], ["has cells as h5ad; give path=h5ad"]),
    (
        ["dataset.load_dataset_kwargs.path=h5ad", f"dataset.load_dataset_kwargs.data_files=[{DATA}/scdl]"],
        ["dataset.load_dataset_kwargs.path=h5ad: ", "data/scdl has cells as scdl; give path=scdl"],
    ),
    (
        [
            "model_kwargs.task=cells",
            "dataset.label_column=kind",
            "dataset.load_dataset_kwargs.path=h5ad",
            f"dataset.load_dataset_kwargs.data_files={DATA}/train.h5ad",
            f"dataset.counts.medians={DATA}/medians.json",
        ],
        ["dataset.label_column: ", "train.h5ad has no column kind in obs"],
    ),
    (["dataset.counts.bad_cells=drop"], ["dataset.counts.bad_cells=drop must be"]),
    (["dataset.counts.median=x"], ["dataset.counts.median", "medians"]),
    (["dataset.mask_share=0.95"], ["dataset.mask_share=0.95 and dataset.random_share=0.1", "at most 1"]),
    (["model_kwargs.task=cells"], ["dataset.label_column is not set"]),
    (["model_kwargs.task=cells", "dataset.label_column=kind"], ["dataset.label_column=kind: the data has no such"]),
    (
        ["model_kwargs.task=cells", "dataset.label_column=cell_type", "model_kwargs.classes=[alpha,beta]"],
        ["dataset.label_column=cell_type has the class B cell, and the model alpha, beta"],
    ),
    (["model_kwargs.task=genes"], ["dataset.gene_classes is not set"]),
    (["model_kwargs.task=genes", "dataset.gene_classes=none.json"], ["dataset.gene_classes=none.json: this is not"]),
    (["dataset.masking=all"], ["dataset.masking=all", "genes", "published"]),
    (
        ["dataset.load_dataset_kwargs.data_files=none.parquet"],
        ["dataset.load_dataset_kwargs.data_files=none.parquet: no such file"],
    ),
    (["cp_size=2", "use_sequence_packing=false"], ["cp_size=2 needs use_sequence_packing=true"]),
    (
        ["lr_scheduler_kwargs.num_warmup_steps=100", "lr_scheduler_kwargs.num_training_steps=100"],
        ["lr_scheduler_kwargs.num_warmup_steps=100 must be less than 100"],
    ),
    (["init_from=none/such"], ["init_from=none/such is no local folder, and the hub does not give it"]),
]
BAD_COMMANDS = [
    ("convert_geneformer.py --to native nope x", ["nope is no local folder, and the hub does not give it"]),
    ("convert_geneformer.py --to hf . x", ["config.json: No such file or directory; give the folder of a model"]),
]
CELL = [2, 17, 300, 41, 1, 399, 8, 1, 130, 77, 3]


def open_final_model(folder: Path):
    """Logits of a cell by the field's own library; no loading may leave a weight out."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    AutoModel.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(torch.tensor([CELL])).logits


def open_checkpoint(step_folder: Path):
    """The same logits by the model that was trained."""
    import torch

    from common.step_folder import read_weights
    from modeling_geneformer import GeneformerConfig, GeneformerForMaskedLM

    model = GeneformerForMaskedLM(GeneformerConfig(**json.loads((step_folder / "run.json").read_text())["model"]))
    model.load_state_dict(read_weights(step_folder))
    with torch.no_grad():
        return model.eval()(torch.tensor([CELL])).logits


def write_examples(folder: Path) -> None:
    """A user's own files, as commands in READMEs and docs name them: here tokens of Geneformer's first vocabulary."""
    import pyarrow.parquet as pq

    shutil.copy(folder / "data" / "train.h5ad", folder / "my_cells.h5ad")
    cells = pq.read_table(folder / "data" / "train.parquet").slice(0, 200)
    pq.write_table(cells, folder / "my_cells.parquet")
