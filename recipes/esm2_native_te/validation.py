# SPDX-License-Identifier: Apache-2.0
"""Loss, perplexity and masked accuracy over a fixed set: every row once, whatever the number of ranks."""

import math
from itertools import islice

import datasets
import numpy as np
import torch

from collator import IGNORED, MaskedLMCollator
from dataset import check_limits, first_rows, open_rows, open_source
from distributed import Distributed
from epoch_plan import EpochPlan, Grouping


MASK_SEED = 0  # not the run's: the same residues are masked in every validation of every run


class Validator:
    """Runs `model` over the rows of `load_dataset_kwargs` (null: never), at most the first `max_rows`."""

    def __init__(
        self,
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
    ):
        section = "validation"
        self.distributed, self.every_n_steps = distributed, every_n_steps
        self.enabled = load_dataset_kwargs is not None
        if not self.enabled:
            return
        for key, value in (("every_n_steps", every_n_steps), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{section}.{key}={value} must be at least 1.")
        check_limits(section, max_seq_length, mlm_probability, window_rows)
        grouping = Grouping(section, micro_batch_size, token_micro_batch_size, max_seq_length)
        with distributed.main_first():
            rows = open_rows(section, load_dataset_kwargs)
            if isinstance(rows, datasets.IterableDataset):
                if max_rows is None:
                    raise ValueError(f"{section}.load_dataset_kwargs.streaming=true needs {section}.max_rows.")
                rows = first_rows(section, load_dataset_kwargs, rows, max_rows)
        if max_rows is not None and max_rows < len(rows):
            rows = rows.take(max_rows).flatten_indices()
        source = open_source(
            section, rows, sequence_column, cluster_column, protein_database, max_seq_length, MASK_SEED
        )
        self.plan = EpochPlan(source, grouping, None, window_rows)
        self.collate = MaskedLMCollator(packed, MASK_SEED, mlm_probability, pad_to_multiple_of)
        if not source.lengths(np.arange(min(window_rows, len(source))), epoch=0).any():
            raise ValueError(f"{section}: the sequences are all empty; is {section}.sequence_column right?")

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to validate after this step."""
        due = step == last_step or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        return self.enabled and due

    @torch.no_grad()
    def run(self, model: torch.nn.Module, forward_context) -> dict:
        """`loss` (nats a masked residue), `perplexity`, `accuracy`, `num_labels`."""
        rank, num_ranks = self.distributed.data_rank, self.distributed.num_data_ranks
        model.eval()
        loss, correct, num_labels = 0.0, 0.0, 0
        micro_batches = self.plan.epoch(0)
        while group := list(islice(micro_batches, num_ranks)):
            batch = self.collate(self.plan.source.sample(group[min(rank, len(group) - 1)]))
            if rank >= len(group):  # sharded models need every rank in every forward pass
                batch = batch.without_labels()
            batch = self.distributed.counted_once(batch).to(self.distributed.device)
            with forward_context():
                output = model(**batch.inputs, num_items_in_batch=1)
            labels = batch.inputs["labels"]
            if self.distributed.context_parallel:
                labels = self.distributed.context_parallel.part(labels)
            loss += output.loss.double().item()
            correct += (output.logits.argmax(-1) == labels[labels != IGNORED]).sum().item()
            num_labels += batch.num_labels
        model.train()
        loss, correct, num_labels = self.distributed.sum(loss, correct, num_labels)
        num_labels = max(num_labels, 1)
        return {
            "loss": loss / num_labels,
            "perplexity": math.exp(min(loss / num_labels, 700)),
            "accuracy": correct / num_labels,
            "num_labels": int(num_labels),
        }
