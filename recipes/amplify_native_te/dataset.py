# SPDX-License-Identifier: Apache-2.0
"""Protein rows to batches: one source or a mixture of several, and what training and validation read."""

import datasets
from omegaconf import DictConfig
from pydantic import NonNegativeInt

import metrics
from collator import VOCABULARY, MaskedLMCollator, Masking
from common.distributed import Distributed
from common.epoch_plan import EpochPlan
from common.loader import Loader, start_worker_server
from common.mixture import Mixture, sources_of_mix
from common.open_data import first_rows, whence
from common.validation import Validator
from tokens import protein_rows
from tokens.layout import token_grouping
from tokens.protein_data import check_limits, first_look, micro_batches_of, rows_to_validate, validator_of
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
        check_limits(section, ALPHABET, max_seq_length, mlm_probability, window_rows)
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
            odd, baseline = first_look(name, source, window_rows, distributed)
            if odd:
                notes.append(f"{name}: {odd}" if mix else odd)
            sources.append(source)
            baselines.append(baseline)
        if stream is not None:
            data, num_workers = micro_batches_of(
                section, stream, source, grouping, window_rows, seed, distributed, num_workers
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
            self.sources += [f"{name}: {amount} from {whence(part['load_dataset_kwargs'])}", f"{name}: {baseline}"]


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
    check_limits(section, ALPHABET, max_seq_length, mlm_probability, window_rows)
    grouping = token_grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
    rows = rows_to_validate(
        section, load_dataset_kwargs, (sequence_column, "sequence_column"), every_n_steps, max_rows, distributed
    )
    source = SequenceRows(section, rows, sequence_column, max_seq_length, VALIDATION_SEED)
    collate = MaskedLMCollator.on(distributed, packed, VALIDATION_SEED, mlm_probability, pad_to_multiple_of)
    collate.masking = masking
    return validator_of(
        source, load_dataset_kwargs, grouping, window_rows, distributed, collate, metrics, every_n_steps
    )
