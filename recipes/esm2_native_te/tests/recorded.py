# SPDX-License-Identifier: Apache-2.0
"""What trainers read: little data written for them, and the batches that they took."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from common.batch import Batch
from dataset import ALPHABET, VOCABULARY, TrainLoader


DATA = "dataset.load_dataset_kwargs"


def proteins(num: int, shortest: int = 5, longest: int = 60, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("LAGVSERTIDPKQNFYMHWC"), random.integers(shortest, longest + 1)))
            for _ in range(num)]  # fmt: skip


def write(folder: Path, *files: list[str]) -> str:
    """One Parquet file for each list; the override that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sequences in enumerate(files):
        pq.write_table(pa.table({"sequence": pa.array(sequences, pa.string())}), folder / f"{number}.parquet")
    return f"{DATA}.data_files={folder}/*.parquet"


def seq_lens_of(batch: Batch) -> list[int]:
    mask = batch.inputs.get("attention_mask")
    return batch.inputs["seq_lens"] if mask is None else mask.sum(1).tolist()


def sequences_of(batch: Batch) -> list[str]:
    """What a batch was before it was masked and laid out."""
    tokens = torch.where(batch.inputs["labels"] == -100, batch.inputs["input_ids"], batch.inputs["labels"])
    if "attention_mask" in batch.inputs:
        tokens = tokens[batch.inputs["attention_mask"].bool()]
    framed = [part.tolist() for part in tokens.split(seq_lens_of(batch))]
    assert all((part[0], part[-1]) == (*ALPHABET.start, *ALPHABET.end) for part in framed)
    return ["".join(VOCABULARY[token] for token in part[1:-1]) for part in framed]


def record(patch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that the trainers in this process take from here on."""
    taken, plain = [], TrainLoader.__iter__

    def recorded(loader):
        for batch in plain(loader):
            taken.append(batch)
            yield batch

    patch.setattr(TrainLoader, "__iter__", recorded)
    return taken


def contents(batches: list[Batch]) -> list[tuple]:
    return [(batch.name, sequences_of(batch), batch.inputs["labels"].tolist()) for batch in batches]
