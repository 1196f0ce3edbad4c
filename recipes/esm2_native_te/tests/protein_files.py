# SPDX-License-Identifier: Apache-2.0
"""What tests of the data share: proteins in files of every kind, and what a loader reads of them."""

import gzip
import json
import sqlite3
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.contract.ranks import content
from dataset import ALPHABET, VOCABULARY, TrainLoader


RESIDUES = "LAGVSERTIDPKQNFYMHWC"


def random_proteins(num: int, longest: int = 120, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return ["M" + "".join(random.choice(list(RESIDUES), random.integers(1, longest))) for _ in range(num)]


PROTEINS = random_proteins(60)


def write(folder: Path, kind: str, sequences: list[str | None] = PROTEINS, stem: str = "proteins") -> dict:
    """Write the sequences as such a file; the `load_dataset_kwargs` that read it."""
    path = folder / f"{stem}.{kind}"
    rows = {
        "id": [f"p{i}" for i in range(len(sequences))],
        "sequence": sequences,
        "length": list(range(len(sequences))),
    }
    if kind == "parquet":
        pq.write_table(pa.table(rows), path, row_group_size=7)  # several chunks
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.table(rows).schema) as writer:
            writer.write_table(pa.table(rows), max_chunksize=7)
    elif kind == "csv":
        datasets.Dataset.from_dict(rows).to_csv(path)
    elif kind == "json":
        path.write_text(
            "\n".join(json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True))
        )
    else:  # lines of 30 residues, each ended as on Windows
        lines = [f">p{i} a protein\r\n" + "".join(f"{s[j : j + 30]}\r\n" for j in range(0, len(s), 30))
                 for i, s in enumerate(sequences)]  # fmt: skip
        with gzip.open(path, "wt", newline="") if kind == "fasta.gz" else path.open("w", newline="") as file:
            file.writelines(lines)
    return {"path": kind.removesuffix(".gz"), "data_files": str(path), "split": "train"}


def make_loader(distributed, load_dataset_kwargs: dict, seed: int = 1, packed: bool = True, **options) -> TrainLoader:
    defaults = {"token_micro_batch_size": 256, "max_seq_length": 100, "num_workers": 0, "window_rows": 16}
    if options.get("micro_batch_size"):
        defaults["token_micro_batch_size"] = None
    return TrainLoader(distributed, seed, packed, 1, load_dataset_kwargs=load_dataset_kwargs, **defaults | options)


def read(loader: TrainLoader, num: int) -> list[tuple]:
    return [content(batch) for batch in islice(loader, num)]


def sequences_of(batch_content: tuple) -> list[str]:
    """The residues of a packed batch as they were before the masks."""
    *_, inputs = batch_content
    tokens = [t if label == -100 else label for t, label in zip(inputs["input_ids"], inputs["labels"], strict=True)]
    ends = np.cumsum(inputs["seq_lens"])
    framed = [tokens[end - n : end] for n, end in zip(inputs["seq_lens"], ends, strict=True)]
    assert all((s[0], s[-1]) == (*ALPHABET.start, *ALPHABET.end) for s in framed)
    return ["".join(VOCABULARY[t] for t in s[1:-1]) for s in framed]


def read_epochs(loader: TrainLoader, num: int) -> list[list[str]]:
    """The sequences of so many epochs."""
    epochs = [[] for _ in range(num)]
    for batch in loader:
        if batch.name[0] >= num:
            return epochs
        epochs[batch.name[0]] += sequences_of(content(batch))
    raise AssertionError("a loader never ends")


# ---- clusters


CLUSTERS = [[f"c{c}_m{m}" for m in range(1 + c % 4)] for c in range(40)]
MEMBERS = dict(zip([m for members in CLUSTERS for m in members], random_proteins(100, 40, seed=9), strict=True))


def write_clusters(folder: Path, table: str = "protein", left_out: str | None = None) -> dict:
    """40 clusters of one to four members, as BioNeMo 2 has them."""
    columns = {"ur50_id": [members[0] for members in CLUSTERS], "ur90_id": CLUSTERS}
    pq.write_table(pa.table(columns), folder / "clusters.parquet")
    with sqlite3.connect(folder / "a #1 database.db") as connection:
        connection.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY, sequence TEXT)")
        rows = [(key, value) for key, value in MEMBERS.items() if key != left_out]
        connection.executemany(f"INSERT INTO {table} VALUES (?, ?)", rows)
    connection.close()
    kwargs = {"path": "parquet", "data_files": str(folder / "clusters.parquet"), "split": "train"}
    return {"load_dataset_kwargs": kwargs, "protein_database": str(folder / "a #1 database.db")}


def assert_refused(parts: list[str], action) -> None:
    """It ends with one sentence that has these parts in it."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
