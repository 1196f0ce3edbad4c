# SPDX-License-Identifier: Apache-2.0
"""Cells that cannot be right: one sentence that names file, row or gene, and what a key makes of them."""

import struct

import datasets
import h5py
import numpy as np
import pytest
from cell_files import GENES, counts, write_h5ad, write_scdl

from cells.dictionaries import Dictionary
from cells.medians import vocabulary_of
from cells.token_cache import Options, open_cells


FLAT = dict.fromkeys(GENES[:36], 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(path, kind: str = "h5ad", **options):
    wanted = Options("dataset", Dictionary(vocabulary_of(FLAT, "V2"), FLAT), **options)
    return open_cells("dataset", {"path": kind, "data_files": str(path)}, wanted)


def changed(row: int, gene: int, value: float) -> np.ndarray:
    dense = counts()
    dense[row, gene] = value
    return dense


def unknown_only() -> np.ndarray:
    dense = counts()
    dense[5, :36], dense[5, 38] = 0, 4
    return dense


def nothing() -> np.ndarray:
    dense = counts()
    dense[5] = 0
    return dense


CELLS = {
    "negative": (changed(7, 3, -2), rf"a.h5ad: row 7 has a negative count, -2 of gene {GENES[3]}"),
    "nan": (changed(7, 3, np.nan), rf"a.h5ad: row 7 has nan for gene {GENES[3]}"),
    "fraction": (changed(7, 3, 1.5), rf"a.h5ad: row 7 has 1.5 of gene {GENES[3]}, which is no whole count"),
    "empty": (nothing(), r"a.h5ad: row 5 has no counts"),
    "unknown": (unknown_only(), r"a.h5ad: row 5 has no gene of the vocabulary"),
}


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_bad_cell_is_named_or_left_out_and_counted(kind, form, tmp_path):
    dense, sentence = CELLS[kind]
    path = write_h5ad(tmp_path / "a.h5ad", dense, form)
    with pytest.raises(ValueError, match=rf"{sentence}; dataset.bad_cells=leave_out leaves such cells out"):
        opened(path)
    rows, notes = opened(path, bad_cells="leave_out")
    bad = 7 if kind in ("negative", "nan", "fraction") else 5
    assert rows["cell"][:] == [i for i in range(30) if i != bad]
    assert "1 cells left out, the first: " in notes[-1] and f"row {bad} has" in notes[-1]
    with pytest.raises(ValueError, match=sentence):  # of what is converted now
        opened(path)
    assert len(opened(path, bad_cells="keep")[0]) == (30 if kind == "fraction" else 29)


def mouse(names: list[str]) -> list[str]:
    return [name.replace("ENSG", "ENSMUSG") for name in names]


FILES = {
    "normalised": (lambda p: write_h5ad(p, np.log1p(counts())), {}, r"X has no counts: .* for gene ENSG.* in row 0; "
                   r"normalised data cannot be ranked; give raw counts in raw.X"),
    "normalised_by_columns": (lambda p: write_h5ad(p, np.log1p(counts()), "csc"), {}, "X has no counts"),
    "symbols": (lambda p: write_h5ad(p, counts(), names=[f"CD{i}" for i in range(40)]), {},
                r"none of its 40 genes is in the vocabulary; var's index seems to hold symbols \(CD0, CD1, CD2\)"),
    "mouse": (lambda p: write_h5ad(p, counts(), names=mouse(GENES)), {},
              r"none of its 40 genes \(ENSMUSG.*; mouse\) is in the vocabulary; is it of another species"),
    "mixed": (lambda p: write_h5ad(p, counts(), names=[*GENES[:30], *mouse(GENES[30:])]), {},
              r"several species: human \(30, as ENSG00000000100\) and mouse \(10, as ENSMUSG00000000130\)"),
    "genomes": (lambda p: write_h5ad(p, counts(), names=[f"hg38_{name}" for name in GENES[:20]]
                                     + [f"mm10_{name}" for name in mouse(GENES[20:])]), {},
                r"several species: human \(20, as hg38_ENSG00000000100\) and mouse"),
    "no_column": (lambda p: write_h5ad(p, counts()), {"gene_column": "ids"}, "gene_column=ids: .* it has index"),
    "no_layer": (lambda p: write_h5ad(p, counts()), {"layer": "spliced"}, "dataset.layer=spliced: .*; it has X"),
    "no_obs": (lambda p: write_h5ad(p, counts()), {"obs_columns": ("age",)}, "obs_columns: .* has no column age"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_as_counts(name, tmp_path):
    write, options, sentence = FILES[name]
    with pytest.raises(ValueError, match=sentence) as error:
        opened(write(tmp_path / "a.h5ad"), **options)
    assert "a.h5ad" in str(error.value) and "\n" not in str(error.value)


def test_counts_in_a_layer_are_found_and_named(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", np.log1p(counts()), layers={"counts": counts(), "other": counts(seed=2)})
    rows, notes = opened(path)
    assert "counts of layers/counts" in notes[0]
    assert opened(path, layer="counts")[0]["input_ids"][:] == rows["input_ids"][:]
    assert opened(path, layer="other")[0]["input_ids"][:] != rows["input_ids"][:]


def test_files_that_are_cut_short_or_nothing_of_the_kind(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", counts(400))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.h5ad cannot be read: the file is cut short; copy it anew\.$"):
        opened(path)
    path.write_bytes(b"no file of that kind")
    with pytest.raises(ValueError, match=r"a.h5ad cannot be read: it is no HDF5 file"):
        opened(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match=r"is no h5ad file: there is no X in it"):
        opened(path)
    write_h5ad(path, counts())
    with h5py.File(path, "r+") as file:
        pointers = file["X/indptr"][:]
        pointers[-1] += 5
        file["X/indptr"][...] = pointers
    with pytest.raises(ValueError, match=r"X is damaged: indptr has 31 numbers for 30 lines and ends with"):
        opened(path)


def test_names_without_files(tmp_path):
    with pytest.raises(ValueError, match=r"data_files=.*none.h5ad: no such file"):
        opened(tmp_path / "none.h5ad")
    (tmp_path / "a.h5ad").touch()
    with pytest.raises(ValueError, match=r"the file is empty; give one with cells in it"):
        opened(tmp_path)


@pytest.mark.parametrize("header", [False, True])
def test_an_scdl_folder_that_does_not_go_together(header, tmp_path):
    folder = write_scdl(tmp_path / "scdl", counts(), header=header)
    whole = (folder / "data.npy").read_bytes()
    (folder / "data.npy").write_bytes(np.frombuffer(whole, np.float32).astype(np.uint8).tobytes())  # a cast
    with pytest.raises(ValueError, match=rf"scdl.*({'the header is stale' if header else 'it needs header.sch'})"):
        opened(folder, "scdl")
    (folder / "data.npy").write_bytes(whole)
    (folder / "row_ptr.npy").write_bytes((folder / "row_ptr.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"(stale|cut short|metadata.json says 30 cells and row_ptr.npy, .* has 29)"):
        opened(folder, "scdl")
    (folder / "col_ptr.npy").unlink()
    with pytest.raises(ValueError, match=r"is no SCDL folder: it lacks col_ptr.npy"):
        opened(folder, "scdl")


def test_a_header_that_is_none(tmp_path):
    folder = write_scdl(tmp_path / "scdl", counts(), header=True)
    header = (folder / "header.sch").read_bytes()
    for bad in (b"XXXX" + header[4:], header[:30], header[:12] + struct.pack(">I", 9) + header[16:]):
        (folder / "header.sch").write_bytes(bad)
        with pytest.raises(ValueError, match=r"header.sch is no header of SCDL, or is cut short"):
            opened(folder, "scdl")


@pytest.mark.parametrize("header", [False, True])
def test_a_joined_scdl_folder_whose_metadata_speak_of_its_first_part(header, tmp_path):
    """As bionemo-scdl 0.1.3 leaves it behind; its number of cells is that of the genes' index."""
    folder = write_scdl(tmp_path / "scdl", counts(), header=header)
    (folder / "metadata.json").write_text('{"num_rows": 10}')
    assert len(opened(folder, "scdl")[0]) == 30
    np.save(next(folder.glob("*features")) / "cumulative_sum_index.npy", np.array([-1, 10]))
    with pytest.raises(ValueError, match=r"metadata.json says 10 cells and row_ptr.npy, as \w+, has 30"):
        opened(folder, "scdl")


def test_a_file_without_matrix_or_genes(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_group("layers")
    with pytest.raises(ValueError, match=r"a.h5ad has no matrix: neither X, raw.X nor layers"):
        opened(path)
    write_h5ad(path, np.zeros((3, 0), np.float32), "dense", names=[])
    with pytest.raises(ValueError, match=r"a.h5ad has no genes"):
        opened(path)
