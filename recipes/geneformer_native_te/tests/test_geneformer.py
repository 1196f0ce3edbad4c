# SPDX-License-Identifier: Apache-2.0
"""What is this recipe's own: its masking, its cells, dropout in all ways of training, its sample, and its way out."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForMaskedLM

from cell_rows import TokenRows
from collator import Rule, mask_tokens
from common.contract.ranks import excess_chi_square
from common.contract.running import curve, metrics, run_here, run_ranks
from common.open_data import open_rows
from vocabulary import PUBLISHED, Vocabulary, open_vocabulary


V2 = PUBLISHED["V2"]
SMALL = Vocabulary(20, pad=0, mask=1, cls=2, eos=3, special=(0, 1, 2, 3))


def test_genes_alone_are_masked_and_put_in():
    random = np.random.default_rng(0)
    tokens = np.tile(np.arange(20), 20_000)
    masked, labels = mask_tokens(tokens, 0.15, Rule(SMALL), random)
    chosen = labels >= 0
    assert not chosen[tokens < 4].any() and (labels[chosen] == tokens[chosen]).all()
    assert (masked[~chosen] == tokens[~chosen]).all()
    shares = [(masked[chosen] == 1).sum(), ((masked[chosen] != 1) & (masked[chosen] != tokens[chosen])).sum()]
    number = chosen.sum()
    # One in sixteen random genes is the one that was there.
    expected = np.array([0.8, 0.1 * 15 / 16, 0.1 + 0.1 / 16]) * number
    assert excess_chi_square(np.array([*shares, number - sum(shares)]), expected, 2) < 5
    assert abs(number / (tokens >= 4).sum() - 0.15) < 0.005
    put_in = masked[chosen & (masked != tokens) & (masked != 1)]
    assert set(put_in) == {*range(4, 20)}
    assert excess_chi_square(np.bincount(put_in)[4:], len(put_in) / 16, 15) < 5


def test_the_published_ways():
    random = np.random.default_rng(0)
    tokens = np.tile(np.arange(20), 20_000)
    masked, labels = mask_tokens(tokens, 0.15, Rule(SMALL, "published", 0.5, 0.5), random)
    chosen = labels >= 0
    assert set(tokens[chosen]) == {*range(2, 20)}
    assert set(masked[chosen & (masked != tokens)]) == {*range(20)}
    masked, labels = mask_tokens(tokens, 0.15, Rule(SMALL, mask_share=0.8, random_share=0.02), random)
    changed = ((masked != tokens) & (masked != 1)).sum() / (labels >= 0).sum()
    assert changed == pytest.approx(0.02 * 15 / 16, abs=0.003)


def rows_of(tmp_path, cells, vocabulary, max_seq_length, kind=None):
    table = pa.table({"input_ids": pa.array(cells, pa.list_(kind or pa.int64()))})
    pq.write_table(table, tmp_path / "cells.parquet")
    kwargs = {"path": "parquet", "data_files": str(tmp_path / "cells.parquet"), "split": "train"}
    rows = open_rows("dataset", kwargs, {"input_ids_column": "input_ids"})
    return TokenRows("dataset", rows, "input_ids", vocabulary, max_seq_length)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint16()], ids=str)
def test_cells_are_cut_to_their_first_genes(tmp_path, distributed, kind):
    cells = [[2, 9, 8, 7, 3], [2, 9, 8, 7, 6, 5, 3], [], [9, 8, 7, 6, 5, 4]]
    source = rows_of(tmp_path, cells, SMALL, 5, kind)
    source.build_index(distributed)
    assert source.sizes(np.arange(4), 0).tolist() == [5, 5, 0, 5]
    found = [tokens.tolist() for tokens in source.read(np.array([3, 1, 0, 2]), 0)]
    assert found == [[9, 8, 7, 6, 5], [2, 9, 8, 7, 3], [2, 9, 8, 7, 3], []]
    assert source.amount == "4 cells, 15 tokens, 2 of them cut to 5 tokens"


def test_a_token_that_is_none_is_named(tmp_path, distributed):
    source = rows_of(tmp_path, [[4, 5], [6], [7, 20275]], V2, 8)
    with pytest.raises(ValueError, match=r"row 2 has the token 20275, and the vocabulary 0 to 20274"):
        source.build_index(distributed)


def test_vocabularies(tmp_path):
    path = tmp_path / "v.json"
    path.write_text(json.dumps({"vocab": {"[CLS]": 0, "[MASK]": 1, "[PAD]": 2, "[SEP]": 3, "[UKW]": 4, "TP53": 5},
                                "gene_to_ens": {"TP53": "ENSG00000141510"}}))  # fmt: skip
    found = open_vocabulary(str(path))
    assert found[:-1] == PUBLISHED["BioNeMo"]._replace(size=6)[:-1] and found.genes == [5]
    for text, words in (
        ('{"<pad>": 0, "A": 1}', "it has no <mask>"),
        ('{"<pad>": 0, "<mask>": 2}', "its numbers must be 0 to 1"),
        ("[1, 2]", "this is not a JSON dictionary of tokens"),
    ):
        (tmp_path / f"{len(text)}.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            open_vocabulary(str(tmp_path / f"{len(text)}.json"))


def test_one_curve_with_dropout(tmp_path):
    """Padded, packed, by PyTorch's layers, and on two ranks that share each micro-batch; it is another without."""
    few = "num_train_steps=3"
    padded = curve(run_here("train_ddp", tmp_path / "padded", few))
    packed = (few, "use_sequence_packing=true")
    assert curve(run_here("train_ddp", tmp_path / "packed", *packed)) == pytest.approx(padded, rel=1e-5)
    plain = run_here("train_ddp", tmp_path / "plain", *packed, "layer_backend=torch")
    assert curve(plain) == pytest.approx(padded, rel=1e-5)
    assert curve(run_ranks("train_ddp", 2, tmp_path / "cp", *packed, "cp_size=2")) == pytest.approx(padded, rel=1e-5)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        without = curve(run_here("train_ddp", tmp_path / name, *packed, f"model_kwargs.{name}=0"))
        assert without != pytest.approx(padded, rel=1e-4)


@pytest.mark.parametrize("options", ["Float8CurrentScaling", "MXFP8BlockScaling"])
def test_fewer_bits(tmp_path, options):
    options = ["fp8_config.enabled=true", f"fp8_config.fp8_recipe={options}"]
    wide = ["model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=96", "use_sequence_packing=true"]
    losses = metrics(run_here("train_ddp", tmp_path, *wide, *options, "num_train_steps=2"), "train", "loss")
    assert all(5 < loss < 8 for loss in losses)


def test_pre_norm_ends_as_megatron_bert(tmp_path):
    options = ("model_kwargs.norm=pre", "model_kwargs.hidden_act=gelu", "num_train_steps=2",
               f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_final_model=true")  # fmt: skip
    run_here("train_ddp", tmp_path, *options)
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "final_model", output_loading_info=True)
    assert type(model).__name__ == "MegatronBertForMaskedLM" and not info["missing_keys"], info
    again = ("num_train_steps=1", f"model_tag={tmp_path}/final_model", f"init_from={tmp_path}/final_model")
    again += ("model_kwargs.vocabulary=null", "validation.load_dataset_kwargs=null")
    loss = metrics(run_here("train_ddp", tmp_path / "again", *again), "train", "loss")[0]
    assert loss == pytest.approx(metrics(tmp_path, "train", "loss")[0], abs=0.2)


def test_real_cells(tmp_path, real_cells):
    """Streamed and whole; the size's own vocabulary is theirs."""
    common = (
        "model_kwargs.vocabulary=V1",
        f"dataset.load_dataset_kwargs.data_files={real_cells}",
        "num_train_steps=2",
    )
    for streaming in ("true", "false"):
        folder = run_here("train_ddp", tmp_path / streaming, *common,
                          f"dataset.load_dataset_kwargs.streaming={streaming}")  # fmt: skip
        assert metrics(folder, "train", "loss")[0] == pytest.approx(np.log(25426), abs=0.3)
    assert torch.isfinite(torch.tensor(metrics(folder, "train", "grad_norm"))).all()
