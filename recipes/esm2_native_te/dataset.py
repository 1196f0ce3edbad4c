# SPDX-License-Identifier: Apache-2.0
"""Protein rows to batches: sources, cleaning, and the loaders for training and validation."""

import atexit
import os
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from itertools import islice
from multiprocessing import active_children, forkserver, parent_process, set_forkserver_preload
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from datasets.table import InMemoryTable
from pydantic import NonNegativeInt
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import fasta_reader
from collator import Batch, MaskedLMCollator
from distributed import Distributed, ignore_signals, signals_ignored
from epoch_plan import EpochPlan, Grouping, MicroBatch, RankSampler, permuted, uniform_below


VOCABULARY = (Path(__file__).parent / "tokenizer" / "vocab.txt").read_text().split()
CLS, EOS, UNKNOWN_RESIDUE = (VOCABULARY.index(token) for token in ("<cls>", "<eos>", "X"))
RESIDUES = "".join(token for token in VOCABULARY if len(token) == 1 and token.isalpha())
TO_TOKEN = bytearray([UNKNOWN_RESIDUE]) * 256
for letter in RESIDUES:
    TO_TOKEN[ord(letter)] = TO_TOKEN[ord(letter.lower())] = VOCABULARY.index(letter)
DROPPED = b"-. \t\r\n" + bytes(range(0x80, 0xC0))  # of a letter beyond ASCII all but its first byte: it is one sign
MEMBER, CROP = 1, 2  # what a random number is for, as the last part of its key
fasta_reader.register()
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = (
    False  # else the hub is told of each local file: seconds, where none answers
)


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


def open_rows(section: str, load_dataset_kwargs: dict) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset`; a user's mistake is a ValueError of one sentence that names `section`."""
    name, path = f"{section}.load_dataset_kwargs", load_dataset_kwargs.get("path")
    files = load_dataset_kwargs.get("data_files")
    if path in ("parquet", "arrow", "csv", "json", "text", "fasta") and "data_dir" not in load_dataset_kwargs:
        if not files:  # datasets would read whatever lies in the working folder
            raise ValueError(f"{name}.data_files is not set; path={path} needs a file, a pattern or a list of them.")
        for pattern in _patterns(files):
            found = [] if "://" in pattern else [Path(match) for match in glob(pattern, recursive=True)]
            if not found and "://" not in pattern:
                raise ValueError(
                    f"{name}.data_files={pattern}: no such file; give a full path or one from {Path.cwd()}."
                )
            if empty := [str(file) for file in found if file.stat().st_size == 0]:
                raise ValueError(f"{name}.data_files={empty[0]}: the file is empty; give one with sequences in it.")
    if path == "fasta":  # by default it keeps each record's raw bytes in a further column
        load_dataset_kwargs = {"columns": ["id", "sequence"], **load_dataset_kwargs}
    if path == "parquet":  # by default a row group at once, and an error where a file among others has no rows
        load_dataset_kwargs = {"batch_size": 10_000, **load_dataset_kwargs}
    with one_sentence(section, load_dataset_kwargs):
        rows = datasets.load_dataset(**load_dataset_kwargs)
        if isinstance(rows, dict):
            raise ValueError(f"{name}.split is not set; this data set has the splits {', '.join(rows)}.")
        # A stream opens its files only when it is asked for a row; as Arrow, because text need not decode.
        if next(iter(rows.with_format("arrow")), None) is None:
            raise NoRows
    return rows


def first_rows(
    section: str, load_dataset_kwargs: dict, stream: datasets.IterableDataset, num_rows: int
) -> datasets.Dataset:
    """The first rows of a stream, held in memory."""
    with one_sentence(section, load_dataset_kwargs):
        rows = list(islice(stream.with_format("arrow"), num_rows))
        return datasets.Dataset(InMemoryTable(pa.concat_tables(rows, promote_options="permissive")))


class NoRows(Exception):
    """The data has none."""


@contextmanager
def one_sentence(section: str, load_dataset_kwargs: dict) -> Iterator[None]:
    """Whatever `datasets` raises in the block becomes a ValueError of one sentence that names `section`."""
    name, path = f"{section}.load_dataset_kwargs", load_dataset_kwargs.get("path")
    files = load_dataset_kwargs.get("data_files")
    try:
        yield
    except Exception as error:  # whatever its readers raise: Arrow's, JSON's, the system's, the hub's and its own
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if reason.startswith(name):
            raise
        if isinstance(error, NoRows) or "corresponds to no data" in reason:
            way_out = "give one with sequences"
            if section == "validation":
                way_out = f"give more sequences, or set {name}=null"
            elif path == "fasta":
                way_out += ", each after a line that begins with >"
            told = f"{name}: split={load_dataset_kwargs.get('split')} of {files or path} has no rows; {way_out}."
        elif isinstance(cause, UnicodeDecodeError):
            told = f"{name}.data_files={files}: no UTF-8 text ({reason}); convert it"
            told += f", or name its encoding: +{name}.encoding=latin-1." if path in ("csv", "json", "text") else "."
        else:
            told = f"{name}: datasets cannot load {load_dataset_kwargs}: {reason}"
        raise ValueError(told) from error


def check_limits(section: str, max_seq_length: int, mlm_probability: float, window_rows: int) -> None:
    """Raise ValueError for a number that leaves nothing to learn from."""
    if max_seq_length < 3:
        raise ValueError(f"{section}.max_seq_length={max_seq_length} must be at least 3: <cls>, a residue, <eos>.")
    if not 0 < mlm_probability < 1:
        raise ValueError(f"{section}.mlm_probability={mlm_probability} must lie between 0 and 1.")
    if window_rows < 1:
        raise ValueError(f"{section}.window_rows={window_rows} must be at least 1.")


def _patterns(files: str | Iterable[str] | Mapping) -> list[str]:
    """`data_files` is a pattern, a list of them, or either by split."""
    if isinstance(files, str):
        return [files]
    if isinstance(files, Mapping):
        return [pattern for some in files.values() for pattern in _patterns(some)]
    return list(files)


def check_column(section: str, key: str, column: str, names: list[str]) -> None:
    """Raise ValueError unless the data has the column."""
    if column not in names:
        raise ValueError(f"{section}.{key}={column}: the data has no such column; it has {', '.join(names)}.")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes: what Parquet files that do not say "text" are read as."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


class Column:
    """Random access to one column of a memory-mapped data set: only the rows asked for are read."""

    def __init__(self, rows: datasets.Dataset, name: str):
        self.rows, self.name = rows.with_format("arrow", columns=[name]), name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> pa.ChunkedArray:
        # Not by pyarrow's chunks: 65 million rows have 65,000 of them, and to list those takes longer than to read.
        return self.rows[indices].combine_chunks()[self.name]  # it gives each row as a chunk, slow to go through


class SequenceRows:
    """Each row is a sequence."""

    def __init__(self, section: str, rows: datasets.Dataset, sequence_column: str, max_seq_length: int, seed: int):
        check_column(section, "sequence_column", sequence_column, rows.column_names)
        self.section, self.max_seq_length, self.seed = section, max_seq_length, seed
        self.column, self.held = Column(rows, sequence_column), {}
        kind = rows.data.column(sequence_column).type
        if not is_text(kind) and not is_bytes(kind):
            raise ValueError(f"{section}.sequence_column={sequence_column}: the column holds {kind}, not text.")

    def __len__(self) -> int:
        return len(self.column)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"held": {}}

    def read(self, rows: np.ndarray, epoch: int) -> list[bytes]:
        """The raw sequences of these rows."""
        return [text or b"" for text in self.column[rows].cast(pa.large_binary()).to_pylist()]

    def lengths(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of each row with <cls> and <eos>, at most `max_seq_length`; 0 where no residue is left.

        The residues are held until the next call: the micro-batches of a window are made of what was measured.
        """
        residues = [tokenize(sequence) for sequence in self.read(rows, epoch)]
        self.held = dict(zip(((epoch, row) for row in rows.tolist()), residues, strict=True))
        num_residues = np.array([len(r) for r in residues])
        return np.where(num_residues > 0, np.minimum(num_residues + 2, self.max_seq_length), 0)

    def sample(self, micro_batch: MicroBatch) -> dict:
        """What the collator takes: the rows' tokens, those too long cropped anew in each epoch."""
        epoch, rows = micro_batch.epoch, micro_batch.rows
        try:
            residues = [self.held[epoch, row] for row in rows.tolist()]
        except KeyError:
            residues = [tokenize(sequence) for sequence in self.read(rows, epoch)]
        return {"name": micro_batch[:3], "tokens": crop(residues, rows, self.max_seq_length, self.seed, epoch)}


class ClusterRows(SequenceRows):
    """Each row is a cluster (UniRef50); its members' (UniRef90) sequences are in SQLite `protein(id, sequence)`.

    An epoch shows each cluster once, by a member drawn from (seed, epoch, cluster): Lin et al. 2023, A.1.1.
    """

    def __init__(
        self, section: str, rows: datasets.Dataset, cluster_column: str, database: str, max_seq_length: int, seed: int
    ):
        check_column(section, "cluster_column", cluster_column, rows.column_names)
        self.section, self.max_seq_length, self.seed, self.database = section, max_seq_length, seed, database
        self.column, self.held = Column(rows, cluster_column), {}
        self.connection: sqlite3.Connection | None = None
        if not Path(database).is_file():
            raise ValueError(f"{section}.protein_database={database}: no such file.")
        kind = rows.data.column(cluster_column).type
        if not is_text(getattr(kind, "value_type", kind)):
            raise ValueError(f"{section}.cluster_column={cluster_column}: the column holds {kind}, not ids.")
        try:
            self._query("SELECT id, sequence FROM protein LIMIT 1", [])
        except sqlite3.Error as error:
            reason = f"not an SQLite file with a table protein(id, sequence): {error}"
            raise ValueError(f"{section}.protein_database={database}: {reason}.") from error

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"connection": None}  # each worker opens its own

    def _query(self, query: str, values: list[str]) -> list[tuple[str, str]]:
        if self.connection is None:
            self.connection = sqlite3.connect(
                f"{Path(self.database).absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False
            )
        return self.connection.execute(query, values).fetchall()

    def read(self, rows: np.ndarray, epoch: int) -> list[bytes]:
        """The raw sequence of this epoch's member of each of these clusters."""
        members = [[m] if isinstance(m, str) else m or [] for m in self.column[rows].to_pylist()]
        picks = uniform_below(np.array([len(m) for m in members]), rows, self.seed, epoch, MEMBER)
        ids = [m[pick] if m else None for m, pick in zip(members, picks, strict=True)]
        sequences: dict[str | None, str] = {None: ""}
        wanted = iter(set(ids) - {None})
        while some := list(islice(wanted, 500)):  # older SQLite takes 999 placeholders at most
            marks = ",".join("?" * len(some))
            sequences.update(self._query(f"SELECT id, sequence FROM protein WHERE id IN ({marks})", some))
        if missing := set(ids) - set(sequences):
            raise ValueError(f"{self.section}.protein_database={self.database}: no protein has the id {min(missing)}.")
        return [(sequences[i] or "").encode() for i in ids]


def crop(residues: list[bytes], rows: np.ndarray, max_seq_length: int, *key: int) -> list[np.ndarray]:
    """<cls> residues <eos> for each row; of a longer one a random stretch, so that its ends are seen as well."""
    room, cls, eos = max_seq_length - 2, bytes([CLS]), bytes([EOS])
    starts = uniform_below(np.array([max(0, len(r) - room) + 1 for r in residues]), rows, *key, CROP).tolist()
    framed = (cls + r[s : s + room] + eos for r, s in zip(residues, starts, strict=True))
    return [np.frombuffer(tokens, dtype=np.uint8) for tokens in framed]


class PlannedMicroBatches(IterableDataset):
    """A rank's share of the plan; its workers take the micro-batches in turn.

    They plan for themselves, each every window, so that the trainer never waits for a plan and a window's rows are
    read once.
    """

    def __init__(self, sampler: RankSampler):
        self.sampler = sampler

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        return map(self.sampler.plan.source.sample, islice(self.sampler, worker, None, num_workers))


class StreamedMicroBatches(IterableDataset):
    """Windows of a stream: each rank and worker packs its own share, shuffled inside the window.

    The state is where the stream stood before the window and the place in it, so that a resume repeats no row.
    """

    def __init__(self, stream: datasets.IterableDataset, column: str, grouping: Grouping, max_seq_length: int,
                 window_rows: int, seed: int, rank: int):  # fmt: skip
        self.stream, self.column, self.grouping, self.max_seq_length = stream, column, grouping, max_seq_length
        self.window_rows, self.seed, self.rank = window_rows, seed, rank
        self.state = {"epoch": 0, "window": 0, "index": 0, "stream": None}

    def state_dict(self) -> dict:
        return dict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker = info.id if info else 0
        while True:
            epoch = self.state["epoch"]
            # No set_epoch: workers share its number, and one that is an epoch ahead makes others lose their place.
            self.stream.load_state_dict(self.state["stream"])  # None: from the start
            rows, found = iter(self.stream), self.state["window"] > 0
            while sequences := [row[self.column] or b"" for row in islice(rows, self.window_rows)]:
                name = (epoch, self.rank, worker, self.state["window"])
                order = permuted(np.arange(len(sequences)), len(sequences), self.seed, *name)
                residues = [tokenize(sequences[i]) for i in order]
                tokens = crop(residues, order, self.max_seq_length, self.seed, *name)
                lengths = np.array([len(t) if len(t) > 2 else 0 for t in tokens])
                groups = self.grouping(lengths, (self.seed, *name))
                found = found or bool(groups)
                for index in range(self.state["index"], len(groups)):
                    self.state["index"] = index + 1
                    yield {"name": (*name, index), "tokens": [tokens[i] for i in groups[index]]}
                self.state |= {"window": self.state["window"] + 1, "index": 0, "stream": self.stream.state_dict()}
            if not found:
                raise ValueError(f"The stream has no sequences for rank {self.rank}, worker {worker}: use fewer.")
            self.state = {"epoch": epoch + 1, "window": 0, "index": 0, "stream": None}


def share_of(
    section: str, stream: datasets.IterableDataset, column: str, distributed: Distributed, num_workers: int
) -> tuple[datasets.IterableDataset, int]:
    """The sequences that this rank reads, as bytes (text need not decode), and how many workers can share them.

    Raises ValueError if there are none for one of them: it would look for a row for ever.
    """
    rank, num_ranks = distributed.data_rank, distributed.num_data_ranks
    stream = stream.select_columns([column]).cast(datasets.Features({column: datasets.Value("large_binary")}))
    share = split_dataset_by_node(stream, rank, num_ranks)
    num_workers = min(num_workers, share.num_shards)
    for worker in range(max(1, num_workers)):
        part = share
        if num_workers > 1 and stream.num_shards % num_ranks == 0:  # each rank has files of its own
            part = stream.shard(num_ranks * num_workers, rank + num_ranks * worker, contiguous=False)
        elif num_workers > 1:  # all ranks read all files, and each takes rows of its own
            part = split_dataset_by_node(
                stream.shard(num_workers, worker, contiguous=False), rank, num_ranks, "examples"
            )
        if next(iter(part), None) is None:
            raise ValueError(
                f"{section}.load_dataset_kwargs.streaming=true: the stream has no row for worker {worker} of rank "
                f"{rank}; use fewer ranks or a smaller {section}.num_workers than {num_workers}, or streaming=false."
            )
    return share, num_workers


def start_worker_server() -> None:
    """Start the process that workers are forked from; it imports what they need while this one opens the data."""
    set_forkserver_preload(["datasets", "torch.distributed.tensor", "torchdata.stateful_dataloader"])
    os.environ["PYTHONSAFEPATH"] = "1"  # not a `datasets` that lies in the working folder
    # torchrun and Slurm signal whole process groups; that the rank is to save and leave is no news for its workers.
    # They inherit what is ignored when the server starts.
    with signals_ignored():
        forkserver.ensure_running()
    del os.environ["PYTHONSAFEPATH"]  # the scripts that this process starts do import from their folder


@contextmanager
def script_unseen() -> Iterator[None]:
    """Workers started in the block do not import the running script: it takes seconds, and they need nothing of it."""
    script = vars(sys.modules["__main__"])
    file = script.pop("__file__", None)
    try:
        yield
    finally:
        script |= {"__file__": file} if file else {}


def start_worker(worker: int) -> None:
    """A worker goes on at a signal, which is for its rank to obey, and ends with its rank however that ends."""
    ignore_signals()
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@atexit.register
def end_workers() -> None:
    """Before `multiprocessing` asks them to, with a signal that they ignore, and waits for them: after an error."""
    for process in active_children():
        if process.daemon:
            process.kill()


class TrainLoader:
    """This rank's micro-batches without end, with a state to resume from.

    Map-style, the state is one place in the plan, good for any number of ranks and workers. Streaming, it is every
    rank's own, good for the same number of both.
    """

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
        self.distributed, self.num_workers = distributed, num_workers
        check_limits(section, max_seq_length, mlm_probability, window_rows)
        grouping = Grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
        if num_workers:
            start_worker_server()
        with distributed.main_first():
            rows = open_rows(section, load_dataset_kwargs)
            self.streaming = isinstance(rows, datasets.IterableDataset)
            if self.streaming:
                stream, rows = rows, first_rows(section, load_dataset_kwargs, rows, min(window_rows, 1000))
        if self.streaming and protein_database is not None:
            raise ValueError(f"{section}.protein_database needs {section}.load_dataset_kwargs.streaming=false.")
        source = open_source(section, rows, sequence_column, cluster_column, protein_database, max_seq_length, seed)
        some = source.read(np.arange(min(window_rows, len(source))), epoch=0)
        self.note = describe_cleaning(some)
        if not any(tokenize(sequence) for sequence in some):
            raise ValueError(f"{section}: the first {len(some):,} sequences are all empty; is the column right?")
        if self.streaming:
            with distributed.main_first():
                stream, self.num_workers = share_of(section, stream, sequence_column, distributed, num_workers)
            data = StreamedMicroBatches(
                stream, sequence_column, grouping, max_seq_length, window_rows, seed, distributed.data_rank
            )
        else:
            self.plan = EpochPlan(source, grouping, seed, window_rows)
            self.sampler = RankSampler(self.plan, distributed.data_rank, distributed.num_data_ranks)
            data = PlannedMicroBatches(self.sampler)
        self.loader = StatefulDataLoader(
            data,
            batch_size=None,
            collate_fn=MaskedLMCollator(packed, seed, mlm_probability, pad_to_multiple_of),
            num_workers=self.num_workers,
            # A fork after the process group or CUDA is up can crash or hang.
            multiprocessing_context="forkserver" if self.num_workers else None,
            worker_init_fn=start_worker if self.num_workers else None,
            pin_memory=distributed.device.type == "cuda",
        )
        self.last_name: tuple | None = None

    def __iter__(self) -> Iterator[Batch]:
        with script_unseen():
            batches = iter(self.loader)
        for batch in batches:
            self.last_name = batch.name
            yield self.distributed.counted_once(batch)

    def state_dict(self) -> dict:
        """What is left to read, the same on every rank; JSON."""
        if not self.streaming:
            position = self.sampler.position_after(self.last_name) if self.last_name else self.sampler.position
            return {"position": list(position), "num_rows": self.plan.num_rows}
        states = [None] * self.distributed.num_ranks
        torch.distributed.all_gather_object(states, self.loader.state_dict())
        return {"layout": self._layout(), "ranks": states[:: self.distributed.cp_size]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state. Raises ValueError for other data, or a stream that was saved on another layout."""
        self.last_name = None
        if self.streaming != ("layout" in state):
            raise ValueError(
                f"dataset.load_dataset_kwargs.streaming={str(self.streaming).lower()}, but the checkpoint was made "
                f"with {str(not self.streaming).lower()}; give that, or start anew in another folder."
            )
        if not self.streaming:
            if state["num_rows"] != self.plan.num_rows:
                raise ValueError(
                    f"dataset.load_dataset_kwargs: the checkpoint was made with {state['num_rows']:,} rows and the "
                    f"data now has {self.plan.num_rows:,}; give the old data, or start anew in another folder."
                )
            self.sampler.position = tuple(state["position"])
        elif state["layout"] != self._layout():
            raise ValueError(
                f"A streamed data set resumes only on the layout it was saved on, {state['layout']}; this run has "
                f"{self._layout()}; use that layout, or start anew in another folder, with "
                "dataset.load_dataset_kwargs.streaming=false if it is to resume on any."
            )
        else:
            self.loader.load_state_dict(state["ranks"][self.distributed.data_rank])

    def _layout(self) -> dict:
        return {"num_ranks": self.distributed.num_data_ranks, "num_workers": self.num_workers}


def open_source(
    section: str,
    rows: datasets.Dataset,
    sequence_column: str,
    cluster_column: str,
    protein_database: str | None,
    max_seq_length: int,
    seed: int,
) -> SequenceRows:
    """The kind of source that the keys ask for."""
    if protein_database is None:
        return SequenceRows(section, rows, sequence_column, max_seq_length, seed)
    return ClusterRows(section, rows, cluster_column, protein_database, max_seq_length, seed)
