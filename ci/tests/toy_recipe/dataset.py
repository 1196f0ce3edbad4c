# SPDX-License-Identifier: Apache-2.0
"""Structures from a Parquet file: `positions` (flat, A), `energy` (eV), `forces` (flat, eV/A)."""

import numpy as np
import pyarrow.compute as pc
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

import metrics
from collator import collate
from common.distributed import Distributed
from common.epoch_plan import EpochPlan, Grouping
from common.loader import Loader
from common.open_data import Column, open_rows
from common.sizes import size_index
from common.validation import Validator


class Structures:
    """A source whose rows are measured in atoms."""

    def __init__(self, section: str, load_dataset_kwargs: dict, distributed: Distributed):
        with distributed.main_first():
            self.rows = open_rows(section, load_dataset_kwargs)
        self.positions = Column(self.rows, "positions")
        self.index = size_index(distributed, section, self.rows._fingerprint, len(self), self._measure)

    def __len__(self) -> int:
        return len(self.rows)

    def _measure(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        return pc.list_value_length(self.positions[rows]).to_numpy() // 3, None

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Atoms of each row."""
        return self.index.sizes[rows]

    def read(self, rows: np.ndarray, epoch: int) -> list[dict]:
        """Positions, energy and forces."""
        return [self.rows[int(row)] for row in rows]

    def describe(self, rows: np.ndarray, epoch: int) -> list[str]:
        """Its energy."""
        return [f"{self.rows[int(row)]['energy']:.3f} eV" for row in rows]

    @property
    def identity(self) -> dict:
        return {"num_rows": len(self), "sizes": self.index.digest}


class TrainLoader(Loader):
    """The section `dataset`."""

    def __init__(self, distributed: Distributed, seed: int, *, load_dataset_kwargs: dict,
                 atom_micro_batch_size: PositiveInt, num_workers: NonNegativeInt = 0):  # fmt: skip
        source = Structures("dataset", load_dataset_kwargs, distributed)
        plan = EpochPlan(source, Grouping(budget=atom_micro_batch_size), seed, window_rows=100)
        super().__init__(distributed, "dataset", plan, collate, num_workers)


def open_plan(config: DictConfig, distributed: Distributed) -> EpochPlan:
    """That of a run with this configuration."""
    return TrainLoader(distributed, config.seed, **config.dataset).plan


def open_validation(distributed: Distributed, *, load_dataset_kwargs: dict, atom_micro_batch_size: PositiveInt,
                    every_n_steps: PositiveInt | None = None) -> Validator:  # fmt: skip
    """The section `validation`."""
    source = Structures("validation", load_dataset_kwargs, distributed)
    plan = EpochPlan(source, Grouping(budget=atom_micro_batch_size), None, window_rows=100)
    return Validator(distributed, plan, collate, metrics, every_n_steps)
