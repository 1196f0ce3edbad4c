# SPDX-License-Identifier: Apache-2.0
"""The keys of the configuration: which callable reads each section, and which values exclude each other."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Lt
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

import common.config
from atoms.losses import loss_terms
from build_model import model_config
from checkpoint import Checkpointer
from common.anomalies import Anomalies
from common.loss_schedules import LossSchedules
from common.perf_logger import PerfLogger
from common.run_facts import start_wandb
from common.scheduler import Fraction, Plateau, Schedule, adamw, cosine_schedule, linear_schedule
from dataset import TrainLoader, open_validation
from metrics import BETTER


def top_level(
    *,
    model_tag: str,
    init_from: str | None = None,
    num_train_steps: PositiveInt,
    layer_backend: Literal["auto", "cpp", "cue", "torch"] = "auto",
    use_torch_compile: bool = False,
    precision: Literal["fp32", "tf32", "fp64"] = "fp32",
    micro_batches_per_step: PositiveInt | None = None,
    max_grad_norm: PositiveFloat = 1.0,
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None,
    loss_schedules: dict | None = None,
    seed: NonNegativeInt = 42,
    deterministic: bool = False,
) -> None:
    """The keys outside of sections; `hydra_config/defaults.yaml` says what each means."""


def lr_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    kind: Literal["linear", "cosine", "plateau"],
    num_warmup_steps: NonNegativeInt,
    num_training_steps: PositiveInt,
    decay_fraction: PositiveFloat,
    min_lr_fraction: Fraction,
    metric: str = "forces_mae",
    factor: Annotated[float, Gt(0), Lt(1)] = 0.5,
    patience: PositiveInt = 5,
) -> Schedule:
    """Warm up linearly, then decay: linearly, as half a cosine wave, or whenever the validation no longer improves."""
    if kind == "plateau":
        return Plateau(optimizer, num_warmup_steps, metric, factor, patience, min_lr_fraction)
    rates = {
        "num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps,
        "decay_fraction": decay_fraction, "min_lr_fraction": min_lr_fraction,
    }  # fmt: skip
    return (linear_schedule if kind == "linear" else cosine_schedule)(optimizer, **rates)


SECTIONS = {
    "model_kwargs": model_config,
    "loss_kwargs": loss_terms,
    "dataset": TrainLoader,
    "validation": open_validation,
    "adamw_kwargs": adamw,
    "lr_scheduler_kwargs": lr_schedule,
    "anomalies": Anomalies,
    "checkpoint": Checkpointer,
    "logger": PerfLogger,
    "wandb_init_args": start_wandb,
}
WEIGHTS = ("energy_weight", "forces_weight", "stress_weight")


def check_config(config: DictConfig, trainer: str = "") -> None:
    """Stop with one sentence at unknown or missing keys, at wrong types, and at values that exclude each other."""
    common.config.check_config(config, top_level, SECTIONS, partial(check_pairs, trainer=Path(trainer).stem))


def check_labels(config: DictConfig, labels: Sequence[str]) -> None:
    """Raise ValueError for a metric to go by for which no structure of the validation has labels."""
    is_plateau = config.lr_scheduler_kwargs.kind == "plateau"
    asked = {
        "lr_scheduler_kwargs.metric": config.lr_scheduler_kwargs.metric if is_plateau else None,
        "checkpoint.keep_best": config.checkpoint.keep_best,
    }
    for key, metric in asked.items():
        if metric and (label := metric.partition("_")[0]) not in labels:
            raise ValueError(f"{key}={metric}: no structure of the validation has {label}; take another metric.")


def check_pairs(config: DictConfig, trainer: str) -> None:
    """Raise ValueError for values that exclude each other on any hardware."""
    if config.precision == "fp64" and trainer == "train_mfsdp":
        raise ValueError("precision=fp64: train_mfsdp.py has FP32 at most; use train_ddp.py or train_fsdp2.py.")
    model_config(config.model_tag, config.precision, config.init_from, **config.model_kwargs)
    if config.checkpoint.trained_only:
        raise ValueError("checkpoint.trained_only=true has no use here: potentials are small, and saved whole.")
    schedules = LossSchedules(config.loss_schedules)
    if unknown := [name for name in schedules.schedules if name not in WEIGHTS]:
        raise ValueError(f"loss_schedules.{unknown[0]} is no weight of the loss; those are {', '.join(WEIGHTS)}.")
    schedules.check_some_left({name: config.loss_kwargs[name] for name in WEIGHTS}, config.num_train_steps)
    rates, validation = config.lr_scheduler_kwargs, config.validation
    if rates.kind == "plateau" and not (validation.load_dataset_kwargs and validation.every_n_steps):
        raise ValueError(
            "lr_scheduler_kwargs.kind=plateau goes by validations: give validation.load_dataset_kwargs and "
            "validation.every_n_steps."
        )
    if rates.kind == "plateau" and rates.metric not in BETTER:
        raise ValueError(f"lr_scheduler_kwargs.metric={rates.metric} must be one of {', '.join(BETTER)}.")
    # Once on a parameter that nobody trains: what these two refuse shows now.
    optimizer = adamw(torch.nn.Linear(1, 1), **{**config.adamw_kwargs, "groups": None})
    lr_schedule(optimizer, **config.lr_scheduler_kwargs)
