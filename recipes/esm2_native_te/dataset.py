# SPDX-License-Identifier: Apache-2.0
"""Protein rows to batches: sources, and what training and validation read."""

import datasets
from omegaconf import DictConfig
from pydantic import NonNegativeInt

import metrics
from collator import MaskedLMCollator
from common import RECIPE
from common.distributed import Distributed
from common.epoch_plan import EpochPlan
from common.loader import Loader, start_worker_server
from common.open_data import first_rows, whence
from common.validation import Validator
from tokens import protein_rows
from tokens.layout import token_grouping
from tokens.protein_data import check_limits, first_look, micro_batches_of, rows_to_validate, validator_of
from tokens.protein_rows import Alphabet, open_proteins


VOCABULARY = (RECIPE / "tokenizer" / "vocab.txt").read_text().split()
ALPHABET = Alphabet(VOCABULARY, "<cls>", "<eos>", unknown="X")
VALIDATION_SEED = 0  # not the run's: the same residues are masked in every validation of every run
# What evaluate.py takes where no run says it.
WITHOUT_A_RUN = (
    "validation.load_dataset_kwargs={path: ???, name: null, data_files: null, split: train}",
    "dataset.token_micro_batch_size=8192",
    "dataset.max_seq_length=8192",
)
EXAMPLE = "validation.load_dataset_kwargs.path=fasta validation.load_dataset_kwargs.data_files=my.fasta"


class SequenceRows(protein_rows.SequenceRows):
    """Each row is a sequence of ESM's alphabet."""

    alphabet = ALPHABET


class ClusterRows(protein_rows.ClusterRows):
    """Each row is a cluster of such sequences."""

    alphabet = ALPHABET


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
        check_limits(section, ALPHABET, max_seq_length, mlm_probability, window_rows)
        grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
        if num_workers:
            start_worker_server()
        column = (cluster_column, "cluster_column") if protein_database else (sequence_column, "sequence_column")
        with distributed.main_first():
            rows = open_proteins(section, load_dataset_kwargs, *column)
            streaming = isinstance(rows, datasets.IterableDataset)
            if streaming:
                stream, rows = rows, first_rows(section, load_dataset_kwargs, rows, min(window_rows, 1000))
        if streaming and protein_database is not None:
            raise ValueError(f"{section}.protein_database needs {section}.load_dataset_kwargs.streaming=false.")
        source = open_source(section, rows, sequence_column, cluster_column, protein_database, max_seq_length, seed)
        odd, baseline = first_look(section, source, window_rows, distributed)
        if streaming:
            data, num_workers = micro_batches_of(
                section, stream, source, grouping, window_rows, seed, distributed, num_workers
            )
        else:
            source.build_index(distributed)
            data = EpochPlan(source, grouping, seed, window_rows)
        collate = MaskedLMCollator.on(distributed, packed, seed, mlm_probability, pad_to_multiple_of)
        super().__init__(distributed, section, data, collate, num_workers)
        self.notes += [odd] if odd else []
        amount = "a stream" if streaming else source.amount
        self.sources += [
            f"{section}: {amount} from {whence(load_dataset_kwargs)}",
            f"{section}: {baseline}",
        ]


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
    check_limits(section, ALPHABET, max_seq_length, mlm_probability, window_rows)
    grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
    column = (cluster_column, "cluster_column") if protein_database else (sequence_column, "sequence_column")
    rows = rows_to_validate(section, load_dataset_kwargs, column, every_n_steps, max_rows, distributed)
    source = open_source(
        section, rows, sequence_column, cluster_column, protein_database, max_seq_length, VALIDATION_SEED
    )
    collate = MaskedLMCollator.on(distributed, packed, VALIDATION_SEED, mlm_probability, pad_to_multiple_of)
    return validator_of(
        source, load_dataset_kwargs, grouping, window_rows, distributed, collate, metrics, every_n_steps
    )
