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
from common.contract.ranks import call_on_ranks
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


def on_a_rank(distributed, words: list[str]) -> None:
    embed_cells.CELLS_PER_PART = 30
    embed_cells.embed(distributed, embed_cells.parse(words))


def test_ranks_share_the_cells(model, tmp_path):
    words = [str(DATA / "scdl"), str(model), str(tmp_path / "two.parquet"), *FAST]
    call_on_ranks(tmp_path / "ranks", on_a_rank, 2, words)
    labels, found = in_parquet(tmp_path / "two.parquet")
    cells = pq.read_table(DATA / "validation.parquet")["input_ids"].to_pylist()
    assert labels["cell"] == [*range(80)] and np.allclose(found, expected(model, cells), atol=2e-5)


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
        (["--where", "age=3"], r"--where: .* has no column age"),
        (["--vocabulary", "V2"], "is not that of|known by its numbers alone"),
    ):
        refused(capfd, sentence, perturb, [*words, *more])


def in_parquet(path: Path) -> tuple[dict, np.ndarray]:
    table = pq.read_table(path)
    return table.drop(["embedding"]).to_pydict(), np.array(table["embedding"].to_pylist(), np.float32)


def test_a_folder_of_files_becomes_a_folder_and_goes_on(model, tmp_path, monkeypatch, capfd):
    random = np.random.default_rng(0)
    names = H5ad(FILE, "X").columns()["index"]
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for place in ("a.h5ad", "deeper/a.h5ad"):
        write_h5ad(tmp_path / "in" / place, random.integers(0, 3, (7, 400)).astype(np.float32), names=names)
    words = [str(tmp_path / "in"), str(model), str(tmp_path / "out"), *FAST]
    real = Parts.save

    def killed(self, number, table):
        if "deeper" in str(self.target):
            raise KeyboardInterrupt
        real(self, number, table)

    monkeypatch.setattr(Parts, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_cells.main(words)
    made = (tmp_path / "out" / "a.h5ad").stat().st_mtime_ns
    monkeypatch.setattr(Parts, "save", real)
    embed_cells.main(words)
    assert (tmp_path / "out" / "a.h5ad").stat().st_mtime_ns == made
    both = [vectors(tmp_path / "out" / place) for place in ("a.h5ad", "deeper/a.h5ad")]
    embed_cells.main([str(tmp_path / "in" / "*.h5ad"), *words[1:2], str(tmp_path / "one.parquet"), *words[3:]])
    labels, found = in_parquet(tmp_path / "one.parquet")
    assert labels == {"source": ["a.h5ad"] * 7, "cell": [*range(7)]} and (found == both[0]).all()
    assert np.abs(both[0] - both[1]).max() > 0.01
    refused(capfd, r"out/a.h5ad exists", embed_cells, [*words, "--cls"])
    words[2] = str(tmp_path / "all.h5ad")
    refused(capfd, r"all.h5ad: give a name of a folder, or one that .* 2 h5ad", embed_cells, words)


def test_scdl_and_tokens_have_the_same_vectors(model, tmp_path, capfd):
    embed_cells.main([FILE, str(model), str(tmp_path / "h5ad.parquet"), *FAST])
    truth = in_parquet(tmp_path / "h5ad.parquet")[1]
    embed_cells.main([str(DATA / "scdl"), str(model), str(tmp_path / "scdl.parquet"), *FAST])
    labels, found = in_parquet(tmp_path / "scdl.parquet")
    assert labels["cell"] == [*range(80)] and (found == truth).all()
    table = pq.read_table(DATA / "validation.parquet")
    (tmp_path / "tables").mkdir()
    for number in (0, 1):
        pq.write_table(table.slice(50 * number, 50), tmp_path / "tables" / f"{number}.parquet")
    words = [str(tmp_path / "tables"), str(model), str(tmp_path / "tokens.parquet"), *FAST[1:], "--color-by=cell_type"]
    embed_cells.main(words)
    labels, found = in_parquet(tmp_path / "tokens.parquet")
    assert labels["row"] == [*range(80)] and labels["cell_type"] == table["cell_type"].to_pylist()
    assert np.allclose(found, truth, atol=1e-6) and (tmp_path / "tokens.png").exists()
    words[2] = str(tmp_path / "out.h5ad")
    refused(capfd, r"vectors of tokens go into a parquet file", embed_cells, words)
    words[0] = str(DATA / "make_sample.py")
    refused(capfd, r"cells are read from h5ad files, SCDL folders, or tables", perturb, words[:-1])
    refused(capfd, r"--medians is not set", perturb, [FILE, *words[1:-1]])
    refused(capfd, r"none.parquet: no such file", perturb, ["none.parquet", *words[1:-1]])
    refused(capfd, r"are of two kinds", perturb, [FILE, str(DATA / "scdl"), *words[1:-1]])
    words = [str(tmp_path / "tables"), str(model), str(tmp_path / "tokens.csv"), *FAST[1:], "--max-cells=2"]
    perturb.main([*words, "--where=cell_type=B cell", "--action=overexpress", "--genes", "ENSG99000000007"])
    assert pyarrow.csv.read_csv(tmp_path / "tokens.csv").to_pylist()[0]["num_cells"] == 2
