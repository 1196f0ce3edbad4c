# SPDX-License-Identifier: Apache-2.0
"""Vectors of cells are what plain transformers gives, go on after an interruption, and move as genes are perturbed."""

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from cell_files import write_h5ad
from transformers import AutoModel, BertConfig, BertForMaskedLM

import embed_cells
import perturb
from cells.h5ad import H5ad
from common.parts import Parts


DATA = Path(__file__).parents[1] / "data"
FAST = [f"--medians={DATA}/medians.json", "--layer-backend=torch", "--precision=fp32"]
FILE = str(DATA / "validation.h5ad")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of the sample's vocabulary as transformers writes it, shorter than the longest cells."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = BertConfig(vocab_size=404, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="relu",
                        intermediate_size=64, max_position_embeddings=150, layer_norm_eps=1e-12)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(path)
    shutil.copy(DATA / "vocabulary.json", path)
    return path


def expected(model: Path, cells: list[list[int]], by_cls: bool = False) -> np.ndarray:
    plain = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()
    longest, found = plain.config.max_position_embeddings, []
    for cell in cells:
        tokens = [*cell[: longest - 1], 3] if len(cell) > longest else cell
        with torch.no_grad():
            hidden = plain(torch.tensor([tokens])).last_hidden_state[0].numpy()
        found.append(hidden[0] if by_cls else hidden[1:-1].mean(0))
    return np.stack(found)


def vectors(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        assert file["obsm"].attrs["encoding-type"] == "dict"
        assert file["obsm/X_geneformer"].attrs["encoding-type"] == "array"
        return file["obsm/X_geneformer"][:]


def refused(capfd, sentence: str, command, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert re.search(sentence, capfd.readouterr().err)


def test_vectors_of_cells_are_those_of_transformers_and_go_on(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(embed_cells, "CELLS_PER_PART", 30)
    words, saved, real = [FILE, str(model), str(tmp_path / "out.h5ad"), *FAST], [], Parts.save

    def save(self, number, table):
        if number == 2 and not saved[2:]:
            saved.append("killed")
            raise KeyboardInterrupt
        saved.append(number)
        real(self, number, table)

    monkeypatch.setattr(Parts, "save", save)
    with pytest.raises(KeyboardInterrupt):
        embed_cells.main([*words, "--color-by", "cell_type"])
    embed_cells.main([*words, "--color-by", "cell_type"])
    assert saved == [0, 1, "killed", 2]
    cells = pq.read_table(DATA / "validation.parquet")["input_ids"].to_pylist()
    assert np.allclose(vectors(tmp_path / "out.h5ad"), expected(model, cells), atol=2e-5)
    assert (tmp_path / "out.png").stat().st_size > 10_000
    whole = H5ad(str(tmp_path / "out.h5ad"), "X")
    assert whole.shape == (80, 400) and whole.obs("cell_type", 0, 1)
    refused(capfd, r"out.h5ad exists", embed_cells, words)


def test_by_cls_and_cells_that_are_left_out(model, tmp_path, capfd):
    dense = np.zeros((6, 400), np.float32)
    dense[:5, :40] = np.random.default_rng(0).integers(1, 9, (5, 40))
    path = write_h5ad(tmp_path / "some.h5ad", dense, names=H5ad(FILE, "X").columns()["index"])
    embed_cells.main([str(path), str(model), str(tmp_path / "out.h5ad"), *FAST, "--cls"])
    found = vectors(tmp_path / "out.h5ad")
    assert np.isfinite(found[:5]).all() and np.isnan(found[5]).all()
    words = [str(path), str(model), str(tmp_path / "b.h5ad"), *FAST, "--tokens=0"]
    refused(capfd, r"--tokens=0 must be at least 1", embed_cells, words)


@pytest.mark.parametrize("action", perturb.ACTIONS)
def test_shifts_are_those_of_transformers(action, model, tmp_path):
    some = tmp_path / "cells.h5ad"
    shutil.copy(FILE, some)
    cells = pq.read_table(DATA / "validation.parquet")
    kinds, cells = cells["cell_type"].to_pylist(), cells["input_ids"].to_pylist()
    asked = [i for i, kind in enumerate(kinds) if kind == "B cell"][:400]
    gene = next(g for g in cells[asked[0]][1:20] if sum(g in cells[i] for i in asked) < len(asked))
    name = H5ad(FILE, "X").columns()["index"][gene - 4]
    words = [str(some), str(model), str(tmp_path / "out.csv"), *FAST, f"--action={action}", "--where=cell_type=B cell"]
    perturb.main([*words, "--genes", name])
    row = pyarrow.csv.read_csv(tmp_path / "out.csv").to_pylist()[0]
    plain = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()
    longest, shifts = plain.config.max_position_embeddings, []
    for i in asked:
        tokens = [*cells[i][: longest - 1], 3] if len(cells[i]) > longest else cells[i]
        if action == "delete" and gene not in tokens:
            continue
        left = [token for token in tokens if token != gene]
        after = left if action == "delete" else [2, gene, *left[1:]]
        after = [*after[: longest - 1], 3] if len(after) > longest else after
        with torch.no_grad():
            a, b = (plain(torch.tensor([t])).last_hidden_state[0][[x not in (2, 3, gene) for x in t]].mean(0)
                    for t in (tokens, after))  # fmt: skip
        shifts.append(1 - float(torch.cosine_similarity(a, b, dim=0)))
    assert row["gene"] == name and row["num_cells"] == len(shifts) > 0
    assert row["cosine_shift"] == pytest.approx(np.mean(shifts), abs=2e-6) and row["cosine_shift"] > 1e-6


def test_all_genes_and_mistakes(model, tmp_path, capfd):
    words = [FILE, str(model), str(tmp_path / "out.csv"), *FAST]
    perturb.main([*words, "--max-cells=2"])
    found = pyarrow.csv.read_csv(tmp_path / "out.csv").to_pydict()
    assert len(found["gene"]) > 50 and found["cosine_shift"] == sorted(found["cosine_shift"], reverse=True)
    words[2] = str(tmp_path / "b.csv")
    for more, sentence in (
        (["--genes", "TP53"], "--genes TP53: the vocabulary has no such gene"),
        (["--where", "cell_type=mast"], "there is no such cell; cell_type is one of"),
        (["--where", "age=3"], r"--obs-columns: .* has no column age"),
        (["--vocabulary", "V2"], "is not that of|known by its numbers alone"),
    ):
        refused(capfd, sentence, perturb, [*words, *more])
