# SPDX-License-Identifier: Apache-2.0
"""Medians and a vocabulary of a corpus in one pass: within the bound that is promised, and complete."""

import json

import numpy as np
import pytest
from cell_files import GENES, counts, write_h5ad, write_scdl

import make_vocabulary
from cells import medians, token_cache
from cells.dictionaries import rule_of
from cells.rank_values import Block, Genes


def exact(dense: np.ndarray) -> dict[str, float]:
    scaled = dense / dense.sum(1, keepdims=True) * 10_000
    return {name: float(np.median(column[column > 0])) for name, column in zip(GENES, scaled.T, strict=True)}


def test_a_median_is_within_a_512th_of_itself():
    random = np.random.default_rng(0)
    for width in (0.01, 1.0, 3.0):
        dense = np.exp(random.normal(2, width, (4001, 1)))
        pairs = np.concatenate((dense, 100 - dense.clip(0, 99)), axis=1)
        rows, columns = np.nonzero(pairs)
        block = Block(0, np.searchsorted(rows, np.arange(len(pairs) + 1)), columns, pairs[rows, columns])
        genes = Genes(np.array([0, -1]), np.arange(1), np.ones(1), False)
        truth = np.median(dense[:, 0] / pairs.sum(1) * 10_000)
        found = medians.Medians()
        found.add(medians.packed(*medians.count(block, genes), ["a"], 4001))
        assert abs(found.result()["a"] / truth - 1) <= 1 / 512
    values = np.ldexp(random.uniform(1, 2, 10_000), random.integers(-13, 14, 10_000))
    assert (np.abs(medians.middles()[medians.bins_of(values)] / values - 1) <= 1 / 512).all()


@pytest.mark.parametrize("kind", ["h5ad", "scdl"])
def test_a_vocabulary_of_a_corpus(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(token_cache, "PART", 70)
    dense = counts(300, seed=4)
    write = write_h5ad if kind == "h5ad" else write_scdl
    write(tmp_path / f"one.{kind}", dense[:100])
    write(tmp_path / f"two.{kind}", dense[100:, ::-1], names=GENES[::-1])
    files = [str(tmp_path / f"one.{kind}"), str(tmp_path / f"two.{kind}")]
    make_vocabulary.main([*files, "--out", str(tmp_path / "out"), "--processes", "1"])
    assert "40 genes from 300 cells" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "medians.json").read_text())
    truth = exact(dense)
    assert found.keys() == truth.keys()
    assert all(abs(found[name] / truth[name] - 1) <= 1 / 512 for name in truth)
    tokens = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert rule_of(tokens).name == "V2" and [*tokens][:4] == ["<pad>", "<mask>", "<cls>", "<eos>"]
    assert [*tokens.values()] == [*range(44)] and not list((tmp_path / "out").glob(".parts*"))


def test_rare_genes_are_left_out_and_bad_cells_refused(tmp_path):
    dense = counts(50)
    dense[1:, 7] = 0
    dense[0, 7] = 3
    path = str(write_h5ad(tmp_path / "a.h5ad", dense))
    words = [path, "--out", str(tmp_path / "out"), "--processes", "1"]
    make_vocabulary.main([*words, "--min-cells", "2", "--rule", "V1"])
    tokens = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert GENES[7] not in tokens and rule_of(tokens).name == "V1"
    dense[3, 2] = -1
    words[0] = str(write_h5ad(tmp_path / "b.h5ad", dense))
    with pytest.raises(ValueError, match=rf"row 3 has a negative count, -1 of gene {GENES[2]}; --bad-cells=leave_out"):
        make_vocabulary.main(words)
    make_vocabulary.main([*words, "--bad-cells", "leave_out"])
    with pytest.raises(ValueError, match=r"none.h5ad: no such file"):
        make_vocabulary.main([str(tmp_path / "none.h5ad"), *words[1:]])
