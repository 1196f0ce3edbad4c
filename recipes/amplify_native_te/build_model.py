# SPDX-License-Identifier: Apache-2.0
"""From a model's name to a model, its first or pretrained weights, and the arithmetic of a step."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Gt, Le
from omegaconf import DictConfig
from pydantic import NonNegativeFloat, PositiveInt
from transformers import EuroBertConfig

import modeling_amplify
from common.batch import Batch
from common.distributed import Distributed
from common.weights import copy_parameters
from convert_amplify import eurobert_config, read_config
from dataset import open_validation
from modeling_amplify import SIZES, AmplifyConfig, AmplifyForMaskedLM
from pretrained import open_model
from tokens.context_parallel import ContextParallel
from tokens.low_precision import LowPrecision, build_precision
from tokens.masked_lm import init_parameters
from tokens.starting_weights import SHAPE, first_line


def model_config(
    model_tag: str,
    layer_backend: str,
    *,
    hidden_size: PositiveInt | None = None,
    num_hidden_layers: Annotated[int, Gt(0), Le(1000)] | None = None,
    num_attention_heads: PositiveInt | None = None,
    intermediate_size: PositiveInt | None = None,
    initializer_range: NonNegativeFloat | None = None,
) -> AmplifyConfig:
    """The configuration of a published size (no network is asked) or of a local folder, with what is overridden.

    Raises ValueError for a name that is neither, and for heads that do not divide the width.
    """
    overrides = {k: v for k, v in locals().items() if k != "model_tag" and v is not None}
    name = model_tag.rpartition("/")[2]
    if Path(model_tag).is_dir():
        try:
            config = read_config(Path(model_tag))[0].to_dict()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model_tag={model_tag} is no folder of an AMPLIFY: {first_line(error)}") from error
    elif name in SIZES:
        config = SIZES[name]
    else:
        raise ValueError(f"model_tag={model_tag}: no local folder and none of {', '.join(SIZES)}.")
    return AmplifyConfig(**{**config, **overrides})


def build_model(shape: AmplifyConfig, distributed: Distributed) -> AmplifyForMaskedLM:
    """The model without storage; `materialize` gives it its numbers once it is split over the ranks.

    Raises ValueError if the ranks that share a micro-batch are more than its heads.
    """
    if distributed.group_size > shape.num_attention_heads:
        raise ValueError(
            f"cp_size={distributed.group_size} must be at most the number of heads, {shape.num_attention_heads}."
        )
    with torch.device("meta"):
        model = AmplifyForMaskedLM(shape)
    if distributed.group:
        model.amplify.context_parallel = ContextParallel(distributed.group)
    return model


def sharded_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is split over the ranks, and gathered, as one: each layer, and at the end the model with all the rest."""
    return [*model.amplify.layer, model]


def prepare(model: torch.nn.Module, config: DictConfig, precision: LowPrecision) -> None:
    """What the layers do in another way before the model is split: number formats, recomputation, compilation."""
    *layers, _ = sharded_parts(model)
    precision.prepare(layers)
    if config.use_activation_checkpointing:
        model.activation_checkpointing_enable()
    if config.use_torch_compile:
        for layer in layers:
            layer.compile(dynamic=True)


def materialize(
    model: torch.nn.Module, shape: AmplifyConfig, seed: int, pretrained: Mapping[str, torch.Tensor] | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Give the model storage and its first weights: the pretrained ones, or random ones that depend on the seed alone.

    It may be split already: then each rank has its part only.
    """
    model.to_empty(device=device)
    if pretrained is None:
        init_parameters(model, seed)
    else:
        copy_parameters(model, pretrained)


def open_evaluation(config: DictConfig, source: str, distributed: Distributed) -> tuple:
    """For `evaluate.py`: a model that is there, what `config.validation` names, and how a forward pass is made."""
    size = config.cp_size
    distributed = distributed.in_groups("cp_size", 1 if distributed.num_ranks % size else size)
    shape, weights, _ = open_model(source)
    shape.layer_backend = config.layer_backend
    precision = build_precision(config, shape, distributed)
    multiple = precision.multiple * distributed.group_size
    validator = open_validation(distributed, config.use_sequence_packing, multiple, **config.validation)
    model = build_model(shape, distributed)
    prepare(model, config, precision)
    materialize(model, shape, config.seed, weights, distributed.device)
    return model, validator, partial(precision.forward, autocast=True)


def facts(shape: AmplifyConfig, saved: dict | None = None) -> dict:
    """What checkpoints say of the model, all that `export.py` needs to know.

    With what the checkpoint of a run that goes on says (`saved`): raises ValueError if that is another model.
    """
    now = shape.to_dict()
    if wrong := [key for key in SHAPE if saved and now[key] != saved[key]]:
        changes = ", ".join(f"{key} was {saved[key]} and is {now[key]}" for key in wrong)
        raise ValueError(f"{changes}; give model_tag or model_kwargs of that size")
    if saved:
        shape.max_position_embeddings = saved["max_position_embeddings"]
    return now | {"max_position_embeddings": shape.max_position_embeddings}


def harmless_keys(config: Mapping) -> tuple[str, ...]:
    """Keys of this recipe alone whose change on resume moves the trajectory by rounding at most."""
    return ("use_sequence_packing", "layer_backend", "cp_size")


def training_flops(shape: AmplifyConfig, batch: Batch, backend: str | None = None) -> float:
    """Floating-point operations of one training step on this batch, without those that the backend leaves out."""
    return modeling_amplify.training_flops(shape, batch.counts, backend)


def reference_config(shape: AmplifyConfig) -> EuroBertConfig:
    """The same model as plain `transformers` has it, for benchmarks to compare with."""
    return eurobert_config(shape)
