# SPDX-License-Identifier: Apache-2.0
"""Which keys the configuration has, whose arguments each section is, and which values cannot be together."""

from typing import Annotated, Literal

import torch
from annotated_types import Gt, Lt
from omegaconf import DictConfig
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

import common.config
from build_model import model_config
from checkpoint import Checkpointer
from common.anomalies import Anomalies
from common.perf_logger import PerfLogger
from common.run_facts import start_wandb
from common.scheduler import Fraction, Schedule, adamw, cosine_schedule, linear_schedule
from dataset import TrainLoader, open_validation
from tokens.formats import FP4, FP8
from tokens.lora import lora_settings
from tokens.low_precision import check_together
from tokens.quant_stats import QuantStats


LayerList = Annotated[list[int | str], Field(description="a list of layers")]


def top_level(
    *,
    model_tag: str,
    num_train_steps: PositiveInt,
    init_from: str | None = None,
    init_from_partial: bool = False,
    layer_backend: Literal["auto", "te", "cpp", "torch"] = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    micro_batches_per_step: PositiveInt | None = None,
    use_sequence_packing: bool = False,
    use_torch_compile: bool = False,
    use_activation_checkpointing: bool = False,
    fp8_layers: LayerList | str | int | None = None,
    fp4_layers: LayerList | str | int | None = None,
    cp_size: PositiveInt = 1,
    max_grad_norm: PositiveFloat = 1.0,
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None,
    seed: NonNegativeInt = 42,
    deterministic: bool = False,
) -> None:
    """The keys that stand outside any section; what each means is said in `hydra_config/defaults.yaml`."""


def lr_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    kind: Literal["linear", "cosine"] = "linear",
    num_warmup_steps: NonNegativeInt,
    num_training_steps: PositiveInt,
    decay_fraction: PositiveFloat,
    min_lr_fraction: Fraction,
) -> Schedule:
    """Linear up to the peak, then down by a line or half a cosine wave, then flat."""
    return {"linear": linear_schedule, "cosine": cosine_schedule}[kind](
        optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps,
        decay_fraction=decay_fraction, min_lr_fraction=min_lr_fraction,
    )  # fmt: skip


SECTIONS = {
    "model_kwargs": model_config,
    "lora": lora_settings,
    "fp8_config": FP8,
    "fp4_config": FP4,
    "quant_stats_config": QuantStats,
    "dataset": TrainLoader,
    "validation": open_validation,
    "adamw_kwargs": adamw,
    "lr_scheduler_kwargs": lr_schedule,
    "anomalies": Anomalies,
    "checkpoint": Checkpointer,
    "logger": PerfLogger,
    "wandb_init_args": start_wandb,
}


def check_config(config: DictConfig) -> None:
    """Stop with one sentence at a key that is unknown, missing or of the wrong type, and at two that cannot be."""
    common.config.check_config(config, top_level, SECTIONS, check_pairs)


def check_pairs(config: DictConfig) -> None:
    """Raise ValueError for values that cannot be together, on any hardware."""
    check_together(config)
    lora_settings(**config.lora)
    # Once on a parameter that nobody trains: what these two refuse shows now.
    optimizer = adamw(torch.nn.Linear(1, 1), **{**config.adamw_kwargs, "groups": None})
    lr_schedule(optimizer, **config.lr_scheduler_kwargs)
