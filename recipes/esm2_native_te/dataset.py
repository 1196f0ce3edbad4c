# SPDX-License-Identifier: Apache-2.0
"""Protein rows to batches: sources, cleaning, and what training and validation read."""

import sqlite3
from functools import cached_property, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from omegaconf import DictConfig
from pydantic import NonNegativeInt

import metrics
from collator import MaskedLMCollator
from common import RECIPE
from common.distributed import Distributed
from common.epoch_plan import EpochPlan, uniform_below
from common.loader import Loader, StreamedMicroBatches, start_worker_server
from common.open_data import Column, check_column, first_rows, is_bytes, is_text, open_rows, share_of
from common.sizes import size_index
from common.validation import Validator
from tokens import fasta_reader
from tokens.layout import token_grouping


VOCABULARY = (RECIPE / "tokenizer" / "vocab.txt").read_text().split()
CLS, EOS, UNKNOWN_RESIDUE = (VOCABULARY.index(token) for token in ("<cls>", "<eos>", "X"))
RESIDUES = "".join(token for token in VOCABULARY if len(token) == 1 and token.isalpha())
TOKENS = {letter: VOCABULARY.index(letter) for letter in RESIDUES}
TO_TOKEN = bytes(TOKENS.get(chr(sign).upper(), UNKNOWN_RESIDUE) for sign in range(256))
DROPPED = b"-. \t\r\n" + bytes(range(0x80, 0xC0))  # of a letter beyond ASCII all but its first byte: it is one sign
MEMBER, CROP = 1, 2  # what a random number is for, as the last part of its key
VALIDATION_SEED = 0  # not the run's: the same residues are masked in every validation of every run


def tokenize(sequence: bytes) -> bytes:
    """Residues as one token id a byte, without <cls> and <eos>.

    The rule for signs that are no residue of ESM's alphabet: lower case counts as upper case; gaps (`-`, `.`) and
    white space are dropped; stops (`*`) are dropped at the end and become X inside; every other sign becomes X.
    """
    return sequence.rstrip(b"*-. \t\r\n").translate(TO_TOKEN, DROPPED)


def describe_cleaning(sequences: list[bytes]) -> str | None:
    """One sentence that counts what `tokenize` changes in these sequences; None if that is nothing."""
    counts = np.bincount(np.frombuffer(b"".join(sequences), dtype=np.uint8), minlength=256)
    signs = {"lower-case letters (read as upper case)": RESIDUES.lower().encode(), "gaps (dropped)": b"-.",
             "stops (dropped at the end, X inside)": b"*"}  # fmt: skip
    usual = RESIDUES.encode() + DROPPED + b"".join(signs.values())
    signs["unknown signs (read as X)"] = bytes(set(range(256)) - set(usual))
    found = [f"{total:,} {what}" for what, which in signs.items() if (total := int(counts[list(which)].sum()))]
    if empty := sum(not tokenize(sequence) for sequence in sequences):
        found.append(f"{empty:,} empty sequences (skipped)")
    return f"in the first {len(sequences):,} sequences: {', '.join(found)}" if found else None


def check_limits(section: str, max_seq_length: int, mlm_probability: float, window_rows: int) -> None:
    """Raise ValueError for a number that leaves nothing to learn from."""
    if max_seq_length < 3:
        raise ValueError(f"{section}.max_seq_length={max_seq_length} must be at least 3: <cls>, a residue, <eos>.")
    if not 0 < mlm_probability < 1:
        raise ValueError(f"{section}.mlm_probability={mlm_probability} must lie between 0 and 1.")
    if window_rows < 1:
        raise ValueError(f"{section}.window_rows={window_rows} must be at least 1.")


class SequenceRows:
    """Each row is a sequence."""

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
            rule = (rows._fingerprint, self.column.name, TO_TOKEN, DROPPED, *self._database_key())
            key = sha256(repr(rule).encode()).hexdigest()[:32]
        self.index = size_index(distributed, self.section, key, len(self), self.measure)

    def _database_key(self) -> tuple:
        return ()

    def measure(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        """Residues of each row, as `tokenize` leaves them."""
        return num_residues(self.sequences(rows, epoch=0)), None

    @property
    def max_size(self) -> int:
        return self.max_seq_length

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of each row with <cls> and <eos>, at most `max_seq_length`; 0 where no residue is left."""
        return num_tokens(self.index.sizes[rows], self.max_seq_length)

    @cached_property
    def identity(self) -> dict:
        """What tells this data from other data, wherever it lies: sizes of all rows, and what some of them hold."""
        some = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        content = sha256(b"\n".join(self.sequences(some, epoch=0))).hexdigest()[:16]
        return {"num_rows": len(self), "sizes": self.index.digest, "content": content}

    # ---- rows

    def read(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """The rows' tokens, those too long cropped anew in each epoch."""
        residues = [tokenize(sequence) for sequence in self.sequences(rows, epoch)]
        return crop(residues, rows, self.max_seq_length, self.seed, epoch)

    def describe(self, rows: np.ndarray, epoch: int) -> list[str]:
        """A line a row: the beginning of its sequence, and the other text columns, which say what it is."""
        table = self.column.rows.with_format(None)[rows]
        others = [k for k, values in table.items() if k != self.column.name and isinstance(values[0], str)]
        lines = []
        for i, sequence in enumerate(self.sequences(rows, epoch)):
            text = sequence.decode(errors="replace")
            text = text if len(text) <= 60 else f"{text[:57]}..."
            lines.append(text + "".join(f"  {k}={table[k][i]}" for k in others))
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
            reason = f"not an SQLite file with a table protein(id, sequence): {error}"
            raise ValueError(f"{section}.protein_database={database}: {reason}.") from error

    def _check_type(self, setting: str, kind: pa.DataType) -> None:
        if not is_text(getattr(kind, "value_type", kind)):
            raise ValueError(f"{setting}: the column holds {kind}, not ids.")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"connection": None}  # each worker opens its own

    def _query(self, query: str, values: list[str]) -> list[tuple[str, str]]:
        if self.connection is None:
            self.connection = sqlite3.connect(
                f"{Path(self.database).absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False
            )
        return self.connection.execute(query, values).fetchall()

    def _members(self, rows: np.ndarray) -> list[list[str]]:
        return [[m] if isinstance(m, str) else m or [] for m in self.column[rows].to_pylist()]

    def _proteins(self, ids: list[str | None]) -> list[bytes]:
        """The raw sequence of each id. Raises ValueError for one that the database lacks."""
        sequences: dict[str | None, str] = {None: ""}
        asked = iter(set(ids) - {None})
        while some := list(islice(asked, 500)):  # older SQLite takes 999 placeholders at most
            marks = ",".join("?" * len(some))
            sequences.update(self._query(f"SELECT id, sequence FROM protein WHERE id IN ({marks})", some))
        if missing := set(ids) - set(sequences):
            raise ValueError(f"{self.section}.protein_database={self.database}: no protein has the id {min(missing)}.")
        return [(sequences[i] or "").encode() for i in ids]

    def sequences(self, rows: np.ndarray, epoch: int) -> list[bytes]:
        """The raw sequence of this epoch's member of each of these clusters."""
        members = self._members(rows)
        picks = self._picks(np.array([len(m) for m in members]), rows, epoch)
        return self._proteins([m[pick] if m else None for m, pick in zip(members, picks, strict=True)])

    def _picks(self, num_members: np.ndarray, rows: np.ndarray, epoch: int) -> np.ndarray:
        return uniform_below(num_members, rows, self.seed, epoch, MEMBER)

    def _database_key(self) -> tuple:
        file = Path(self.database).stat()
        return str(Path(self.database).absolute()), file.st_size, file.st_mtime_ns

    def measure(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residues of each member of these clusters, and how many members each has."""
        members = self._members(rows)
        proteins = self._proteins([name for some in members for name in some])
        return num_residues(proteins), np.array([len(some) for some in members])

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """As in `SequenceRows`, of this epoch's members; 0 for a cluster without any."""
        starts, num_members = self.index.offsets[rows], self.index.offsets[rows + 1] - self.index.offsets[rows]
        places = starts + self._picks(num_members, rows, epoch)
        found = np.zeros(len(rows), dtype=np.int32)
        found[num_members > 0] = self.index.sizes[places[num_members > 0]]
        return num_tokens(found, self.max_seq_length)


def num_residues(sequences: list[bytes]) -> np.ndarray:
    """How many residues `tokenize` leaves of each."""
    return np.array([len(tokenize(sequence)) for sequence in sequences], dtype=np.int32)


def num_tokens(num_residues: np.ndarray, max_seq_length: int) -> np.ndarray:
    """With <cls> and <eos>, at most `max_seq_length`; 0 where there is no residue."""
    return np.where(num_residues > 0, np.minimum(num_residues + 2, max_seq_length), 0)


def crop(residues: list[bytes], rows: np.ndarray, max_seq_length: int, *key: int) -> list[np.ndarray]:
    """<cls> residues <eos> for each row; of a longer one a random stretch, so that its ends are seen as well."""
    room, cls, eos = max_seq_length - 2, bytes([CLS]), bytes([EOS])
    starts = uniform_below(np.array([max(0, len(r) - room) + 1 for r in residues]), rows, *key, CROP).tolist()
    framed = (cls + r[s : s + room] + eos for r, s in zip(residues, starts, strict=True))
    return [np.frombuffer(tokens, dtype=np.uint8) for tokens in framed]


def open_source(
    section: str,
    rows: datasets.Dataset,
    sequence_column: str,
    cluster_column: str,
    protein_database: str | None,
    max_seq_length: int,
    seed: int,
) -> SequenceRows:
    """The kind of source that the keys ask for, without its index."""
    if protein_database is None:
        return SequenceRows(section, rows, sequence_column, max_seq_length, seed)
    return ClusterRows(section, rows, cluster_column, protein_database, max_seq_length, seed)


def open_proteins(section: str, load_dataset_kwargs: dict) -> datasets.Dataset | datasets.IterableDataset:
    """As `open_rows`; of a FASTA file without each record's raw bytes."""
    if load_dataset_kwargs.get("path") != "fasta":
        return open_rows(section, load_dataset_kwargs)
    fasta_reader.register()
    load_dataset_kwargs = {"columns": ["id", "sequence"], **load_dataset_kwargs}
    return open_rows(section, load_dataset_kwargs, ", each after a line that begins with >")


def streamed(max_seq_length: int, column: str, rows: list[dict], numbers: np.ndarray, *key: int) -> tuple:
    """Tokens of a stream's rows, and how many they are; 0 for a row without a residue."""
    tokens = crop([tokenize(row[column] or b"") for row in rows], numbers, max_seq_length, *key)
    return tokens, np.array([len(t) if len(t) > 2 else 0 for t in tokens])


class TrainLoader(Loader):
    """What training reads: the section `dataset`."""

    def __init__(
        self,
        distributed: Distributed,
        seed: int,
        packed: bool,
        pad_to_multiple_of: int,
        *,
        load_dataset_kwargs: dict,
        sequence_column: str = "sequence",
        cluster_column: str = "ur90_id",
        protein_database: str | None = None,
        micro_batch_size: int | None = None,
        token_micro_batch_size: int | None = None,
        max_seq_length: int = 1024,
        mlm_probability: float = 0.15,
        num_workers: NonNegativeInt = 1,
        window_rows: int = 10_000,
    ):
        section = "dataset"
        check_limits(section, max_seq_length, mlm_probability, window_rows)
        grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
        if num_workers:
            start_worker_server()
        with distributed.main_first():
            rows = open_proteins(section, load_dataset_kwargs)
            streaming = isinstance(rows, datasets.IterableDataset)
            if streaming:
                stream, rows = rows, first_rows(section, load_dataset_kwargs, rows, min(window_rows, 1000))
        if streaming and protein_database is not None:
            raise ValueError(f"{section}.protein_database needs {section}.load_dataset_kwargs.streaming=false.")
        source = open_source(section, rows, sequence_column, cluster_column, protein_database, max_seq_length, seed)
        # One rank looks for odd signs, and tells all if there is nothing to read.
        some = source.sequences(np.arange(min(window_rows, len(source))), epoch=0) if distributed.is_main else []
        cleaning = describe_cleaning(some)
        if some and not any(tokenize(sequence) for sequence in some):
            raise ValueError(f"{section}: the first {len(some):,} sequences are all empty; is the column right?")
        if streaming:
            as_bytes = datasets.Features({sequence_column: datasets.Value("large_binary")})  # text need not decode
            with distributed.main_first():
                stream = stream.select_columns([sequence_column]).cast(as_bytes)
                stream, num_workers = share_of(section, stream, distributed, num_workers)
            prepare = partial(streamed, max_seq_length, sequence_column)
            data = StreamedMicroBatches(stream, prepare, grouping, window_rows, seed, distributed.data_rank)
        else:
            source.build_index(distributed)
            data = EpochPlan(source, grouping, seed, window_rows)
        collate = MaskedLMCollator.on(distributed, packed, seed, mlm_probability, pad_to_multiple_of)
        super().__init__(distributed, section, data, collate, num_workers)
        self.notes += [cleaning] if cleaning else []


def open_plan(config: DictConfig, distributed: Distributed) -> EpochPlan:
    """The plan of a run with this configuration: `rows.py` asks it which rows a step was made of."""
    layout = {"packed": config.use_sequence_packing, "pad_to_multiple_of": 1}
    return TrainLoader(distributed, config.seed, **layout, **config.dataset).plan


def open_validation(
    distributed: Distributed,
    packed: bool,
    pad_to_multiple_of: int,
    *,
    load_dataset_kwargs: dict | None = None,
    every_n_steps: int | None = None,
    max_rows: int | None = None,
    sequence_column: str = "sequence",
    cluster_column: str = "ur50_id",
    protein_database: str | None = None,
    micro_batch_size: int | None = None,
    token_micro_batch_size: int | None = None,
    max_seq_length: int = 1024,
    mlm_probability: float = 0.15,
    window_rows: int = 10_000,
) -> Validator:
    """What is validated on: the section `validation`; the rows of `load_dataset_kwargs` (null: none), in order."""
    section = "validation"
    if load_dataset_kwargs is None:
        return Validator(distributed, None, None, metrics, every_n_steps)
    for key, value in (("every_n_steps", every_n_steps), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{section}.{key}={value} must be at least 1.")
    check_limits(section, max_seq_length, mlm_probability, window_rows)
    grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
    with distributed.main_first():
        rows = open_proteins(section, load_dataset_kwargs)
        if isinstance(rows, datasets.IterableDataset):
            if max_rows is None:
                raise ValueError(f"{section}.load_dataset_kwargs.streaming=true needs {section}.max_rows.")
            rows = first_rows(section, load_dataset_kwargs, rows, max_rows)
    if max_rows is not None and max_rows < len(rows):
        rows = rows.take(max_rows).flatten_indices()
    source = open_source(
        section, rows, sequence_column, cluster_column, protein_database, max_seq_length, VALIDATION_SEED
    )
    source.build_index(distributed)
    if not source.sizes(np.arange(min(window_rows, len(source))), epoch=0).any():
        raise ValueError(f"{section}: the sequences are all empty; is {section}.sequence_column right?")
    collate = MaskedLMCollator.on(distributed, packed, VALIDATION_SEED, mlm_probability, pad_to_multiple_of)
    return Validator(distributed, EpochPlan(source, grouping, None, window_rows), collate, metrics, every_n_steps)
