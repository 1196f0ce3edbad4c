# SPDX-License-Identifier: Apache-2.0
"""Protein rows to batches: one source or a mixture of several, and what training and validation read."""

from functools import partial

import datasets
import numpy as np
from omegaconf import DictConfig
from pydantic import NonNegativeInt

import metrics
from collator import VOCABULARY, MaskedLMCollator, Masking
from common.distributed import Distributed
from common.epoch_plan import EpochPlan
from common.loader import Loader, StreamedMicroBatches, start_worker_server
from common.mixture import Mixture, sources_of_mix
from common.open_data import first_rows, share_of, whence
from common.validation import Validator
from tokens import protein_rows
from tokens.layout import token_grouping
from tokens.protein_rows import Alphabet, open_proteins


ALPHABET = Alphabet(VOCABULARY, "<bos>", "<eos>", unknown="<unk>", separator="|")
VALIDATION_SEED = 0  # not the run's: the same residues are masked in every validation of every run
# What evaluate.py takes where no run says it.
WITHOUT_A_RUN = (
    "validation.load_dataset_kwargs={path: ???, name: null, data_files: null, split: train}",
    "dataset.token_micro_batch_size=8192",
    "dataset.max_seq_length=8192",
)
EXAMPLE = "validation.load_dataset_kwargs.path=fasta validation.load_dataset_kwargs.data_files=my.fasta"


class SequenceRows(protein_rows.SequenceRows):
    """Each row is a sequence of AMPLIFY's alphabet; `|` stands between chains."""

    alphabet = ALPHABET


def check_limits(section: str, max_seq_length: int, mlm_probability: float, window_rows: int) -> None:
    """Raise ValueError for a number that leaves nothing to learn from."""
    if max_seq_length < 3:
        raise ValueError(f"{section}.max_seq_length={max_seq_length} must be at least 3: <bos>, a residue, <eos>.")
    if not 0 < mlm_probability < 1:
        raise ValueError(f"{section}.mlm_probability={mlm_probability} must lie between 0 and 1.")
    if window_rows < 1:
        raise ValueError(f"{section}.window_rows={window_rows} must be at least 1.")


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
        mix: dict | None = None,
        sequence_column: str = "sequence",
        micro_batch_size: int | None = None,
        token_micro_batch_size: int | None = None,
        max_seq_length: int = 512,
        mlm_probability: float = 0.15,
        masking: Masking = "amino_acids",
        num_workers: NonNegativeInt = 1,
        window_rows: int = 10_000,
    ):
        section = "dataset"
        check_limits(section, max_seq_length, mlm_probability, window_rows)
        grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
        asked = {section: {"load_dataset_kwargs": load_dataset_kwargs, "sequence_column": sequence_column}}
        if mix is not None:
            parts = sources_of_mix(f"{section}.mix", mix, asked[section])
            asked = {f"{section}.mix.{name}": part for name, part in parts.items()}
        if num_workers:
            start_worker_server()
        sources, baselines, stream, notes = [], [], None, []
        for name, part in asked.items():
            with distributed.main_first():
                rows = open_proteins(name, part["load_dataset_kwargs"], part["sequence_column"])
                if isinstance(rows, datasets.IterableDataset):
                    stream, rows = rows, first_rows(name, load_dataset_kwargs, rows, min(window_rows, 1000))
            source = SequenceRows(name, rows, part["sequence_column"], max_seq_length, seed)
            # One rank looks for odd signs, and tells all if there is nothing to read.
            some = source.sequences(np.arange(min(window_rows, len(source))), epoch=0) if distributed.is_main else []
            if some and not any(ALPHABET.tokenize(sequence) for sequence in some):
                raise ValueError(f"{name}: the first {len(some):,} sequences are all empty; is the column right?")
            if cleaning := source.odd(some):
                notes.append(f"{name}: {cleaning}" if mix else cleaning)
            sources.append(source)
            baselines.append(ALPHABET.baseline(some))
        if stream is not None:
            as_bytes = datasets.Features({sequence_column: datasets.Value("large_binary")})  # text need not decode
            with distributed.main_first():
                stream = stream.select_columns([sequence_column]).cast(as_bytes)
                stream, num_workers = share_of(section, stream, distributed, num_workers)
            prepare = partial(ALPHABET.streamed, max_seq_length, sequence_column)
            data = StreamedMicroBatches(
                stream,
                prepare,
                grouping,
                window_rows,
                seed,
                distributed.data_rank,
                source.fingerprint(np.arange(min(64, len(source)))),
            )
        else:
            for source in sources:
                source.build_index(distributed)
            (source, *others) = sources
            if others:
                weights = {name: part["weight"] for name, part in parts.items()}
                source = Mixture(dict(zip(parts, sources, strict=True)), weights, seed)
                notes.append(source.note())
            data = EpochPlan(source, grouping, seed, window_rows)
        collate = MaskedLMCollator.on(distributed, packed, seed, mlm_probability, pad_to_multiple_of)
        collate.masking = masking
        super().__init__(distributed, section, data, collate, num_workers)
        self.notes += notes
        for (name, part), source, baseline in zip(asked.items(), sources, baselines, strict=True):
            amount = "a stream" if stream is not None else source.amount
            self.sources += [f"{name}: {amount} of {whence(part['load_dataset_kwargs'])}", f"{name}: {baseline}"]


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
    micro_batch_size: int | None = None,
    token_micro_batch_size: int | None = None,
    max_seq_length: int = 512,
    mlm_probability: float = 0.15,
    masking: Masking = "amino_acids",
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
        rows = open_proteins(section, load_dataset_kwargs, sequence_column)
        if isinstance(rows, datasets.IterableDataset):
            if max_rows is None:
                raise ValueError(f"{section}.load_dataset_kwargs.streaming=true needs {section}.max_rows.")
            rows = first_rows(section, load_dataset_kwargs, rows, max_rows)
    if max_rows is not None and max_rows < len(rows):
        rows = rows.take(max_rows).flatten_indices()
    source = SequenceRows(section, rows, sequence_column, max_seq_length, VALIDATION_SEED)
    source.build_index(distributed)
    if not source.sizes(np.arange(min(window_rows, len(source))), epoch=0).any():
        raise ValueError(f"{section}: the sequences are all empty; is {section}.sequence_column right?")
    collate = MaskedLMCollator.on(distributed, packed, VALIDATION_SEED, mlm_probability, pad_to_multiple_of)
    collate.masking = masking
    plan = EpochPlan(source, grouping, None, window_rows)
    validator = Validator(distributed, plan, collate, metrics, every_n_steps)
    validator.facts.append(f"{section}: {source.amount} of {whence(load_dataset_kwargs)}")
    return validator
