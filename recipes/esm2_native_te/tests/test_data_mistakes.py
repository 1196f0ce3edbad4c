# SPDX-License-Identifier: Apache-2.0
"""What a user's data or its description has wrong is one sentence that names the key."""

import pytest
from protein_files import PROTEINS, assert_refused, make_loader, read, write

from common.open_data import one_sentence


def missing(folder):
    return {"path": "parquet", "data_files": str(folder / "none.parquet"), "split": "train"}


def empty_file(folder):
    (folder / "x.parquet").touch()
    return {"path": "parquet", "data_files": str(folder / "x.parquet"), "split": "train"}


def unreadable(folder):
    (folder / "x.parquet").write_text("no parquet\n" * 9)
    return {"path": "parquet", "data_files": str(folder / "x.parquet"), "split": "train"}


def no_rows(folder):
    return write(folder, "parquet", [])


def header_only(folder):
    (folder / "x.csv").write_text("id,sequence\n")
    return {"path": "csv", "data_files": str(folder / "x.csv"), "split": "train"}


def not_fasta(folder):
    (folder / "x.fasta").write_text("no records\n")
    return {"path": "fasta", "data_files": str(folder / "x.fasta"), "split": "train"}


def not_json(folder):
    (folder / "x.json").write_text("{no json}\n")
    return {"path": "json", "data_files": str(folder / "x.json"), "split": "train"}


def all_empty(folder):
    return write(folder, "parquet", ["", "--", "*", " "])


def good(folder):
    return write(folder, "parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "data, options, parts",
    [
        (missing, {}, ["dataset.load_dataset_kwargs.data_files=", "none.parquet", "no such file"]),
        (empty_file, {}, ["dataset.load_dataset_kwargs.data_files=", "x.parquet", "empty"]),
        (unreadable, {}, ["dataset.load_dataset_kwargs", "x.parquet", "cannot load"]),
        (not_json, {}, ["dataset.load_dataset_kwargs", "x.json", "cannot load"]),
        (no_rows, {}, ["dataset.load_dataset_kwargs", "proteins.parquet"]),
        (header_only, {}, ["dataset.load_dataset_kwargs", "x.csv"]),
        (not_fasta, {}, ["dataset.load_dataset_kwargs", "x.fasta"]),
        (all_empty, {}, ["dataset", "first 4 sequences are all empty"]),
        (good, {"sequence_column": "seq"}, ["dataset.sequence_column=seq", "id, sequence, length"]),
        (good, {"sequence_column": "length"}, ["dataset.sequence_column=length", "int64"]),
        (good, {"micro_batch_size": 4, "token_micro_batch_size": 256}, ["dataset.micro_batch_size=4", "=256"]),
        (good, {"token_micro_batch_size": None}, ["dataset.micro_batch_size=None", "token_micro_batch_size=None"]),
        (good, {"token_micro_batch_size": 99}, ["dataset.token_micro_batch_size=99", "dataset.max_seq_length=100"]),
        (good, {"max_seq_length": 2}, ["dataset.max_seq_length=2"]),
        (good, {"mlm_probability": 1.5}, ["dataset.mlm_probability=1.5"]),
        (good, {"window_rows": 0}, ["dataset.window_rows=0"]),
    ],
)
def test_mistakes_are_one_sentence(distributed, tmp_path, data, options, parts, streaming):
    kwargs = data(tmp_path) | {"streaming": streaming}
    assert_refused(parts, lambda: make_loader(distributed, kwargs, **options))


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"split": None}, ["dataset.load_dataset_kwargs.split", "train"]),
        ({"split": "test"}, ["dataset.load_dataset_kwargs", "test"]),
        ({"data_files": None}, ["dataset.load_dataset_kwargs.data_files", "path=parquet"]),
        ({"path": "nobody/nothing", "data_files": None}, ["dataset.load_dataset_kwargs", "nobody/nothing"]),
        ({"colour": 1}, ["dataset.load_dataset_kwargs", "colour"]),
    ],
)
def test_mistakes_in_what_is_loaded(distributed, tmp_path, change, parts):
    assert_refused(parts, lambda: make_loader(distributed, good(tmp_path) | change))


def test_a_stream_whose_later_rows_are_all_empty_does_not_spin(distributed, tmp_path):
    """The first file has sequences and the second none: worker 1 says so, where it would look for one for ever."""
    kwargs = [write(tmp_path, "parquet", rows, f"s{i}") for i, rows in enumerate((PROTEINS[:9], ["-"] * 9))]
    files = {"data_files": [k["data_files"] for k in kwargs], "streaming": True}
    loader = make_loader(distributed, kwargs[0] | files, num_workers=2)
    with pytest.raises(ValueError, match="no rows for rank 0, worker 1"):
        read(loader, 50)


def test_a_cache_that_cannot_be_used(distributed, tmp_path):
    (tmp_path / "file").touch()
    kwargs = good(tmp_path) | {"cache_dir": str(tmp_path / "file")}
    assert_refused(
        ["dataset.load_dataset_kwargs", "cannot be written", "HF_HOME"], lambda: make_loader(distributed, kwargs)
    )


@pytest.mark.parametrize(
    "error", [NotImplementedError("FileSystem does not appear to support flock"), OSError(37, "No locks available")]
)
def test_a_cache_without_locks(error):
    with pytest.raises(ValueError, match=r"dataset.* has no file locks; set HF_HOME"), one_sentence("dataset", {}):
        raise error


def test_forms_that_are_refused(distributed, tmp_path):
    kwargs = good(tmp_path)
    parts = ["split=train[:50%] cannot be combined with streaming=true", "split=train and files"]
    assert_refused(parts, lambda: make_loader(distributed, kwargs | {"streaming": True, "split": "train[:50%]"}))
    file = kwargs["data_files"]
    parts = [f"path={file} is a file; give its format, as path=parquet, and data_files={file}"]
    assert_refused(parts, lambda: make_loader(distributed, kwargs | {"path": file, "data_files": None}))
