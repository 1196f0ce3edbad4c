# SPDX-License-Identifier: Apache-2.0
"""Clusters with a database of their members, and the index of sizes of every kind of source."""

import pickle
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from protein_files import (
    CLUSTERS,
    MEMBERS,
    PROTEINS,
    assert_refused,
    make_loader,
    read,
    read_epochs,
    write,
    write_clusters,
)

from common.contract.ranks import excess_chi_square
from dataset import ClusterRows, SequenceRows, open_validation


def clusters_of(sequences: list[str]) -> list[str]:
    ids = {sequence: key for key, sequence in MEMBERS.items()}
    return sorted((ids[s].split("_")[0] for s in sequences), key=lambda c: int(c[1:]))


def test_an_epoch_shows_one_member_of_each_cluster(distributed, tmp_path):
    given = write_clusters(tmp_path)
    epochs = read_epochs(make_loader(distributed, **given), 50)
    for epoch in epochs:
        assert clusters_of(epoch) == [f"c{c}" for c in range(40)]
    assert {s for epoch in epochs for s in epoch} == set(MEMBERS.values())  # in time all members
    assert epochs[:5] == read_epochs(make_loader(distributed, **given), 5)
    assert epochs[:5] != read_epochs(make_loader(distributed, **given, seed=2), 5)


def test_members_have_equal_chances(distributed, tmp_path):
    source = make_loader(distributed, **write_clusters(tmp_path)).plan.source
    rows = np.arange(3, 40, 4)  # those of four members
    draws = Counter(s.decode() for epoch in range(300) for s in source.sequences(rows, epoch))
    counts = np.array([draws[MEMBERS[m]] for row in rows for m in CLUSTERS[row]])
    assert excess_chi_square(counts, 75, 3 * len(rows)) < 5


def test_a_column_of_single_ids(distributed, tmp_path):
    (epoch,) = read_epochs(make_loader(distributed, **write_clusters(tmp_path), cluster_column="ur50_id"), 1)
    assert Counter(epoch) == Counter(MEMBERS[members[0]] for members in CLUSTERS)


def test_clusters_in_workers(distributed, tmp_path):
    given = write_clusters(tmp_path)
    assert read(make_loader(distributed, **given, num_workers=2), 12) == read(make_loader(distributed, **given), 12)


def test_a_source_in_use_can_be_sent_to_a_worker(distributed, tmp_path):
    source = make_loader(distributed, **write_clusters(tmp_path)).plan.source
    assert isinstance(source, ClusterRows) and source.connection is not None
    sent, rows = pickle.loads(pickle.dumps(source)), np.arange(40)
    assert sent.sequences(rows, 3) == source.sequences(rows, 3)
    assert sent.sizes(rows, 3).tolist() == source.sizes(rows, 3).tolist()


def test_empty_clusters_are_skipped_and_many_ids_found(distributed, tmp_path):
    given = write_clusters(tmp_path)
    lists = [[], None, *CLUSTERS * 30]  # more ids than one query of SQLite takes
    pq.write_table(pa.table({"ur90_id": lists}), tmp_path / "clusters.parquet")
    (epoch,) = read_epochs(make_loader(distributed, **given, window_rows=5000), 1)
    assert len(epoch) == 1200


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"protein_database": "/none/x.db"}, ["dataset.protein_database=/none/x.db", "no such file"]),
        ({"protein_database": __file__}, [f"dataset.protein_database={__file__}", "not an SQLite file"]),
        ({"table": "proteins"}, ["a #1 database.db", "table protein(id, sequence)"]),
        ({"left_out": "c7_m0"}, ["a #1 database.db", "1 of 100 ids (c7_m0)"]),
        ({"cluster_column": "cluster"}, ["dataset.cluster_column=cluster", "ur50_id, ur90_id"]),
        ({"cluster_column": "size"}, ["dataset.cluster_column=size", "int64"]),
        ({"streaming": True}, ["dataset.protein_database", "streaming=false"]),
    ],
)
def test_mistakes_with_clusters(distributed, tmp_path, change, parts):
    given = write_clusters(tmp_path, **{k: change.pop(k) for k in ("table", "left_out") if k in change})
    if change.get("cluster_column") == "size":
        pq.write_table(pa.table({"size": [1, 2]}), tmp_path / "clusters.parquet")
    if change.pop("streaming", False):
        given["load_dataset_kwargs"]["streaming"] = True
    assert_refused(parts, lambda: read_epochs(make_loader(distributed, **given | change), 8))


def test_ids_that_the_database_lacks_are_counted(distributed, tmp_path):
    given = write_clusters(tmp_path)
    with sqlite3.connect(given["protein_database"]) as database:
        database.execute("DELETE FROM protein WHERE id LIKE 'c3_m%' OR id LIKE 'c7_m%'")
    database.close()
    parts = ["dataset.protein_database", "8 of 100 ids (c3_m0, c3_m1, c3_m2, c3_m3, c7_m0 ...)", "leave out"]
    assert_refused(parts, lambda: make_loader(distributed, **given))


def test_ids_that_are_numbers_and_sequences_that_are_bytes(distributed, tmp_path):
    pq.write_table(pa.table({"ur90_id": [["1", "2"], ["3"]]}), tmp_path / "clusters.parquet")
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE protein (id INTEGER PRIMARY KEY, sequence BLOB)")
        database.executemany("INSERT INTO protein VALUES (?, ?)", [(1, b"MKV"), (2, b"MKV"), (3, None)])
    database.close()
    kwargs = {"path": "parquet", "data_files": str(tmp_path / "clusters.parquet"), "split": "train"}
    given = {"load_dataset_kwargs": kwargs, "protein_database": str(tmp_path / "a.db")}
    assert read_epochs(make_loader(distributed, **given), 1) == [["MKV"]]


def test_a_database_with_a_log_where_nothing_can_be_written(distributed, tmp_path, monkeypatch):
    """On a mount that cannot be written SQLite opens such a file only as one that nobody changes."""
    given = write_clusters(tmp_path)
    with sqlite3.connect(given["protein_database"]) as database:
        database.execute("PRAGMA journal_mode=WAL")
    database.close()

    class Unwritable(sqlite3.Connection):
        def execute(self, *query):
            raise sqlite3.OperationalError("unable to open database file")

    def connect(address, *, real=sqlite3.connect, **options):
        return real(address, **options, **({} if "immutable=1" in address else {"factory": Unwritable}))

    monkeypatch.setattr(sqlite3, "connect", connect)
    (epoch,) = read_epochs(make_loader(distributed, **given), 1)
    assert clusters_of(epoch) == [f"c{c}" for c in range(40)]
    Path(given["protein_database"] + "-wal").write_bytes(b"changes")
    parts = ["a #1 database.db-wal holds changes", "journal_mode=DELETE"]
    assert_refused(parts, lambda: make_loader(distributed, **given))


# ---- the index of sizes

KINDS = ["parquet", "arrow", "csv", "json", "fasta", "clusters", "single ids"]


def write_some(folder: Path, kind: str) -> dict:
    """What `make_loader` takes for data with empty rows; some of the others are longer than 40 tokens."""
    if kind in ("clusters", "single ids"):
        return write_clusters(folder) | {"cluster_column": "ur90_id" if kind == "clusters" else "ur50_id"}
    return {"load_dataset_kwargs": write(folder, kind, ["" if i % 4 == 0 else "-*" if i % 4 == 1 else s
                                                        for i, s in enumerate(PROTEINS)])}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_what_is_read(distributed, tmp_path, kind):
    source = make_loader(distributed, **write_some(tmp_path, kind), max_seq_length=30).plan.source
    rows = np.random.default_rng(0).permutation(len(source))
    for epoch in range(3):
        lengths = np.array([len(tokens) for tokens in source.read(rows, epoch)])
        assert source.sizes(rows, epoch).tolist() == np.where(lengths > 2, lengths, 0).tolist()
        assert lengths.max() == 30


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """How many rows were measured at once, each time."""
    found = []
    for source in (SequenceRows, ClusterRows):

        def measure(self, rows, real=source.measure):
            found.append(len(rows))
            return real(self, rows)

        monkeypatch.setattr(source, "measure", measure)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_start_measures_nothing(distributed, tmp_path, measured, kind):
    given = write_some(tmp_path, kind)
    first, second = (make_loader(distributed, **given).plan.source for _ in range(2))
    assert measured == [len(first)]
    assert first.identity == second.identity
    make_loader(distributed, **given, max_seq_length=50, seed=7, window_rows=8)  # sizes do not depend on these
    assert measured == [len(first)]


def test_a_second_validation_measures_nothing(distributed, tmp_path, measured):
    kwargs = write(tmp_path, "parquet")
    for max_rows in (None, 30, 30, None):
        open_validation(distributed, True, 1, load_dataset_kwargs=kwargs, micro_batch_size=2, max_rows=max_rows)
    assert measured == [60, 30]


def test_another_database_is_measured_by_itself(distributed, tmp_path, measured):
    given = write_clusters(tmp_path)
    first = make_loader(distributed, **given).plan.source
    with sqlite3.connect(given["protein_database"]) as database:
        database.execute("UPDATE protein SET sequence = 'MKVLAG' WHERE id = 'c0_m0'")
    database.close()
    second = make_loader(distributed, **given).plan.source
    assert measured == [40, 40]
    sizes = [source.sizes(np.array([0]), epoch=0).item() for source in (first, second)]
    assert sizes == [len(MEMBERS["c0_m0"]) + 2, len("MKVLAG") + 2]
    assert first.identity != second.identity
