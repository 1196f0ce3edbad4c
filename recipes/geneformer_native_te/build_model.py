# SPDX-License-Identifier: Apache-2.0
"""From a model's name to a model, its first or pretrained weights, and the arithmetic of a step."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig
from pydantic import NonNegativeFloat, PositiveInt
from transformers import BertConfig, MegatronBertConfig

import modeling_geneformer
from common.batch import Batch
from common.distributed import Distributed
from common.weights import copy_parameters
from convert_geneformer import hf_config, read_config
from dataset import open_tokens, open_validation
from labels import check_column_is_named, class_names, gene_sets
from modeling_geneformer import SIZES, GeneformerConfig, model_for
from pretrained import open_model
from tokens import low_precision
from tokens.context_parallel import ContextParallel
from tokens.lora import check_start, lora_settings
from tokens.low_precision import LowPrecision
from tokens.masked_lm import init_parameters
from tokens.starting_weights import SHAPE, first_line
from vocabulary import PUBLISHED, open_vocabulary


Share = Annotated[float, Ge(0), Lt(1)]


def model_config(
    model_tag: str,
    layer_backend: str,
    *,
    vocabulary: str | None = None,
    task: Literal["masked_lm", "cells", "genes", "length"] | None = None,
    classes: list[str] | None = None,
    hidden_size: PositiveInt | None = None,
    num_hidden_layers: Annotated[int, Gt(0), Le(1000)] | None = None,
    num_attention_heads: PositiveInt | None = None,
    intermediate_size: PositiveInt | None = None,
    max_position_embeddings: PositiveInt | None = None,
    norm: Literal["post", "pre"] | None = None,
    hidden_act: Literal["relu", "gelu"] | None = None,
    hidden_dropout_prob: Share | None = None,
    attention_probs_dropout_prob: Share | None = None,
    initializer_range: NonNegativeFloat | None = None,
) -> GeneformerConfig:
    """The configuration of a published size (no network is asked) or of a local folder, with what is overridden.

    Raises ValueError for a name that is neither, heads that do not divide the width, and a vocabulary that is none.
    """
    overrides = {k: v for k, v in locals().items() if k != "model_tag" and v is not None}
    name = model_tag.rpartition("/")[2]
    if Path(model_tag).is_dir():
        try:
            config = read_config(Path(model_tag))[0].to_dict()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model_tag={model_tag} is no folder of a Geneformer: {first_line(error)}") from error
    elif name in SIZES:
        config = dict(SIZES[name])
    else:
        raise ValueError(f"model_tag={model_tag}: no local folder and none of {', '.join(SIZES)}.")
    asked = vocabulary or config["vocabulary"]
    if not asked:
        raise ValueError(
            f"model_tag={model_tag} has {config['vocab_size']} tokens, and none of {', '.join(PUBLISHED)} does; give "
            "model_kwargs.vocabulary, a JSON file of {token: number}."
        )
    tokens = open_vocabulary(asked)
    if config.get("vocab_size", tokens.size) < tokens.size:
        raise ValueError(
            f"model_kwargs.vocabulary={asked} has {tokens.size} tokens, and model_tag={model_tag} "
            f"{config['vocab_size']}."
        )
    numbers = {"vocabulary": asked, "pad_token_id": tokens.pad, "mask_token_id": tokens.mask}
    return GeneformerConfig(**{"vocab_size": tokens.size, **config, **overrides, **numbers})


def fit_data(config: DictConfig, shape: GeneformerConfig, distributed: Distributed) -> None:
    """Let what is read have the model's vocabulary, task and classes, where none is named, and a model its classes.

    Raises ValueError for cells longer than there are positions, and for a vocabulary of other numbers.
    """
    check_start(config.lora.r, config.init_from, config.init_from_partial)
    shape.lora = lora_settings(**config.lora)
    if shape.task == "length" and config.cp_size > 1:
        raise ValueError(f"cp_size={config.cp_size} cannot be with model_kwargs.task=length.")
    if shape.task in ("cells", "genes") and not shape.classes:
        shape.classes = classes_of_data(config.dataset, shape, distributed)
    for section in ("model_kwargs", "dataset", "validation"):
        for key in ("vocabulary", "task", "classes"):
            if config[section][key] is None:
                config[section][key] = getattr(shape, key)
        if section == "model_kwargs":
            continue
        asked, ours = open_vocabulary(config[section].vocabulary), open_vocabulary(shape.vocabulary)
        if asked[:-1] != ours[:-1]:
            raise ValueError(
                f"{section}.vocabulary={config[section].vocabulary} is not that of the model, {shape.vocabulary}."
            )
        if (length := config[section].max_seq_length) > shape.max_position_embeddings:
            raise ValueError(
                f"{section}.max_seq_length={length} must be at most the model's positions, "
                f"{shape.max_position_embeddings} (model_kwargs.max_position_embeddings)."
            )


def classes_of_data(dataset: DictConfig, shape: GeneformerConfig, distributed: Distributed) -> list[str]:
    """What cells or genes are told apart by, where no key says it. Raises ValueError where no data does."""
    if shape.task == "genes":
        return sorted(gene_sets("dataset", dataset.gene_classes))
    check_column_is_named("dataset", dataset.label_column)
    with distributed.main_first():
        rows, _ = open_tokens("dataset", dataset.load_dataset_kwargs, shape.vocabulary, dataset.input_ids_column,
                              dataset.max_seq_length, dataset.counts, dataset.label_column, distributed)  # fmt: skip
    return class_names(rows, dataset.label_column)


def build_precision(config: DictConfig, shape: GeneformerConfig, distributed: Distributed) -> LowPrecision:
    """How the run computes, the same on all ranks; by then model and data have to fit. Raises ValueError as above."""
    fit_data(config, shape, distributed)
    return low_precision.build_precision(config, shape, distributed)


def build_model(shape: GeneformerConfig, distributed: Distributed) -> torch.nn.Module:
    """The model without storage; `materialize` gives it its numbers once it is split over the ranks.

    Raises ValueError if the ranks that share a micro-batch are more than its heads.
    """
    if distributed.group_size > shape.num_attention_heads:
        raise ValueError(
            f"cp_size={distributed.group_size} must be at most the number of heads, {shape.num_attention_heads}."
        )
    with torch.device("meta"):
        model = model_for(shape)
    if distributed.group:
        model.geneformer.context_parallel = ContextParallel(distributed.group)
    return model


def sharded_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is split over the ranks, and gathered, as one: each layer, and at the end the model with all the rest."""
    return [*model.geneformer.layer, model]


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
    model: torch.nn.Module, shape: GeneformerConfig, seed: int, pretrained: Mapping[str, torch.Tensor] | None,
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
    shape.layer_backend, config.lora.r = config.layer_backend, 0  # the weights have what adapters add
    config.dataset.max_seq_length = min(config.dataset.max_seq_length, shape.max_position_embeddings)
    precision = build_precision(config, shape, distributed)
    multiple = precision.multiple * distributed.group_size
    validator = open_validation(distributed, config.use_sequence_packing, multiple, **config.validation)
    model = build_model(shape, distributed)
    prepare(model, config, precision)
    materialize(model, shape, config.seed, weights, distributed.device)
    return model, validator, partial(precision.forward, autocast=True)


def facts(shape: GeneformerConfig, saved: dict | None = None) -> dict:
    """What checkpoints say of the model, all that `export.py` needs to know.

    With what the checkpoint of a run that goes on says (`saved`): raises ValueError if that is another model.
    """
    now = shape.to_dict()
    fixed = (*SHAPE, "vocab_size", "max_position_embeddings", "norm", "hidden_act", "task", "classes",
             "lora")  # fmt: skip
    if wrong := [key for key in fixed if saved and now[key] != saved.get(key, now[key])]:
        changes = ", ".join(f"{key} was {saved[key]} and is {now[key]}" for key in wrong)
        raise ValueError(f"{changes}; give model_tag, model_kwargs or lora of that kind")
    return now


def harmless_keys(config: Mapping) -> tuple[str, ...]:
    """Keys of this recipe alone whose change on resume moves the trajectory by rounding at most.

    `config` is what the run goes on with, flat: `section.key`.
    """
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    drops = any(config.get(f"model_kwargs.{name}") != 0 for name in names)
    # GPUs' attention and TransformerEngine's layers drop by what passes through them, and so do LoRA and what tells
    # classes.
    if drops and (torch.cuda.is_available() or config.get("model_kwargs.task") in ("cells", "genes")):
        return ()
    return () if config.get("lora.lora_dropout") else ("use_sequence_packing", "layer_backend", "cp_size")


def training_flops(shape: GeneformerConfig, batch: Batch, backend: str | None = None) -> float:
    """Floating-point operations of one training step on this batch, without those that the backend leaves out."""
    return modeling_geneformer.training_flops(shape, batch.counts, backend)


def reference_config(shape: GeneformerConfig) -> BertConfig | MegatronBertConfig:
    """The same model as plain `transformers` has it, for benchmarks to compare with."""
    return hf_config(shape)
