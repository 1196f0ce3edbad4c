# SPDX-License-Identifier: Apache-2.0
"""Tables as people have them: columns nobody needs, other separators, odd names of folders, whole folders."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protein_files import PROTEINS, assert_refused, make_loader, read_epochs, write


def sequences(distributed, kwargs: dict, **options) -> list[str]:
    """What one epoch reads, sorted."""
    return sorted(read_epochs(make_loader(distributed, kwargs, max_seq_length=256, **options), 1)[0])


def write_table(path: Path, table: pa.Table) -> None:
    kind = path.suffix[1:]
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        path.write_text("\n".join(map(json.dumps, table.to_pylist())))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "json"])
def test_only_the_column_that_is_needed_has_to_be_in_all_files(distributed, tmp_path, kind, streaming):
    tables = [
        {"sequence": ["MKV", "MKL"], "id": ["a", "b"], "length": [1, 2], "odd": [{"a": 1}, {"a": 2}]},
        {"organism": ["x"], "sequence": ["MKI"]},
        {"id": [7], "length": ["long"], "sequence": ["MKA"], "odd": [1.5]},
    ]
    for i, table in enumerate(tables):
        write_table(tmp_path / f"{i}.{kind}", pa.table(table))
    kwargs = {"path": kind, "data_files": f"{tmp_path}/*.{kind}", "split": "train", "streaming": streaming}
    loader = make_loader(distributed, kwargs)
    assert sorted(read_epochs(loader, 1)[0]) == ["MKA", "MKI", "MKL", "MKV"]
    if not streaming:
        rows = loader.plan.source.column.rows.with_format(None)
        assert rows["id"][:] == ["a", "b", None, "7"] and loader.plan.source.describe([3], 0) == ["MKA  id=7"]


def test_types_of_parquet_that_datasets_does_not_know(distributed, tmp_path):
    """A dictionary for the sequences, nothing but nulls in the first file, and another column that is a map."""
    others = pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64()))
    encoded = pa.array(["MKV", "MKL"]).dictionary_encode()
    write_table(tmp_path / "0.parquet", pa.table({"sequence": pa.nulls(2), "other": others}))
    write_table(tmp_path / "1.parquet", pa.table({"sequence": encoded, "id": encoded, "other": others}))
    kwargs = {"path": "parquet", "data_files": f"{tmp_path}/*.parquet", "split": "train"}
    assert sequences(distributed, kwargs) == ["MKL", "MKV"]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz"])
def test_another_column_may_change_its_type_after_thousands_of_rows(distributed, tmp_path, name):
    ids = [*range(11_000), "P1", *range(500)]
    if "csv" in name:
        text = "id,sequence\n" + "".join(f"{i},MKV\n" for i in ids)
    else:
        text = "".join(json.dumps({"id": i, "more": i if i != "P1" else [1], "sequence": "MKV"}) + "\n" for i in ids)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    kwargs = {"path": "csv" if "csv" in name else "json", "data_files": str(tmp_path / name), "split": "train"}
    source = make_loader(distributed, kwargs).plan.source
    assert len(source) == 11_501 and source.describe([10_999, 11_000], 0) == ["MKV  id=10999", "MKV  id=P1"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_words_for_missing_values_are_peptides(distributed, tmp_path, kind, streaming):
    peptides = ["NA", "NAN", "NULL", "nan", "INF", "None", "TRVE"]
    write_table(tmp_path / f"a.{kind}", pa.table({"id": list(range(7)), "sequence": peptides}))
    kwargs = {"path": kind, "data_files": f"{tmp_path}/a.{kind}", "split": "train", "streaming": streaming}
    assert sequences(distributed, kwargs) == sorted(peptide.upper() for peptide in peptides)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shape", ["list", "many lines", "by column", "field", "mark"])
def test_every_shape_of_json(distributed, tmp_path, shape, streaming):
    rows = [{"id": i, "sequence": s} for i, s in enumerate(["MKV", "MKL"])]
    text = {
        "list": json.dumps(rows),
        "many lines": json.dumps(rows, indent=1),
        "by column": json.dumps({name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}),
        "field": json.dumps({"version": 1, "data": rows}),
        "mark": "\ufeff" + "\n".join(map(json.dumps, rows)),
    }[shape]
    (tmp_path / "a.json").write_text(text)
    kwargs = {"path": "json", "data_files": str(tmp_path / "a.json"), "split": "train", "streaming": streaming}
    assert sequences(distributed, kwargs | ({"field": "data"} if shape == "field" else {})) == ["MKL", "MKV"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "text", ["id\tsequence\n1\tMKV\n", "id;sequence\n1;MKV\n", "id|sequence\n1|MKV\n", "id, sequence\n1, MKV\n"]
)
def test_other_separators_than_commas(distributed, tmp_path, text, streaming):
    (tmp_path / "a.tsv").write_text(text)
    kwargs = {"path": "csv", "data_files": str(tmp_path / "a.tsv"), "split": "train", "streaming": streaming}
    assert sequences(distributed, kwargs) == ["MKV"]


# ---- where the files are


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a [1]", "[!a]", "b*c", "what?", "{x,y}", "sp ace", "Bücher", "100%", "a#b", "it's"])
def test_signs_in_the_names_of_folders(distributed, tmp_path, monkeypatch, name, streaming):
    folder = tmp_path / name / "in"
    folder.mkdir(parents=True)
    given = write(folder, "fasta", ["MKV", "MKL"]) | {"streaming": streaming}
    monkeypatch.chdir(folder)
    for where in (
        {},
        {"data_files": f"{folder}/*.fasta"},
        {"data_files": "proteins.fasta"},
        {"data_files": "*.fasta"},
        {"data_files": str(folder)},
        {"data_files": None, "data_dir": str(folder)},
        {"data_files": None, "path": str(folder)},
    ):
        assert sequences(distributed, given | where) == ["MKL", "MKV"], where


def test_a_folder_of_files(distributed, tmp_path):
    for i in range(3):
        write(tmp_path, "fasta.gz" if i else "fasta", PROTEINS[i::3], f"part_{i}")
    (tmp_path / "README.md").write_text("what these are")
    kwargs = {"path": "fasta", "data_files": str(tmp_path), "split": "train"}
    assert Counter(sequences(distributed, kwargs)) == Counter(PROTEINS)
    assert_refused(
        [f"data_files={tmp_path}: a folder without a file that ends in .csv, .tsv; it has README.md, part_0.fasta"],
        lambda: make_loader(distributed, kwargs | {"path": "csv"}),
    )


def test_empty_files_are_named_all_at_once(distributed, tmp_path):
    write(tmp_path, "fasta", ["MKV"])
    for name in ("b.fasta", "c.fasta"):
        (tmp_path / name).touch()
    (tmp_path / "d.fasta.gz").write_bytes(gzip.compress(b""))
    kwargs = {"path": "fasta", "data_files": f"{tmp_path}/*.fasta*", "split": "train"}
    assert_refused(["3 files are empty", "b.fasta", "c.fasta", "d.fasta.gz"], lambda: make_loader(distributed, kwargs))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_has_written(distributed, tmp_path, streaming):
    rows = datasets.Dataset.from_dict({"sequence": ["MKV", "MKL", "MKI", "MKA"], "other": [[1]] * 4})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two [1]")
    for path, split, expected in (
        ("one", "train", ["MKA", "MKI", "MKL", "MKV"]),
        ("one", "train[:50%]", ["MKL", "MKV"]),
        ("two [1]", "test", ["MKL"]),
        ("two [1]", "train[2:]+test", ["MKA", "MKI", "MKL"]),
    ):
        kwargs = {"path": str(tmp_path / path), "split": split, "streaming": streaming}
        assert sequences(distributed, kwargs) == expected
    assert_refused(
        ["dataset.load_dataset_kwargs", "valid"], lambda: make_loader(distributed, kwargs | {"split": "valid"})
    )
    wrong = {"sequence_column": "protein"}
    assert_refused(
        ["dataset.sequence_column=protein", "it has sequence, other"],
        lambda: make_loader(distributed, kwargs, **wrong),
    )
