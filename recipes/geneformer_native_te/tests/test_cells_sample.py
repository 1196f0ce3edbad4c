# SPDX-License-Identifier: Apache-2.0
"""The bundled sample: what its script writes, alike in all its forms, and with something in it to be learnt."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from cells.dictionaries import read_all, read_tokens
from cells.token_cache import Options, open_cells


DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def sample_options(tmp_path, monkeypatch) -> Options:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokens = read_tokens("k", DATA / "vocabulary.json")
    dictionary = read_all("dataset", tokens, str(DATA / "medians.json"), None)
    return Options("dataset", dictionary, obs_columns=("cell_type",))


def test_the_script_writes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    import make_sample

    make_sample.main(tmp_path)
    for file in ("vocabulary.json", "baseline.json", "medians.json"):
        assert (tmp_path / file).read_text() == (DATA / file).read_text()
    for file in ("train.parquet", "validation.parquet"):
        assert pq.read_table(tmp_path / file).equals(pq.read_table(DATA / file))
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 500_000


def test_h5ad_scdl_and_tokens_are_the_same_cells(sample_options):
    for name in ("train", "validation"):
        kwargs = {"path": "h5ad", "data_files": str(DATA / f"{name}.h5ad")}
        rows, _ = open_cells("dataset", kwargs, sample_options)
        saved = pq.read_table(DATA / f"{name}.parquet")
        assert rows["input_ids"][:] == saved["input_ids"].to_pylist()
        assert rows["cell_type"][:] == saved["cell_type"].to_pylist()
    options = Options("dataset", sample_options.dictionary)
    scdl, _ = open_cells("dataset", {"path": "scdl", "data_files": str(DATA / "scdl")}, options)
    assert scdl["input_ids"][:] == rows["input_ids"][:]


def test_types_can_be_told_apart_and_ranks_say_little():
    tables = {name: pq.read_table(DATA / f"{name}.parquet").to_pydict() for name in ("train", "validation")}
    size = len(json.loads((DATA / "vocabulary.json").read_text()))

    def marks(cells: list[list[int]]) -> np.ndarray:
        found = np.zeros((len(cells), size))
        for row, cell in zip(found, cells, strict=True):
            row[cell[: len(cell) // 3]] = 1  # the highest third of its ranks
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    train, validation = (marks(tables[name]["input_ids"]) for name in ("train", "validation"))
    nearest = (validation @ train.T).argmax(1)
    right = [tables["train"]["cell_type"][i] == kind
             for i, kind in zip(nearest, tables["validation"]["cell_type"], strict=True)]  # fmt: skip
    assert np.mean(right) > 0.9
    baseline = json.loads((DATA / "baseline.json").read_text())
    assert baseline["rank_position_loss"] < baseline["frequency_loss"] < np.log(size)
