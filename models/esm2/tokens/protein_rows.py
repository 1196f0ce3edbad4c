# SPDX-License-Identifier: Apache-2.0
"""Proteins as rows of tokens: an alphabet's rule for text, rows of sequences, and rows of clusters of sequences."""

import sqlite3
import sys
from collections.abc import Iterable
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from common.distributed import Distributed
from common.epoch_plan import uniform_below
from common.open_data import Column, check_column, is_bytes, is_text, open_rows
from common.sizes import CHUNK, cache_of, size_index
from tokens import fasta_reader


DROPPED = b"-. \t\r\n" + bytes(range(0x80, 0xC0))  # of a letter beyond ASCII all but its first byte: it is one sign
MEMBER, CROP = 1, 2  # what a random number is for, as the last part of its key
LABELS = ("id", "name", "accession", "entry", "ur50_id")  # columns that say which protein a row is


def open_proteins(
    section: str, load_dataset_kwargs: dict, column: str, key: str = "sequence_column"
) -> datasets.Dataset | datasets.IterableDataset:
    """As `open_rows`, the column that `key` names and what says which protein it is; FASTA as people have it."""
    fasta_reader.register()
    record = ", each after a line that begins with >" if load_dataset_kwargs.get("path") == "fasta" else ""
    return open_rows(section, load_dataset_kwargs, {key: column}, LABELS, record)


class Alphabet:
    """A model's tokens, one byte each, and how text becomes them.

    The rule for signs that are no residue of the alphabet: lower case counts as upper case; gaps (`-`, `.`) and white
    space are dropped; stops (`*`) are dropped at the end and unknown inside; every other sign is unknown. A
    `separator` stands between chains.
    """

    def __init__(self, vocabulary: list[str], start: str, end: str, unknown: str, separator: str = ""):
        self.residues = "".join(token for token in vocabulary if len(token) == 1 and token.isalpha())
        self.signs = self.residues + separator
        self.tokens = {sign: vocabulary.index(sign) for sign in self.signs}
        self.around, self.unknown, other = (start, end), unknown, vocabulary.index(unknown)
        self.to_token = bytes(self.tokens.get(chr(sign).upper(), other) for sign in range(256))
        self.start, self.end = (bytes([vocabulary.index(token)]) for token in (start, end))

    def tokenize(self, sequence: bytes) -> bytes:
        """Residues as one token id a byte, without the tokens of start and end."""
        return sequence.rstrip(b"*-. \t\r\n").translate(self.to_token, DROPPED)

    def describe_cleaning(self, sequences: list[bytes]) -> str | None:
        """One sentence that counts what is odd in these sequences, and what is read of it; None if that is nothing."""
        counts = np.bincount(np.frombuffer(b"".join(sequences), dtype=np.uint8), minlength=256)
        signs = {"lower-case letters (read as upper case)": self.residues.lower().encode(), "gaps (dropped)": b"-.",
                 f"stops (dropped at the end, {self.unknown} inside)": b"*",
                 f"digits (read as {self.unknown}: positions, as in GenBank and PIR?)": b"0123456789"}  # fmt: skip
        usual = self.signs.encode() + DROPPED + b"".join(signs.values())
        signs[f"unknown characters (read as {self.unknown})"] = bytes(set(range(256)) - set(usual))
        found = [f"{total:,} {what}" for what, which in signs.items() if (total := int(counts[list(which)].sum()))]
        letters = [sequence.translate(None, DROPPED + b"*") for sequence in sequences]
        if nucleic := sum(len(s) >= 10 and not s.translate(None, b"ACGTUNacgtun") for s in letters):
            found.append(f"{nucleic:,} sequences of A, C, G, T, U and N alone (DNA or RNA? read as amino acids)")
        if brackets := sum(any(sign in sequence for sign in (b"(", b"[", b"{")) for sequence in sequences):
            found.append(f"{brackets:,} sequences with brackets (modifications? letters in them are read as residues)")
        if empty := sum(not self.tokenize(sequence) for sequence in sequences):
            found.append(f"{empty:,} empty sequences (skipped)")
        return f"in the first {len(sequences):,} sequences: {', '.join(found)}" if found else None

    def baseline(self, sequences: list[bytes]) -> str:
        """What a model reaches that knows the residues' frequencies and nothing else."""
        tokens = np.frombuffer(b"".join(map(self.tokenize, sequences)), dtype=np.uint8)
        shares = np.bincount(tokens)[np.unique(tokens)] / max(1, len(tokens))
        entropy = -(shares * np.log(shares)).sum()
        return (
            f"the entropy of its residues is {entropy:.3f} nats: a model whose loss stays there "
            "has learnt nothing from context"
        )

    def num_residues(self, sequences: list[bytes]) -> np.ndarray:
        """How many residues `tokenize` leaves of each."""
        return np.array([len(self.tokenize(sequence)) for sequence in sequences], dtype=np.int32)

    def crop(self, residues: list[bytes], rows: np.ndarray, max_seq_length: int, *key: int) -> list[np.ndarray]:
        """Start, residues, end for each row; of a longer one a random stretch, so that its ends are seen as well."""
        room = max_seq_length - 2
        limits = np.array([max(0, len(r) - room) + 1 for r in residues])
        starts = uniform_below(limits, rows, *key, CROP).tolist()
        framed = (self.start + r[s : s + room] + self.end for r, s in zip(residues, starts, strict=True))
        return [np.frombuffer(tokens, dtype=np.uint8) for tokens in framed]

    def streamed(self, max_seq_length: int, column: str, rows: list[dict], numbers: np.ndarray, *key: int) -> tuple:
        """Tokens of a stream's rows, and how many they are; 0 for a row without a residue."""
        tokens = self.crop([self.tokenize(row[column] or b"") for row in rows], numbers, max_seq_length, *key)
        return tokens, np.array([len(t) if len(t) > 2 else 0 for t in tokens])


def num_tokens(num_residues: np.ndarray, max_seq_length: int) -> np.ndarray:
    """With start and end, at most `max_seq_length`; 0 where there is no residue."""
    return np.where(num_residues > 0, np.minimum(num_residues + 2, max_seq_length), 0)


class SequenceRows:
    """Each row is a sequence; a recipe says in which alphabet."""

    alphabet: Alphabet

    def __init__(self, section: str, rows: datasets.Dataset, column: str, max_seq_length: int, seed: int,
                 key: str = "sequence_column"):  # fmt: skip
        check_column(section, key, column, rows.column_names)
        self.section, self.max_seq_length, self.seed = section, max_seq_length, seed
        self.column, self.index = Column(rows, column), None
        self._check_type(f"{section}.{key}={column}", rows.data.column(column).type)

    def _check_type(self, setting: str, kind: pa.DataType) -> None:
        if not is_text(kind) and not is_bytes(kind):
            raise ValueError(f"{setting}: the column holds {kind}, not text.")

    def __len__(self) -> int:
        return len(self.column)

    def sequences(self, rows: np.ndarray, epoch: int) -> list[bytes]:
        """The raw sequences of these rows."""
        return [text or b"" for text in self.column[rows].cast(pa.large_binary()).to_pylist()]

    # ---- the index

    def build_index(self, distributed: Distributed) -> None:
        """Measure all rows, or find what an earlier run has measured; all ranks call it."""
        rows, key = self.column.rows, None
        if rows.cache_files:  # else they are held in memory
            rule = (rows._fingerprint, self.column.name, self.alphabet.to_token, DROPPED, *self._database_key())
            key = sha256(repr(rule).encode()).hexdigest()[:32]
        self.index = size_index(distributed, self.section, key, len(self), self.measure, cache_of(rows))

    def _database_key(self) -> tuple:
        return ()

    def measure(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        """Residues of each row, as the alphabet leaves them."""
        return self.alphabet.num_residues(self.sequences(rows, epoch=0)), None

    @property
    def max_size(self) -> int:
        return self.max_seq_length

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of each row with start and end, at most `max_seq_length`; 0 where no residue is left."""
        return num_tokens(self.index.sizes[rows], self.max_seq_length)

    @cached_property
    def identity(self) -> dict:
        """What tells this data from other data, wherever it lies: sizes of all rows, and what some of them hold."""
        some = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        return {"num_rows": len(self), "sizes": self.index.digest, "content": self.fingerprint(some)}

    def fingerprint(self, rows: np.ndarray) -> str:
        """Of what these rows hold."""
        return sha256(b"\n".join(self.sequences(rows, epoch=0))).hexdigest()[:16]

    # ---- rows

    def odd(self, sequences: list[bytes]) -> str | None:
        """One sentence on what is odd in these, the first of all: as the alphabet counts it, and PIR's format."""
        rows, found = self.column.rows, [self.alphabet.describe_cleaning(sequences)]
        if "id" in rows.data.column_names:
            ids = Column(rows, "id")[np.arange(len(sequences))].to_pylist()
            if titled := sum(bool(fasta_reader.PIR.match(str(name))) for name in ids):
                found.append(f"{titled:,} records in PIR's format (the line after the header, a title, is left out)")
        return "; ".join(filter(None, found)) or None

    @property
    def amount(self) -> str:
        """How much it is."""
        return f"{len(self):,} rows, {self.num_residues:,} residues"

    @property
    def num_residues(self) -> int:
        """Of all rows."""
        return int(self.index.sizes.sum(dtype=np.int64))

    def read(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """The rows' tokens, those too long cropped anew in each epoch."""
        residues = [self.alphabet.tokenize(sequence) for sequence in self.sequences(rows, epoch)]
        return self.alphabet.crop(residues, rows, self.max_seq_length, self.seed, epoch)

    def describe(self, rows: np.ndarray, epoch: int) -> list[str]:
        """A line a row: the beginning of its sequence, and the other text columns, which say what it is."""
        table = self.column.rows.with_format(None)[rows]
        others = [k for k, some in table.items() if k != self.column.name and any(isinstance(v, str) for v in some)]
        lines = []
        for i, sequence in enumerate(self.sequences(rows, epoch)):
            text = sequence.decode(errors="replace")
            text = text if len(text) <= 60 else f"{text[:57]}..."
            lines.append(text + "".join(f"  {k}={table[k][i]}" for k in others if table[k][i] is not None))
        return lines


class ClusterRows(SequenceRows):
    """Each row is a cluster (UniRef50); its members' (UniRef90) sequences are in SQLite `protein(id, sequence)`.

    An epoch shows each cluster once, by a member drawn from (seed, epoch, cluster): Lin et al. 2023, A.1.1.
    """

    def __init__(
        self, section: str, rows: datasets.Dataset, column: str, database: str, max_seq_length: int, seed: int
    ):
        self.database = database
        self.connection: sqlite3.Connection | None = None
        super().__init__(section, rows, column, max_seq_length, seed, key="cluster_column")
        if not Path(database).is_file():
            raise ValueError(f"{section}.protein_database={database}: no such file.")
        try:
            self._query("SELECT id, sequence FROM protein LIMIT 1", [])
        except sqlite3.Error as error:
            if (log := Path(f"{database}-wal")).exists() and log.stat().st_size:
                raise ValueError(
                    f"{section}.protein_database={database}: {log.name} holds changes that can be read only where the "
                    f"folder can be written; there, run: sqlite3 {Path(database).name} 'PRAGMA journal_mode=DELETE'"
                ) from error
            reason = f"not an SQLite file with a table protein(id, sequence): {error}"
            raise ValueError(f"{section}.protein_database={database}: {reason}.") from error

    def _check_type(self, setting: str, kind: pa.DataType) -> None:
        if not is_text(getattr(kind, "value_type", kind)):
            raise ValueError(f"{setting}: the column holds {kind}, not ids.")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"connection": None}  # each worker opens its own

    def _query(self, query: str, values: list[str]) -> list[tuple[str, str]]:
        if self.connection is None:
            address = f"{Path(self.database).absolute().as_uri()}?mode=ro"
            self.connection = sqlite3.connect(address, uri=True, check_same_thread=False)
            log = Path(f"{self.database}-wal")
            try:
                self.connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            except sqlite3.OperationalError:  # locks, or the files of a log beside it, cannot be made there
                if log.exists() and log.stat().st_size:
                    raise
                self.connection = sqlite3.connect(f"{address}&immutable=1", uri=True, check_same_thread=False)
        return self.connection.execute(query, values).fetchall()

    def _members(self, rows: np.ndarray) -> list[list[str]]:
        return [[m] if isinstance(m, str) else m or [] for m in self.column[rows].to_pylist()]

    def _known(self, ids: Iterable[str]) -> dict[str, str | bytes | None]:
        """The raw sequence of each id that the database has."""
        sequences, asked = {}, iter(set(ids))
        while some := list(islice(asked, 500)):  # older SQLite takes 999 placeholders at most
            marks = ",".join("?" * len(some))
            query = f"SELECT CAST(id AS TEXT), sequence FROM protein WHERE id IN ({marks})"
            sequences.update(self._query(query, some))
        return sequences

    def _proteins(self, ids: list[str | None]) -> list[bytes]:
        """The raw sequence of each id. Raises ValueError where the database lacks one, for all that it lacks."""
        sequences = {None: None} | self._known(set(ids) - {None})
        if any(name not in sequences for name in ids):
            raise ValueError(f"{self.section}.protein_database={self.database}: {self._lacking()}")
        return [s if isinstance(s := sequences[i], bytes) else (s or "").encode() for i in ids]

    def _lacking(self) -> str:
        missing, total = set(), 0
        starts = range(0, len(self), CHUNK)
        for first in tqdm(
            starts, unit=f" x {CHUNK:,} rows", desc="members", disable=not sys.stderr.isatty(), leave=False
        ):
            ids = {m for some in self._members(np.arange(first, min(first + CHUNK, len(self)))) for m in some} - {None}
            missing |= ids - self._known(ids).keys()
            total += len(ids)
        shown = ", ".join(sorted(missing)[:5]) + (" ..." if len(missing) > 5 else "")
        return (
            f"it has no protein for {len(missing):,} of {total:,} ids ({shown}); take the database of these clusters, "
            "or leave out the clusters with these members."
        )

    def sequences(self, rows: np.ndarray, epoch: int) -> list[bytes]:
        """The raw sequence of this epoch's member of each of these clusters."""
        members = self._members(rows)
        picks = self._picks(np.array([len(m) for m in members]), rows, epoch)
        return self._proteins([m[pick] if m else None for m, pick in zip(members, picks, strict=True)])

    def _picks(self, num_members: np.ndarray, rows: np.ndarray, epoch: int) -> np.ndarray:
        return uniform_below(num_members, rows, self.seed, epoch, MEMBER)

    def _database_key(self) -> tuple:
        parts = [Path(f"{self.database}{end}") for end in ("", "-wal")]  # the log: what is not in the file yet
        states = [part.stat() for part in parts if part.exists()]
        return str(parts[0].absolute()), *((state.st_size, state.st_mtime_ns) for state in states if state.st_size)

    @property
    def amount(self) -> str:
        """How much it is, of all members."""
        return f"{len(self):,} clusters of {len(self.index.sizes):,} members, {self.num_residues:,} residues"

    def measure(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residues of each member of these clusters, and how many members each has."""
        members = self._members(rows)
        proteins = self._proteins([name for some in members for name in some])
        return self.alphabet.num_residues(proteins), np.array([len(some) for some in members])

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """As in `SequenceRows`, of this epoch's members; 0 for a cluster without any."""
        starts, num_members = self.index.offsets[rows], self.index.offsets[rows + 1] - self.index.offsets[rows]
        places = starts + self._picks(num_members, rows, epoch)
        found = np.zeros(len(rows), dtype=np.int32)
        found[num_members > 0] = self.index.sizes[places[num_members > 0]]
        return num_tokens(found, self.max_seq_length)
