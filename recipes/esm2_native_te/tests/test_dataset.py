# SPDX-License-Identifier: Apache-2.0
"""From a user's file to tokens: sources, cleaning, and crops."""

import gzip
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from protein_files import (
    PROTEINS,
    make_loader,
    random_proteins,
    read_epochs,
    write,
)

from common.contract.ranks import excess_chi_square
from common.open_data import Column
from dataset import ALPHABET, VOCABULARY


RECIPE = Path(__file__).parents[1]


# ---- sources


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "json", "fasta", "fasta.gz"])
def test_every_kind_of_file_gives_the_same_sequences(distributed, tmp_path, kind, streaming):
    loader = make_loader(distributed, write(tmp_path, kind) | {"streaming": streaming}, max_seq_length=256)
    for epoch in read_epochs(loader, 2):
        assert Counter(epoch) == Counter(PROTEINS)
    assert loader.notes == []


CLEAN = "".join(f">p{i} Böhm\n{s[:50]}\n{s[50:]}\n" for i, s in enumerate(PROTEINS))
MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        CLEAN.replace("\n", "\r\n").encode(),
        CLEAN.replace("\n", "\r").encode(),
        CLEAN.encode("latin-1"),
        MARK + CLEAN.encode(),
        MARK + CLEAN[: CLEAN.index(">p9")].encode() + MARK + CLEAN[CLEAN.index(">p9") :].encode(),
        CLEAN.replace("\n", "  \t\n\n").encode(),
        CLEAN.rstrip().encode(),
        CLEAN.replace(" Böhm", "").replace(">p", ">"),
        "".join(f">\n{s.lower()}\n" for s in PROTEINS),
        ">first\n>second\n\n" + CLEAN + ">last",
        "; a comment\n\n" + CLEAN,
        gzip.compress(CLEAN.encode("latin-1")),
    ],
    ids=["CRLF", "CR", "Latin-1", "mark", "two files put together", "spaces and blank lines", "no last line end",
         "short headers", "no headers", "empty records", "comment", "gzip"],
)  # fmt: skip
def test_odd_fasta_gives_the_clean_files_sequences(distributed, tmp_path, content, streaming):
    path = tmp_path / "odd.fasta"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kwargs = {"path": "fasta", "data_files": str(path), "split": "train", "streaming": streaming}
    (epoch,) = read_epochs(make_loader(distributed, kwargs, max_seq_length=256), 1)
    assert Counter(epoch) == Counter(PROTEINS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind, content",
    [("fasta", b">a\nMK\xf6VL\n>b\nMK\xc3\xb6VL\n"), ("csv", "sequence\r\nMKöVL\r\nMK\u2028VL\r\n".encode())],
)
def test_a_sign_beyond_ascii_is_one_unknown_residue(distributed, tmp_path, kind, content, streaming):
    (tmp_path / "a").write_bytes(content)
    kwargs = {"path": kind, "data_files": str(tmp_path / "a"), "split": "train", "streaming": streaming}
    loader = make_loader(distributed, kwargs)
    assert read_epochs(loader, 1) == [["MKXVL"] * 2]
    assert loader.notes == ["in the first 2 sequences: 2 unknown characters (read as X)"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows_among_others(distributed, tmp_path, streaming):
    files = [write(tmp_path, "parquet", rows, f"s{i}")["data_files"] for i, rows in enumerate((["MKV"], [], ["MKL"]))]
    kwargs = {"path": "parquet", "data_files": files, "split": "train", "streaming": streaming}
    assert [sorted(e) for e in read_epochs(make_loader(distributed, kwargs), 2)] == [["MKL", "MKV"]] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("declared", [True, False], ids=["as text", "as bytes"])
def test_parquet_whose_bytes_are_no_utf8(distributed, tmp_path, declared, streaming):
    column = pa.array([b"MKVL", b"MK\xf6VL", None])
    if declared:
        column = pa.StringArray.from_buffers(3, *column.buffers()[1:], column.buffers()[0], 1)
    pq.write_table(pa.table({"sequence": column}), tmp_path / "a.parquet")
    kwargs = {"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train", "streaming": streaming}
    assert [sorted(e) for e in read_epochs(make_loader(distributed, kwargs), 2)] == [["MKVL", "MKXVL"]] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "fasta", "fasta.gz"])
def test_a_changed_file_is_read_anew(distributed, tmp_path, kind, streaming):
    kwargs = write(tmp_path, kind, ["MKVL", "MKVA"]) | {"streaming": streaming}
    assert sorted(read_epochs(make_loader(distributed, kwargs), 1)[0]) == ["MKVA", "MKVL"]
    write(tmp_path, kind, ["MKVL", "MKVC"])  # as long as before
    assert sorted(read_epochs(make_loader(distributed, kwargs), 1)[0]) == ["MKVC", "MKVL"]
    write(tmp_path, kind, ["MKVL", "MKVLAG"])  # longer: its index is another one too
    assert sorted(read_epochs(make_loader(distributed, kwargs), 1)[0]) == ["MKVL", "MKVLAG"]


@pytest.mark.parametrize("how", ["list", "pattern", "by split", "from Hydra"])
def test_several_files(distributed, tmp_path, how):
    files = [write(tmp_path, "parquet", PROTEINS[i::2], f"part_{i}")["data_files"] for i in range(2)]
    given = {"pattern": f"{tmp_path}/part_*.parquet", "by split": {"train": files}}.get(how, files)
    kwargs = {"path": "parquet", "data_files": given, "split": "train"}
    loader = make_loader(distributed, OmegaConf.create(kwargs) if how == "from Hydra" else kwargs, max_seq_length=256)
    assert Counter(read_epochs(loader, 1)[0]) == Counter(PROTEINS)


def test_the_column_is_named(distributed, tmp_path):
    pq.write_table(pa.table({"sequence": ["AAAA"] * 3, "chain": ["MKV", "MKL", "MKI"]}), tmp_path / "a.parquet")
    kwargs = {"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train"}
    assert sorted(read_epochs(make_loader(distributed, kwargs, sequence_column="chain"), 1)[0]) == [
        "MKI",
        "MKL",
        "MKV",
    ]


def test_a_column_is_read_by_row(tmp_path):
    rows = datasets.load_dataset(**write(tmp_path, "arrow"))
    assert len(rows.data.column("sequence").chunks) > 1
    places = np.array([59, 0, 7, 6, 33, 7, 58])
    assert Column(rows, "sequence")[places].to_pylist() == [PROTEINS[i] for i in places]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_rows_are_skipped(distributed, tmp_path, streaming):
    sequences = [None if i % 4 == 0 else "-*" if i % 4 == 1 else s for i, s in enumerate(PROTEINS)]
    kwargs = write(tmp_path, "parquet", sequences) | {"streaming": streaming}
    loader = make_loader(distributed, kwargs, max_seq_length=256, window_rows=60)
    assert Counter(read_epochs(loader, 1)[0]) == Counter(s for i, s in enumerate(PROTEINS) if i % 4 > 1)
    assert loader.notes[0] == (
        "in the first 60 sequences: 15 gaps (dropped), 15 stops (dropped at the end, X inside), "
        "30 empty sequences (skipped)"
    )


# ---- cleaning


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer  # not at the top: ranks import this file, and it takes a second

    return AutoTokenizer.from_pretrained(RECIPE / "tokenizer", local_files_only=True)


def test_tokens_are_those_of_esms_tokenizer(tokenizer):
    sequences = [*random_proteins(100, seed=1), "LAGVSERTIDPKQNFYMHWCXBUZO", "M"]
    tokens = ALPHABET.crop([ALPHABET.tokenize(s.encode()) for s in sequences], np.arange(len(sequences)), 1024, 0)
    assert [t.tolist() for t in tokens] == tokenizer(sequences)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(33)] == VOCABULARY


@pytest.mark.parametrize(
    "written, read_as",
    [
        ("mkVl", "MKVL"),
        ("xbuzo", "XBUZO"),
        ("--MK-V.A..", "MKVA"),
        ("MKV*", "MKV"),
        ("MKV**\n", "MKV"),
        ("MKV*--", "MKV"),
        ("MK*V*", "MKXV"),
        ("MKJV1?V", "MKXVXXV"),
        ("MK V\tAL\r\nGG\r\n", "MKVALGG"),
        ("*", ""),
        (" -.*\r\n", ""),
        ("", ""),
    ],
)
def test_the_rule_for_other_signs(written, read_as):
    assert list(ALPHABET.tokenize(written.encode())) == [VOCABULARY.index(letter) for letter in read_as]


def test_what_is_cleaned_is_counted():
    sequences = [b"MKVL", b"mkVL", b"M-K.V", b"MK*V*", b"MJK1", b"", b"--", b"MK V\r\n"]
    assert ALPHABET.describe_cleaning(sequences) == (
        "in the first 8 sequences: 2 lower-case letters (read as upper case), 4 gaps (dropped), 2 stops (dropped at "
        "the end, X inside), 1 digits (read as X: positions, as in GenBank and PIR?), 1 unknown characters (read as "
        "X), 2 empty sequences (skipped)"
    )
    assert ALPHABET.describe_cleaning([b"MKVLXBUZO", b"MK V\r\n"]) is None


@pytest.mark.parametrize(
    ("sequence", "part"),
    [
        (b"ACGTACGTNNacgt", "1 sequences of A, C, G, T, U and N alone (DNA or RNA? read as amino acids)"),
        (b"AUGCUAGCUAGG", "1 sequences of A, C, G, T, U and N alone"),
        (b"M[Oxidation]KV", "1 sequences with brackets (modifications? letters in them are read as residues)"),
        (b"AC(ph)DE", "1 sequences with brackets"),
        (b"        1 mkvlagmkvl agmkvl", "1 digits (read as X: positions"),
    ],
)
def test_what_may_be_no_protein_is_said(sequence, part):
    assert part in ALPHABET.describe_cleaning([b"MKVLIDE", sequence, b"ACGT", b""])
    assert "DNA" not in (ALPHABET.describe_cleaning([b"ACGT", b"GATTACA", b"MKVLACGT"]) or "")  # short peptides


@pytest.mark.parametrize("streaming", [False, True])
def test_titles_of_pir_are_no_sequence(distributed, tmp_path, streaming):
    text = ">P1;CRAB_ANAPL\nALPHA CRYSTALLIN B CHAIN\n  MDITIHNPLI RRPLFSWLAP*\n>F1;X\n\nMKV*\n>plain\nMKL\n"
    (tmp_path / "a.fasta").write_text(text)
    kwargs = {"path": "fasta", "data_files": str(tmp_path / "a.fasta"), "split": "train", "streaming": streaming}
    loader = make_loader(distributed, kwargs)
    assert sorted(read_epochs(loader, 1)[0]) == ["MDITIHNPLIRRPLFSWLAP", "MKL", "MKV"]
    assert "2 records in PIR's format" in loader.notes[0]


def test_what_is_read_is_said_first(distributed, tmp_path):
    kwargs = write(tmp_path, "fasta", ["MKVL", "MKVA", "", "AAAAAAAA"]) | {"split": "train[:75%]"}
    config = OmegaConf.create({"num_train_steps": 30, "micro_batches_per_step": 2})
    loader = make_loader(distributed, kwargs, token_micro_batch_size=None, micro_batch_size=1)
    where = f"fasta {tmp_path}/proteins.fasta, split train[:75%]"
    assert loader.facts(config) == [
        f"dataset: 3 rows, 8 residues from {where}",
        "dataset: the entropy of its residues is 1.560 nats: a model whose loss stays there has learnt nothing from "
        "context",
        "dataset: 30 steps of 2 micro-batches are 30.0 epochs",
    ]
    loader = make_loader(distributed, kwargs | {"split": "train", "streaming": True})
    assert loader.facts(config)[0] == f"dataset: a stream from fasta {tmp_path}/proteins.fasta, split train"


# ---- crops

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"  # 25 different ones: the first one tells where a crop begins
LONG = ALPHABET.tokenize(LETTERS.encode())


def test_crops_start_anywhere_with_equal_chance():
    tokens = np.stack(ALPHABET.crop([LONG] * 20_000, np.arange(20_000), 12, 1, 0))
    assert (
        tokens.shape == (20_000, 12)
        and (tokens[:, 0] == ALPHABET.start[0]).all()
        and (tokens[:, -1] == ALPHABET.end[0]).all()
    )
    assert (np.diff(tokens[:, 1:-1], axis=1) == 1).all()  # a stretch of the sequence, whose letters are tokens 4 .. 28
    starts = tokens[:, 1] - 4
    assert (starts.min(), starts.max()) == (0, 15)  # both ends are seen
    assert excess_chi_square(np.bincount(starts, minlength=16), 20_000 / 16, 15) < 5


def test_crops_are_new_each_epoch_and_belong_to_the_seed():
    rows = np.arange(1000)
    first, again, next_epoch, other_seed = (
        np.stack(ALPHABET.crop([LONG] * 1000, rows, 12, *k)) for k in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert np.array_equal(first, again)
    for other in (next_epoch, other_seed):
        assert (first[:, 1] == other[:, 1]).mean() == pytest.approx(1 / 16, abs=0.03)


def test_crops_of_a_row_do_not_depend_on_its_company():
    together = ALPHABET.crop([LONG] * 50, np.arange(50), 12, 1, 0)
    alone = [ALPHABET.crop([LONG], np.array([row]), 12, 1, 0)[0] for row in range(50)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("length", [1, 9, 10, 11])
def test_only_longer_sequences_are_cropped(length):
    (tokens,) = ALPHABET.crop([LONG[:length]], np.array([3]), 12, 1, 0)
    assert len(tokens) == min(length, 10) + 2
    if length <= 10:
        assert tokens.tolist() == [*ALPHABET.start, *range(4, 4 + length), *ALPHABET.end]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_loader_crops_anew_each_epoch(distributed, tmp_path, streaming):
    kwargs = write(tmp_path, "parquet", [LETTERS] * 40) | {"streaming": streaming}
    epochs = read_epochs(make_loader(distributed, kwargs, max_seq_length=12), 3)
    assert all({len(s) for s in epoch} == {10} and len(epoch) == 40 for epoch in epochs)
    assert len({s for epoch in epochs for s in epoch}) == 16
    assert epochs[0] != epochs[1] != epochs[2]


# ---- real proteins


@pytest.mark.parametrize("budget", [4096, 16384])
def test_an_epoch_of_real_proteins(distributed, real_proteins, budget):
    kwargs = {"path": "parquet", "data_files": real_proteins, "split": "train"}
    options = {"token_micro_batch_size": budget, "max_seq_length": 1024, "window_rows": 10_000}
    lengths = [len(s) for s in pq.read_table(real_proteins).column("sequence").to_pylist()]
    seq_lens, num_batches = [], 0
    for batch in make_loader(distributed, kwargs, **options):
        if batch.name[0] == 1:
            break
        assert batch.counts["tokens"] <= budget
        seq_lens += batch.inputs["seq_lens"]
        num_batches += 1
    assert sorted(seq_lens) == sorted(min(n + 2, 1024) for n in lengths)
    assert sum(seq_lens) / (num_batches * budget) >= 0.99
