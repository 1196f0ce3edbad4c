# SPDX-License-Identifier: Apache-2.0
"""The toy's keys."""

from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

import common.config
from build_model import model_config
from checkpoint import Checkpointer
from common.anomalies import Anomalies
from common.perf_logger import PerfLogger
from common.run_facts import start_wandb
from common.scheduler import adamw
from common.scheduler import linear_schedule as lr_schedule
from dataset import TrainLoader, open_validation


def top_level(
    *,
    model_tag: str,
    num_train_steps: PositiveInt,
    micro_batches_per_step: PositiveInt | None = None,
    max_grad_norm: PositiveFloat = 1.0,
    ema_decay: float | None = None,
    loss_schedules: dict | None = None,
    seed: NonNegativeInt = 42,
) -> None:
    """Outside any section."""


SECTIONS = {
    "model_kwargs": model_config, "dataset": TrainLoader, "validation": open_validation, "adamw_kwargs": adamw,
    "lr_scheduler_kwargs": lr_schedule, "anomalies": Anomalies, "checkpoint": Checkpointer, "logger": PerfLogger,
    "wandb_init_args": start_wandb,
}  # fmt: skip


def check_config(config: DictConfig) -> None:
    """As in a recipe; no two values exclude each other."""
    common.config.check_config(config, top_level, SECTIONS, lambda config: None)
