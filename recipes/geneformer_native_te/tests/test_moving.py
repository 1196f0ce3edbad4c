# SPDX-License-Identifier: Apache-2.0
"""Who comes from BioNeMo 2: every flag has a line on the page, every key named there exists, the commands run."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cell_files import write_scdl

import embed_cells
from common import RECIPE
from common.contract import running
from common.contract.running import metrics, run_here
from common.contract.test_settings import composed
from common.files import flat


# Of train_geneformer, infer_geneformer, bionemo-geneformer-recipe and bionemo-geneformer-train.
FLAGS = """
accumulate-grad-batches aligned-megatron-ddp biobert-spec-option checkpoint-path config config-class cosine-hold-frac
cosine-rampup-frac create-tensorboard-logger data-config-cls data-dir data-path dest disable-checkpointing
experiment-name ffn-hidden-size gc-interval hidden-size include-gene-embeddings include-hiddens include-input-ids
include-logits include-unrecognized-vocab-in-dataset initial-ckpt-path limit-val-batches log-every-n-steps lr
metric-to-monitor-for-checkpoints micro-batch-size model-config-cls nemo1-init-path no-embeddings nsys-end-step
nsys-profiling nsys-ranks nsys-start-step num-attention-heads num-dataset-workers num-gpus num-layers num-nodes
num-steps precision prediction-interval recipe recompilation-check restore-from-checkpoint-path result-dir results-path
resume-if-exists save-best-checkpoint save-last-checkpoint save-top-k seq-length training-model-config-class
val-check-interval wandb-anonymous wandb-entity wandb-group wandb-id wandb-job-type wandb-log-model wandb-offline
wandb-project wandb-tags
""".split()  # noqa: SIM905
# Of the file that bionemo-geneformer-recipe writes, as it is named in a cell after the first of its section.
KEYS = """
data_config.seq_length .micro_batch_size .num_dataset_workers parallel_config.num_devices .num_nodes
.accumulate_grad_batches .ddp parallel_config.tensor_model_parallel_size .pipeline_model_parallel_size
training_config.max_steps .val_check_interval .limit_val_batches .precision training_config.accelerator .gc_interval
.include_perplexity .enable_checkpointing bionemo_model_config.num_layers .hidden_size .ffn_hidden_size
.num_attention_heads .hidden_dropout .attention_dropout .activation_func .init_method_std
.apply_residual_connection_post_layernorm optim_config.lr .lr_scheduler .cosine_rampup_frac .cosine_hold_frac
experiment_config.save_every_n_steps .result_dir .save_top_k experiment_config.experiment_name
.restore_from_checkpoint_path .metric_to_monitor_for_checkpoints .create_tensorboard_logger wandb_config.*
""".split()  # noqa: SIM905
RECIPES = ("10m-pretrain", "106m-pretrain", "10m-finetune", "geneformer_10m_pretrain_recipe",
           "geneformer_10m_finetune_recipe", "geneformer_tiny_test_recipe", "finetune_test_recipe")  # fmt: skip


@pytest.fixture(scope="module")
def lines() -> list[tuple[str, str]]:
    """What is called how there and here: lines of the tables of Geneformer."""
    page = RECIPE.parents[1] / "docs" / "moving.md"
    if not page.exists():
        pytest.skip("this recipe lies alone, without the page")
    text = page.read_text()
    part = text[text.index("`train_geneformer` becomes") :].partition("\n## ")[0]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in part.splitlines()
            if line.startswith("| ") and "---" not in line]  # fmt: skip


def test_every_flag_and_key_of_theirs_has_a_line(lines):
    there = " ".join(left for left, _ in lines)
    words = {*re.findall(r"--([\w-]+)", there)}
    assert not {*FLAGS} - words
    spans = {*re.findall(r"`([^`]+)`", there)}
    assert not {*KEYS} - spans
    assert all(name in there for name in RECIPES)


def test_every_key_of_ours_exists_and_every_configuration_composes(lines):
    keys, sections, found = flat(composed("10M")), {*composed("10M")}, []
    for _, here in lines:
        section = ""
        for span in re.findall(r"`([^`]+)`", here):
            for word in span.split():
                name = re.match(r"(\+?)((?:[a-z]\w*)?(?:\.[a-z]\w*)+|[a-z_]+(?==))", word.lstrip("'"))
                if not name or word.endswith((".py", ".json", ".jsonl", ".yaml", ".parquet")):
                    continue
                plus, key = name.groups()
                key = section + key if key.startswith(".") else key.replace("validation.load_", "dataset.load_")
                section = key.rpartition(".")[0]
                is_there = section in sections if plus else key in keys or any(k.startswith(f"{key}.") for k in keys)
                assert is_there, f"{word} in: {here}"
                found.append(key)
    assert len({*found}) > 35
    names = {name for _, here in lines for name in re.findall(r"--config-name (\w+)", here) if name != "some"}
    assert {"10M", "finetune_length", "L0_sanity"} <= names
    for name in names:
        assert composed(name)["num_train_steps"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """What their --data-dir has: SCDL folders of three splits, a vocabulary and medians in the first."""
    folder, random = tmp_path_factory.mktemp("processed_scdl"), np.random.default_rng(0)
    genes = [f"ENSG{number:011d}" for number in range(60)]
    for split, cells in (("train", 40), ("val", 12), ("test", 9)):
        dense = random.poisson(1.0, (cells, 60)).astype(np.float32)
        dense[:, 0] += 1
        write_scdl(folder / split, dense, names=genes, header=split == "val")
    special = ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]"]
    symbols = [f"GENE{number}" for number in range(60)]
    vocabulary = {"vocab": {name: number for number, name in enumerate([*special, *symbols])},
                  "gene_to_ens": dict(zip(symbols, genes, strict=True))}  # fmt: skip
    (folder / "train" / "geneformer.vocab").write_text(json.dumps(vocabulary))
    (folder / "train" / "medians.json").write_text(json.dumps(dict.fromkeys(genes, 1.5)))
    return folder


def test_their_commands_have_counterparts_that_run(data_dir, tmp_path, monkeypatch, capfd):
    """train_geneformer, then its fine-tuning with FineTuneSeqLenBioBertConfig, then infer_geneformer."""
    monkeypatch.setattr(running, "TINY", [])
    words = ["dataset.load_dataset_kwargs.path=scdl", f"dataset.load_dataset_kwargs.data_files={data_dir}/train"]
    words += [f"validation.load_dataset_kwargs={{path: scdl, data_files: {data_dir}/val}}"]
    words += [f"dataset.counts.medians={data_dir}/train/medians.json", "validation.every_n_steps=2",
              f"model_kwargs.vocabulary={data_dir}/train/geneformer.vocab", "dataset.num_workers=0",
              "num_train_steps=4", "lr_scheduler_kwargs.num_training_steps=4",
              "lr_scheduler_kwargs.num_warmup_steps=1",
              "dataset.max_seq_length=128", "dataset.micro_batch_size=2", "dataset.token_micro_batch_size=null",
              "micro_batches_per_step=2",
              "validation.max_rows=4", "model_kwargs.num_hidden_layers=1", "model_kwargs.hidden_size=32",
              "model_kwargs.num_attention_heads=2", "model_kwargs.intermediate_size=64", "logger.frequency=1",
              "logger.peak_tflops=1"]  # fmt: skip
    first = tmp_path / "results" / "test_experiment"
    run_here("train_ddp", first, "--config-name", "10M", *words, f"checkpoint.ckpt_dir={first}")
    losses = metrics(first, "train", "loss")
    assert len(losses) == 4 and all(3 < loss < 6 for loss in losses)
    assert len(metrics(first, "validation", "loss")) == 2
    then = tmp_path / "results" / "test_finetune_experiment"
    words += [f"model_tag={first}/final_model", f"init_from={first}/final_model", "checkpoint.save_final_model=true"]
    run_here("train_ddp", then, "--config-name", "finetune_length", *words, f"checkpoint.ckpt_dir={then}")
    assert len(metrics(then, "train", "loss")) == 4 and (then / "final_model" / "regression_head.safetensors").exists()
    embed_cells.main([str(data_dir / "test"), str(first / "final_model"), str(tmp_path / "vectors.parquet"),
                      f"--medians={data_dir}/train/medians.json", "--cls"])  # fmt: skip
    table = pq.read_table(tmp_path / "vectors.parquet")
    assert table["cell"].to_pylist() == [*range(9)] and len(table["embedding"][0]) == 32
