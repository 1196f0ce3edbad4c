# SPDX-License-Identifier: Apache-2.0
"""The recipe's source of rows, counting what is read, for row_index.py; workers import this file and little else."""

import os
import time
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

import dataset
from common.distributed import Distributed
from tokens import protein_rows


WORKERS, INDEX, CHECK = PLACES = ("workers", "index", "check")  # the last: first rows, read to look for odd signs


class Counted(dataset.SequenceRows):
    """Each process writes down when it has read how much, in a file of its own in `log`."""

    place = CHECK

    def __init__(self, log: Path, *arguments):
        super().__init__(*arguments)
        self.log = log

    def sequences(self, rows: np.ndarray, epoch: int) -> list[bytes]:
        """As in the recipe."""
        found = super().sequences(rows, epoch)
        place = WORKERS if get_worker_info() else self.place
        with open(self.log / f"{place}.{os.getpid()}", "a") as file:
            file.write(f"{time.monotonic()} {sum(map(len, found))}\n")
        return found

    def build_index(self, distributed: Distributed) -> None:
        """As in the recipe."""
        self.place = INDEX
        super().build_index(distributed)
        self.place = CHECK


class ReadForLengths(Counted):
    """As the recipe's source was without an index: lengths by reading the rows, which are held for the window."""

    held: dict | None = None

    def build_index(self, distributed: Distributed) -> None:
        """There is none."""

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of each row."""
        residues = [dataset.ALPHABET.tokenize(sequence) for sequence in self.sequences(rows, epoch)]
        self.held = dict(zip(((epoch, row) for row in rows.tolist()), residues, strict=True))
        return protein_rows.num_tokens(np.array([len(some) for some in residues]), self.max_seq_length)

    def read(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Of what is held."""
        residues = [self.held[epoch, row] for row in rows.tolist()]
        return dataset.ALPHABET.crop(residues, rows, self.max_seq_length, self.seed, epoch)


def bytes_read(log: Path, until: float) -> dict[str, int]:
    """Of sequences, up to that time, by where they were read."""
    found = dict.fromkeys(PLACES, 0)
    for file in log.iterdir():
        lines = (line.split() for line in file.read_text().splitlines())
        found[file.name.partition(".")[0]] += sum(int(size) for when, size in lines if float(when) <= until)
    return found
