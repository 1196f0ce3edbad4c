# SPDX-License-Identifier: Apache-2.0
"""What the tests of common/contract/ know of this recipe. They load it by its path, also where nothing of ours can be
imported, so at the top it imports nothing of the recipe."""

import json
from pathlib import Path


# The smallest run that has everything. Odd widths and a bias of 33, so that shards are uneven.
# The rate of the machine is given: to measure it takes each process half a second.
TINY = [
    "model_kwargs.hidden_size=48", "model_kwargs.num_hidden_layers=2", "model_kwargs.num_attention_heads=4",
    "model_kwargs.intermediate_size=80", "dataset.max_seq_length=96", "dataset.micro_batch_size=2",
    "micro_batches_per_step=4", "num_train_steps=6", "logger.frequency=1", "validation.max_rows=11",
    "validation.every_n_steps=3", "precision=fp32", "lr_scheduler_kwargs.num_warmup_steps=2", "adamw_kwargs.lr=4e-4",
    "use_sequence_packing=false", "logger.peak_tflops=1",
]  # fmt: skip
# What metrics.jsonl has that the trajectory decides, by kind of line.
CURVE = {"train": ["loss", "grad_norm", "learning_rate", "num_tokens"], "validation": ["loss", "accuracy"]}
# What configs leave open that others build on.
OPEN_CONFIGS = {
    "defaults": ["model_tag=esm2_t4_1M", "num_train_steps=2", "dataset.load_dataset_kwargs.path=parquet"],
    "uniref": ["model_tag=esm2_t4_1M"],
}
# What ranks and workers of tests need not import again.
PRELOAD = ["datasets", "transformers.models.esm.modeling_esm"]
# This recipe's own mistakes, and words of the sentence that each ends with.
BAD_INPUTS = [
    (["model_tag=esm2_t5"], ["model_tag=esm2_t5: no local folder and none of", "esm2_t6_8M_UR50D"]),
    (["model_kwargs.num_attention_heads=5"], ["hidden_size 48", "num_attention_heads 5", "a multiple of 10"]),
    (["dataset.load_dataset_kwargs.data_files=none.parquet"], ["none.parquet: no such file"]),
    (["dataset.sequence_column=protein"], ["dataset.sequence_column=protein", "sequence"]),
    (["cp_size=2", "use_sequence_packing=false"], ["cp_size=2 needs use_sequence_packing=true"]),
    (
        ["lr_scheduler_kwargs.num_warmup_steps=90", "lr_scheduler_kwargs.num_training_steps=100"],
        ["lr_scheduler_kwargs.num_warmup_steps=90 must be less than 90"],
    ),
]
BAD_COMMANDS = [
    ("convert.py --to-hf nope x", ["nope is no local folder, and the hub does not give it"]),
    ("convert.py --to-native s3://a/b x", ["s3://a/b is no local folder, and addresses are not read"]),
    ("convert.py --to-native . x", ["config.json: No such file or directory; give the folder of a model"]),
]
PROTEIN = "MSKGEELFTGVVPILVELDGDVNGH<mask>FSVSGEGEGDATYG<mask>LTLKFICTT"


def open_final_model(folder: Path):
    """Logits of a protein by the field's own library; no loading may leave a weight out."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(PROTEIN, return_tensors="pt")
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    AutoModel.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def open_checkpoint(step_folder: Path):
    """The same logits by the model that was trained."""
    import torch
    from transformers import AutoTokenizer

    from common import RECIPE
    from common.step_folder import read_weights
    from modeling_esm2 import Esm2Config, Esm2ForMaskedLM

    model = Esm2ForMaskedLM(Esm2Config(**json.loads((step_folder / "run.json").read_text())["model"]))
    model.load_state_dict(read_weights(step_folder))
    inputs = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")(PROTEIN, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def write_examples(folder: Path) -> None:
    """A user's own files, as commands in READMEs and docs name them."""
    import pyarrow.parquet as pq

    proteins = pq.read_table(folder / "data" / "train.parquet").column("sequence").to_pylist()[:200]
    (folder / "my.fasta").write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(proteins)))
    (folder / "my.csv").write_text("protein\n" + "\n".join(proteins) + "\n")
