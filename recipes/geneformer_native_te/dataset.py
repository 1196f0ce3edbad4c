# SPDX-License-Identifier: Apache-2.0
"""Cells to batches: what training and validation read."""

import os
from functools import partial

import datasets
import numpy as np
from omegaconf import DictConfig, ListConfig
from pydantic import NonNegativeInt

from cell_rows import LABELS, Cut, TokenRows
from cells.dictionaries import read_tokens
from cells.token_cache import PATHS, Counts, kind_of, open_cells, options_of
from collator import Masking, Rule
from common.distributed import Distributed
from common.epoch_plan import EpochPlan
from common.loader import Loader, StreamedMicroBatches, start_worker_server
from common.open_data import first_rows, open_rows, share_of, whence
from common.validation import Validator
from labels import LabelledCells, build_collator, check_column_is_named
from metrics import metrics_for
from tokens.layout import check_limits, token_grouping
from vocabulary import PUBLISHED, Vocabulary, open_vocabulary


VALIDATION_SEED = 0  # not the run's: the same genes are masked in every validation of every run
# What evaluate.py takes where no run says it.
WITHOUT_A_RUN = (
    "validation.load_dataset_kwargs={path: ???, name: null, data_files: null, split: train}",
    "dataset.token_micro_batch_size=8192",
    "dataset.max_seq_length=2048",
)
EXAMPLE = "validation.load_dataset_kwargs.path=parquet validation.load_dataset_kwargs.data_files=my_cells.parquet"


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
        vocabulary: str | None,
        task: str | None,
        classes: list[str] | None,
        label_column: str | None = None,
        gene_classes: str | None = None,
        input_ids_column: str = "input_ids",
        counts: Counts | None = None,
        micro_batch_size: int | None = None,
        token_micro_batch_size: int | None = None,
        max_seq_length: int = 2048,
        mlm_probability: float = 0.15,
        masking: Masking = "genes",
        mask_share: float = 0.8,
        random_share: float = 0.1,
        num_workers: NonNegativeInt = 1,
        window_rows: int = 10_000,
    ):
        section, tokens = "dataset", open_vocabulary(vocabulary)
        check_limits(section, "3 tokens", max_seq_length, mlm_probability, window_rows)
        rule = Rule(tokens, masking, mask_share, random_share).check(section)
        grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
        if num_workers:
            start_worker_server()
        by_cell = task == "cells"
        if by_cell:
            check_column_is_named(section, label_column)
        with distributed.main_first():
            rows, notes = open_tokens(section, load_dataset_kwargs, vocabulary, input_ids_column, max_seq_length,
                                      counts, label_column if task == "cells" else None, distributed)  # fmt: skip
            stream = rows if isinstance(rows, datasets.IterableDataset) else None
            if stream is not None:
                rows = first_rows(section, load_dataset_kwargs, stream, min(window_rows, 1000))
        source = TokenRows(section, rows, input_ids_column, tokens, max_seq_length)
        if stream is not None and by_cell:
            raise ValueError(
                f"{section}.load_dataset_kwargs.streaming=true cannot be combined with model_kwargs.task=cells."
            )
        if stream is not None:
            with distributed.main_first():
                stream = stream.select_columns([input_ids_column])
                stream, num_workers = share_of(section, stream, distributed, num_workers)
            prepare = partial(streamed, Cut(tokens, max_seq_length), input_ids_column)
            source.build_index(distributed)  # of its first rows, which are checked so
            content = source.identity["content"]
            data = StreamedMicroBatches(stream, prepare, grouping, window_rows, seed, distributed.data_rank, content)
        else:
            source.build_index(distributed)
            cells = LabelledCells(source, rows, label_column, classes) if by_cell else None
            data = EpochPlan(cells or source, grouping, seed, window_rows)
        options = (packed, seed, mlm_probability, pad_to_multiple_of)
        collate = build_collator(section, task, classes, gene_classes, rule, distributed, *options)
        super().__init__(distributed, section, data, collate, num_workers)
        amount = "a stream" if stream is not None else source.amount
        self.sources = [f"{section}: {amount} of {whence(load_dataset_kwargs)}", *notes]
        if distributed.is_main:
            self.sources.append(f"{section}: {cells.baseline() if by_cell else baseline(source, tokens, window_rows)}")


def open_tokens(section: str, load_dataset_kwargs: dict, vocabulary: str, input_ids_column: str, max_seq_length: int,
                counts: Counts | None, label_column: str | None, distributed: Distributed,
                ) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str]]:  # fmt: skip
    """Rows with tokens, and classes by `label_column`, and what is to be said of them; of h5ad and SCDL the tokens are
    made here, once.

    Raises ValueError for a user's mistake.
    """
    labels = [label_column] if label_column else []
    check_kind(section, load_dataset_kwargs)
    if load_dataset_kwargs.get("path") not in PATHS:
        columns = {"input_ids_column": input_ids_column}
        return open_rows(section, load_dataset_kwargs, columns, tuple(dict.fromkeys([*LABELS, *labels]))), []
    tokens = None if vocabulary in PUBLISHED else read_tokens("model_kwargs.vocabulary", vocabulary)
    counts = dict(counts or {})
    counts["obs_columns"] = counts.get("obs_columns") or []
    asked_by = dict.fromkeys(labels, f"{section}.label_column")
    options = options_of(f"{section}.counts", tokens, max_seq_length, asked_by=asked_by, **counts)
    processes = max(1, (os.cpu_count() or 1) // distributed.num_local_ranks)
    return open_cells(section, load_dataset_kwargs, options, processes, not distributed.is_main)


def check_kind(section: str, load_dataset_kwargs: dict) -> None:
    """Raise ValueError where `path` says another kind of files than there are."""
    path, files = load_dataset_kwargs.get("path"), load_dataset_kwargs.get("data_files") or []
    for name in [files] if isinstance(files, str) else files if isinstance(files, list | ListConfig) else []:
        kind = kind_of(name)
        if kind not in (None, path):
            raise ValueError(
                f"{section}.load_dataset_kwargs.path={path}: {name} has cells as {kind}; give path={kind}."
            )


def streamed(cut: Cut, column: str, rows: list[dict], numbers: np.ndarray, *key: int) -> tuple[list, np.ndarray]:
    """Tokens of a stream's rows, and how many they are."""
    tokens = [cut(np.asarray(row[column] or (), dtype=np.int64)) for row in rows]
    return tokens, np.array([len(some) for some in tokens])


def baseline(source: TokenRows, vocabulary: Vocabulary, window_rows: int) -> str:
    """What a model reaches that knows how often each gene is expressed, and nothing else.

    Raises ValueError if there is nothing to read.
    """
    some = source.read(np.arange(min(window_rows, len(source), 2000)), epoch=0)
    counts = np.bincount(np.concatenate(some), minlength=vocabulary.size)
    counts[list(vocabulary.special)] = 0
    if not counts.any():
        raise ValueError(
            f"{source.section}: the first {len(some):,} cells have no gene in them; is "
            f"{source.section}.input_ids_column right?"
        )
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    return f"the entropy of its genes is {entropy:.3f} nats: a loss that stays there has learnt nothing of context"


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
    vocabulary: str | None,
    task: str | None,
    classes: list[str] | None,
    label_column: str | None = None,
    gene_classes: str | None = None,
    every_n_steps: int | None = None,
    max_rows: int | None = None,
    input_ids_column: str = "input_ids",
    counts: Counts | None = None,
    micro_batch_size: int | None = None,
    token_micro_batch_size: int | None = None,
    max_seq_length: int = 2048,
    mlm_probability: float = 0.15,
    masking: Masking = "genes",
    mask_share: float = 0.8,
    random_share: float = 0.1,
    window_rows: int = 10_000,
) -> Validator:
    """What is validated on: the section `validation`; the rows of `load_dataset_kwargs` (null: none), in order."""
    section = "validation"
    if load_dataset_kwargs is None:
        return Validator(distributed, None, None, None, every_n_steps)
    tokens = open_vocabulary(vocabulary)
    check_limits(section, "3 tokens", max_seq_length, mlm_probability, window_rows)
    rule = Rule(tokens, masking, mask_share, random_share).check(section)
    grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
    if task == "cells":
        check_column_is_named(section, label_column)
    for key, value in (("every_n_steps", every_n_steps), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{section}.{key}={value} must be at least 1.")
    with distributed.main_first():
        rows, notes = open_tokens(section, load_dataset_kwargs, vocabulary, input_ids_column, max_seq_length,
                                  counts, label_column if task == "cells" else None, distributed)  # fmt: skip
        if isinstance(rows, datasets.IterableDataset):
            if max_rows is None:
                raise ValueError(f"{section}.load_dataset_kwargs.streaming=true needs {section}.max_rows.")
            rows = first_rows(section, load_dataset_kwargs, rows, max_rows)
    if max_rows is not None and max_rows < len(rows):
        rows = rows.take(max_rows).flatten_indices()
    source = TokenRows(section, rows, input_ids_column, tokens, max_seq_length)
    source.build_index(distributed)
    if not source.sizes(np.arange(min(window_rows, len(source))), epoch=0).any():
        raise ValueError(f"{section}: the cells are all empty; is {section}.input_ids_column right?")
    if task == "cells":
        source = LabelledCells(source, rows, label_column, classes)
    options = (packed, VALIDATION_SEED, mlm_probability, pad_to_multiple_of)
    collate = build_collator(section, task, classes, gene_classes, rule, distributed, *options)
    plan, measured = EpochPlan(source, grouping, None, window_rows), metrics_for(task, classes)
    validator = Validator(distributed, plan, collate, measured, every_n_steps)
    validator.facts += [f"{section}: {source.amount} of {whence(load_dataset_kwargs)}", *notes]
    return validator
