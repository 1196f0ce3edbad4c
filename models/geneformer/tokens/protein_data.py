# SPDX-License-Identifier: Apache-2.0
"""What recipes on proteins do alike with the data that a configuration names: limits, a first look, streams."""

from collections.abc import Callable
from functools import partial

import datasets
import numpy as np

from common.distributed import Distributed
from common.epoch_plan import EpochPlan, Grouping
from common.loader import StreamedMicroBatches
from common.open_data import first_rows, share_of, whence
from common.validation import Validator
from tokens import layout
from tokens.protein_rows import Alphabet, SequenceRows, open_proteins


def check_limits(section: str, alphabet: Alphabet, *limits) -> None:
    """As `tokens.layout.check_limits`."""
    start, end = alphabet.around
    layout.check_limits(section, f"3: {start}, a residue, {end}", *limits)


def first_look(name: str, source: SequenceRows, window_rows: int, distributed: Distributed) -> tuple[str | None, str]:
    """What is odd in the first rows, and what a model reaches that knows no more than how often each residue comes.

    One rank looks, and tells all by a ValueError if there is nothing to read.
    """
    some = source.sequences(np.arange(min(window_rows, len(source))), epoch=0) if distributed.is_main else []
    if some and not any(source.alphabet.tokenize(sequence) for sequence in some):
        raise ValueError(f"{name}: the first {len(some):,} sequences are all empty; is the column right?")
    return source.odd(some), source.alphabet.baseline(some)


def micro_batches_of(
    section: str, stream: datasets.IterableDataset, source: SequenceRows, grouping: Grouping, window_rows: int,
    seed: int, distributed: Distributed, num_workers: int,
) -> tuple[StreamedMicroBatches, int]:  # fmt: skip
    """This rank's part of a stream, of whose first rows `source` is made, and how many workers can share in it."""
    column = source.column.name
    as_bytes = datasets.Features({column: datasets.Value("large_binary")})  # text need not decode
    with distributed.main_first():
        stream = stream.select_columns([column]).cast(as_bytes)
        stream, num_workers = share_of(section, stream, distributed, num_workers)
    prepare = partial(source.alphabet.streamed, source.max_seq_length, column)
    content = source.fingerprint(np.arange(min(64, len(source))))
    data = StreamedMicroBatches(stream, prepare, grouping, window_rows, seed, distributed.data_rank, content)
    return data, num_workers


def rows_to_validate(
    section: str, load_dataset_kwargs: dict, column: tuple[str, str], every_n_steps: int | None, max_rows: int | None,
    distributed: Distributed,
) -> datasets.Dataset:  # fmt: skip
    """The first `max_rows` rows (null: all); `column` is its name, and the key that names it.

    Raises ValueError for numbers below 1, and for a stream of which all would be read.
    """
    for key, value in (("every_n_steps", every_n_steps), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{section}.{key}={value} must be at least 1.")
    with distributed.main_first():
        rows = open_proteins(section, load_dataset_kwargs, *column)
        if isinstance(rows, datasets.IterableDataset):
            if max_rows is None:
                raise ValueError(f"{section}.load_dataset_kwargs.streaming=true needs {section}.max_rows.")
            rows = first_rows(section, load_dataset_kwargs, rows, max_rows)
    if max_rows is not None and max_rows < len(rows):
        rows = rows.take(max_rows).flatten_indices()
    return rows


def validator_of(
    source: SequenceRows, load_dataset_kwargs: dict, grouping: Grouping, window_rows: int, distributed: Distributed,
    collate: Callable, metrics, every_n_steps: int | None,
) -> Validator:  # fmt: skip
    """Validates all of a source, in order. Raises ValueError if there is nothing to read in its first rows."""
    source.build_index(distributed)
    if not source.sizes(np.arange(min(window_rows, len(source))), epoch=0).any():
        raise ValueError(f"{source.section}: the sequences are all empty; is {source.section}.sequence_column right?")
    validator = Validator(distributed, EpochPlan(source, grouping, None, window_rows), collate, metrics, every_n_steps)
    validator.facts.append(f"{source.section}: {source.amount} from {whence(load_dataset_kwargs)}")
    return validator
