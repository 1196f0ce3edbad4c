# SPDX-License-Identifier: Apache-2.0
"""Training reads h5ad and SCDL as it reads tokens; a command writes the same."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

import prepare_cells
from common.contract.running import curve, run_here


DATA = Path(__file__).parents[1] / "data"
COUNTS = [
    "dataset.load_dataset_kwargs.path=h5ad", f"dataset.load_dataset_kwargs.data_files={DATA}/train.h5ad",
    "validation.load_dataset_kwargs.path=scdl", f"validation.load_dataset_kwargs.data_files={DATA}/scdl",
]  # fmt: skip


def test_counts_and_tokens_of_the_same_cells_give_the_same_curve(tmp_path, capfd):
    tokens = run_here("train_ddp", tmp_path / "tokens")
    counts = run_here("train_ddp", tmp_path / "counts", *COUNTS, f"dataset.counts.medians={DATA}/medians.json")
    assert curve(counts) == curve(tokens) and len(curve(tokens)) > 20
    assert "train.h5ad: counts of X, 400 of 400 genes known" in capfd.readouterr().err


def test_the_command_writes_what_training_would_make(tmp_path, capsys):
    words = [str(DATA / "train.h5ad"), "--vocabulary", f"{DATA}/vocabulary.json", "--medians", f"{DATA}/medians.json"]
    words += ["--out", str(tmp_path / "out"), "--obs-columns", "cell_type", "--processes", "1"]
    prepare_cells.main(words)
    assert "600 cells by the rule of V2" in capsys.readouterr().out
    rows = datasets.load_dataset("arrow", data_files=f"{tmp_path}/out/*.arrow", split="train", cache_dir=str(tmp_path))
    saved = pq.read_table(DATA / "train.parquet").to_pydict()
    assert rows["input_ids"][:] == saved["input_ids"] and rows["cell_type"][:] == saved["cell_type"]
    assert json.loads((tmp_path / "out" / "done.json").read_text())["wrong"] == {}
    prepare_cells.main(words)  # all is there
    with pytest.raises(ValueError, match="was begun with other files or options"):
        prepare_cells.main([*words, "--max-seq-length", "64"])
