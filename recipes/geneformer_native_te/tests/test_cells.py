# SPDX-License-Identifier: Apache-2.0
"""Tokens of cells: the published rules, and every kind of file that has the counts."""

import json
import pickle
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from cell_files import GENES, counts, tokens_in_loops, write_h5ad, write_scdl

from cells import h5ad, token_cache
from cells.dictionaries import Dictionary, read_all, read_dictionary, read_medians, read_tokens, rule_of
from cells.genes import match
from cells.medians import vocabulary_of
from cells.rank_values import Block, tokenize
from cells.token_cache import Options, open_cells
from cells.written import csr
from common import conversion


GOLDEN = Path(__file__).parent / "golden_cells"


@pytest.fixture
def medians() -> dict[str, float]:
    random = np.random.default_rng(1)
    return {
        name: float(value) for name, value in zip(GENES[:36], random.choice([0.5, 1.0, 2.0, 3.3], 36), strict=True)
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dictionary(medians: dict[str, float], rule: str = "V2", names: dict | None = None) -> Dictionary:
    return Dictionary(vocabulary_of(medians, rule), medians, names or {})


def opened(path, medians, kind: str = "h5ad", rule: str = "V2", **options) -> tuple[list[list[int]], list[str]]:
    names, processes = options.pop("names", None), options.pop("processes", 1)
    wanted = Options("dataset", dictionary(medians, rule, names), **options)
    rows, notes = open_cells("dataset", {"path": kind, "data_files": str(path)}, wanted, processes)
    assert rows["length"][:] == [len(some) for some in rows["input_ids"]]
    return rows["input_ids"][:], notes


@pytest.mark.parametrize("rule", ["V1", "V2", "BioNeMo"])
@pytest.mark.parametrize("longest", [4, 9, 2048])
def test_tokens_are_those_of_the_published_rules(rule, longest, medians):
    dense = counts(200)
    names = [*GENES[:30], f"{GENES[5]}.3", *GENES[30:39]]  # one gene twice, with a version; three are unknown
    vocabulary = dictionary(medians, rule)
    genes, _, note = match("f", "dataset", {"index": names}, None, vocabulary)
    assert "1 repeated" in note
    block = Block(0, *csr(dense))
    mine = [some.tolist() for some in tokenize(block, genes, vocabulary.rule, longest)]
    theirs = tokens_in_loops(dense, names, vocabulary.tokens, medians, rule, longest)
    assert mine == theirs and max(map(len, theirs)) == min(longest, max(map(len, theirs)))


def test_ties_go_in_the_order_of_columns_also_where_entries_are_not_sorted(medians):
    flat = dict.fromkeys(medians, 1.0)
    vocabulary = Dictionary(vocabulary_of(flat, "V1"), flat)
    names = list(reversed(GENES))  # another order than that of tokens
    genes, *_ = match("f", "dataset", {"index": names}, None, vocabulary)
    dense = np.minimum(counts(50), 2)
    pointers, columns, values = csr(dense)
    shuffled = np.concatenate([np.random.default_rng(3).permutation(np.arange(a, b))
                               for a, b in pairwise(pointers)])  # fmt: skip
    mixed = Block(0, pointers, columns[shuffled], values[shuffled])
    expected = tokens_in_loops(dense, names, vocabulary.tokens, flat, "V1", 7)
    assert [some.tolist() for some in tokenize(mixed, genes, vocabulary.rule, 7)] == expected


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("raw", [False, True])
def test_every_form_of_h5ad_gives_the_same(form, raw, medians, tmp_path, monkeypatch):
    monkeypatch.setattr(h5ad, "ENTRIES", 100)  # blocks and stretches of few numbers
    monkeypatch.setattr(token_cache, "PART", 12)
    dense = counts()
    rows, notes = opened(write_h5ad(tmp_path / "a.h5ad", dense, form, raw=raw), medians)
    assert rows == tokens_in_loops(dense, GENES, dictionary(medians).tokens, medians, "V2", 4096)
    assert f"counts of {'raw/X' if raw else 'X'}, 36 of 40 genes known" in notes[0]
    assert not list((tmp_path / "cache").rglob("by_rows_*")), "what was transposed is left behind"


@pytest.mark.parametrize("header", [False, True])
def test_scdl_of_both_generations_gives_the_same_and_stays_as_it_is(header, medians, tmp_path):
    dense = counts()
    folder = write_scdl(tmp_path / "scdl" / "train", dense, header=header)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for file in folder.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    rows, _ = opened(tmp_path / "scdl", medians, "scdl", "BioNeMo")
    assert rows == tokens_in_loops(dense, GENES, dictionary(medians, "BioNeMo").tokens, medians, "BioNeMo", 2048)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_scdl_whose_cells_have_other_genes_in_each_stretch(medians, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    dense, other = counts(20), list(reversed(GENES))
    folder = write_scdl(tmp_path / "scdl", dense, header=True)
    pq.write_table(pa.table({"feature_id": other}), folder / "var_features" / "dataframe_1.parquet")
    np.save(folder / "var_features" / "cumulative_sum_index.npy", np.array([-1, 8, 20]))
    rows, _ = opened(folder, medians, "scdl")
    tokens = dictionary(medians).tokens
    assert rows[:8] == tokens_in_loops(dense[:8], GENES, tokens, medians, "V2", 4096)
    assert rows[8:] == tokens_in_loops(dense[8:], other, tokens, medians, "V2", 4096)


def test_ids_in_a_column_symbols_by_a_mapping_and_several_files(medians, tmp_path):
    dense, symbols = counts(), [f"GENE{i}" for i in range(40)]
    folder = tmp_path / "many"
    (folder / "deep").mkdir(parents=True)
    versions = [f"{name}.{i}" for i, name in enumerate(GENES)]
    write_h5ad(folder / "a.h5ad", dense[:10], names=symbols, var={"feature_id": versions}, obs={"tissue": ["x"] * 10})
    write_h5ad(folder / "deep" / "b.h5ad", dense[10:], names=symbols, obs={"tissue": ["y"] * 20})
    mapping = dict(zip(symbols, GENES, strict=True))
    rows, _ = opened(folder, medians, names=mapping, obs_columns=("tissue",))
    assert rows == tokens_in_loops(dense, GENES, dictionary(medians).tokens, medians, "V2", 4096)
    named, _ = opened(folder / "a.h5ad", medians, gene_column="feature_id")
    assert named == rows[:10]
    wanted = Options("dataset", dictionary(medians, names=mapping), obs_columns=("tissue",))
    table, _ = open_cells("dataset", {"path": "h5ad", "data_files": str(folder), "split": "train[5:15]"}, wanted)
    assert table["tissue"][:] == ["x"] * 5 + ["y"] * 5 and table["cell"][:] == [*range(5, 10), *range(5)]


def test_only_cells_that_passed_the_filter_of_geneformer(medians, tmp_path):
    dense, passed = counts(), [i % 3 for i in range(30)]
    path = write_h5ad(tmp_path / "a.h5ad", dense, obs={"filter_pass": passed})
    kept = dense[np.array(passed) == 1]
    rows, notes = opened(path, medians)
    assert rows == tokens_in_loops(kept, GENES, dictionary(medians).tokens, medians, "V2", 4096)
    assert "20 cells left out whose filter_pass is not 1" in notes[-1]
    assert len(opened(path, medians, rule="BioNeMo")[0]) == 30


def test_a_conversion_goes_on_where_it_was_and_in_processes(medians, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "PART", 10)
    path, done = write_h5ad(tmp_path / "a.h5ad", counts()), []
    real = token_cache.write_part

    def killed(target, part, options):
        if part.first == 20:
            raise KeyboardInterrupt
        done.append(part.first)
        return real(target, part, options)

    monkeypatch.setattr(token_cache, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(path, medians)
    monkeypatch.setattr(token_cache, "write_part", lambda target, part, options: done.append(part.first)
                        or real(target, part, options))  # fmt: skip
    rows, _ = opened(path, medians)
    assert done == [0, 10, 20] and len(rows) == 30
    assert opened(path, medians)[0] == rows and done == [0, 10, 20], "converted again"


def test_processes_give_what_one_does(medians, tmp_path, monkeypatch):
    dense = counts(50)
    monkeypatch.setattr(token_cache, "PART", 17)
    path = write_h5ad(tmp_path / "a.h5ad", dense)
    assert opened(path, medians, processes=2)[0] == tokens_in_loops(
        dense, GENES, dictionary(medians).tokens, medians, "V2", 4096
    )
    assert conversion.in_processes is token_cache.in_processes


@pytest.mark.parametrize("name", ["raw_csr.h5ad", "csc.h5ad", "dense.h5ad", "scdl"])
def test_what_anndata_and_bionemo_scdl_have_written(name, tmp_path):
    """Files and their contents are those of ci/golden_cells.py."""
    golden = json.loads((GOLDEN / "golden.json").read_text())
    dense, flat = np.array(golden["counts"], np.float32), dict.fromkeys(golden["genes"], 1.0)
    tokens = vocabulary_of(flat, "V2")
    kind = "scdl" if name == "scdl" else "h5ad"
    wanted = Options("dataset", Dictionary(tokens, flat), obs_columns=("cell_type", "donor"))
    rows, notes = open_cells("dataset", {"path": kind, "data_files": str(GOLDEN / name)}, wanted)
    assert rows["input_ids"][:] == tokens_in_loops(dense, golden["genes"], tokens, flat, "V2", 4096)
    assert rows["cell_type"][:] == golden["cell_type"] and rows["donor"][:] == golden["donor"]
    assert "12 of 12 genes known, by var's feature_id" in notes[0]


# ---- dictionaries


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/never_made_by_a_pickle"),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_published_pickles_are_read_and_run_nothing(protocol, tmp_path):
    numbers = {"ENSG1": np.float64(2.5), "ENSG2": 3.0, "ENSG3": np.float32(0.5)}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(numbers, protocol))
    assert read_medians("k", tmp_path / "m.pkl") == {"ENSG1": 2.5, "ENSG2": 3.0, "ENSG3": 0.5}
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"<pad>": 0, "ENSG1": 2}, protocol))
    assert read_tokens("k", tmp_path / "t.pkl") == {"<pad>": 0, "ENSG1": 2}
    for bad in ({"a": Malice()}, {"a": np.array([1, "x"], dtype=object)}, OrderedDict(a=1)):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(bad, protocol))
        with pytest.raises(ValueError, match=r"k=.*bad.pkl is no dictionary .*: it names"):
            read_dictionary("k", tmp_path / "bad.pkl")
    assert not Path("/tmp/never_made_by_a_pickle").exists()


def test_vocabularies_of_bionemo_and_their_rules(tmp_path):
    whole = {"vocab": {"[CLS]": 0, "[PAD]": 2, "TP53": 5}, "gene_to_ens": {"TP53": "ENSG00000141510"}}
    (tmp_path / "geneformer.vocab").write_text(json.dumps(whole))
    found = read_tokens("k", tmp_path / "geneformer.vocab")
    assert found == {"[CLS]": 0, "[PAD]": 2, "ENSG00000141510": 5} and rule_of(found).name == "BioNeMo"
    assert rule_of({"<cls>": 2, "<eos>": 3}).name == "V2" and rule_of({"<pad>": 0}).name == "V1"


def test_what_dictionaries_lack_is_one_sentence(tmp_path):
    (tmp_path / "m.json").write_text('{"ENSG1": 0}')
    (tmp_path / "n.json").write_text('{"ENSG1": 2.0}')
    with pytest.raises(ValueError, match=r"ENSG1 has 0.0, not a number above 0"):
        read_all("dataset", {"ENSG1": 2}, str(tmp_path / "m.json"), None)
    with pytest.raises(ValueError, match=r"dataset.medians is not set"):
        read_all("dataset", {"ENSG1": 2}, None, None)
    with pytest.raises(ValueError, match=r"none of the vocabulary's genes"):
        read_all("dataset", {"ENSG2": 2}, str(tmp_path / "n.json"), None)
