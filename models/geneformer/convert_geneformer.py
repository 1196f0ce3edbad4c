# SPDX-License-Identifier: Apache-2.0
"""Geneformer checkpoints between plain `transformers` and `GeneformerForMaskedLM`.

    python convert_geneformer.py --to native ctheodoris/Geneformer my_folder
    python convert_geneformer.py --to hf my_folder my_hf_folder

A source is a local folder in either format, or a name on the Hugging Face hub; an adapter of peft is merged into its
base. `hf` is `BertForMaskedLM`, or, where norms stand before attention as in BioNeMo's models,
`MegatronBertForMaskedLM`.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, MegatronBertConfig

from common.command import command, new_folder
from common.weights import LazyTensors, listed, local_folder, named_type, open_weights, read
from modeling_geneformer import TASKS, GeneformerConfig
from tokens.lora import is_adapter_folder, merged, read_adapter, read_settings, write_adapter
from vocabulary import FILE, name_of_size


# native name: Hugging Face's
NAMES = {
    "geneformer.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "geneformer.embeddings.position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "geneformer.embeddings.token_type_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
}
LM_HEAD = {
    "lm_head.dense.weight": "cls.predictions.transform.dense.weight",
    "lm_head.dense.bias": "cls.predictions.transform.dense.bias",
    "lm_head.layer_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "lm_head.layer_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "lm_head.bias": "cls.predictions.bias",
}
CLASSIFIER = {f"classifier.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}
REGRESSION = "regression_head."
HEADS = {
    "masked_lm": LM_HEAD,
    "cells": {f"pooler.{kind}": f"bert.pooler.dense.{kind}" for kind in ("weight", "bias")} | CLASSIFIER,
    "genes": CLASSIFIER,
    "length": LM_HEAD | {f"{REGRESSION}{name}": f"{REGRESSION}{name}"
                         for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")},
}  # fmt: skip
# Of layers, below geneformer.layer.<i>. and bert.encoder.layer.<i>.; without .weight and .bias, or _weight and _bias.
LAYER_NAMES = {
    "self_attention.proj.": "attention.output.dense.",
    "layernorm_mlp.fc1_": "intermediate.dense.",
    "layernorm_mlp.fc2_": "output.dense.",
}
# Where the norms are, by `norm`: around the layers, and in them.
NORMS = {
    "post": {"geneformer.embeddings.layer_norm.": "bert.embeddings.LayerNorm."},
    "pre": {"geneformer.norm.": "bert.encoder.ln."},
}
LAYER_NORMS = {
    "post": {
        "layernorm_mlp.layer_norm_": "attention.output.LayerNorm.",
        "layernorm.": "output.LayerNorm.",
    },
    "pre": {
        "self_attention.layernorm_qkv.layer_norm_": "attention.ln.",
        "layernorm_mlp.layer_norm_": "ln.",
    },
}
QKV = {"post": "self_attention.qkv.", "pre": "self_attention.layernorm_qkv."}
EMBEDDING = "geneformer.embeddings.word_embeddings.weight"
# The same numbers as others, under second names.
TIED = {"cls.predictions.decoder.weight": NAMES[EMBEDDING], "cls.predictions.decoder.bias": "cls.predictions.bias"}
DERIVED_NAMES = re.compile(r"bert\.embeddings\.position_ids")
TASK_TYPES = {"cells": "SEQ_CLS", "genes": "TOKEN_CLS"}  # of peft
MODELS = {"post": ("bert", BertConfig, "Bert"), "pre": ("megatron-bert", MegatronBertConfig, "MegatronBert")}
ARCHITECTURES = {"masked_lm": "ForMaskedLM", "cells": "ForSequenceClassification", "genes": "ForTokenClassification",
                 "length": "ForMaskedLM"}  # fmt: skip
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "pad_token_id", "initializer_range",
)  # fmt: skip


def with_prefix(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names of a `BertForMaskedLM` where those of a `BertModel`, without a head, are given."""
    if any(name.startswith(("bert.", "cls.")) for name in state_dict):
        return state_dict
    return LazyTensors({f"bert.{name}": read(state_dict, name) for name in state_dict})


def sources(config: GeneformerConfig) -> dict[str, tuple[str, ...]]:
    """Hugging Face's tensors that each native tensor is made of: one, or queries, keys and values."""
    found = {native: (name,) for native, name in (NAMES | HEADS[config.task]).items()}
    for native, name in NORMS[config.norm].items():
        found |= {native + kind: (name + kind,) for kind in ("weight", "bias")}
    of_layer = LAYER_NAMES | LAYER_NORMS[config.norm]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"geneformer.layer.{i}.", f"bert.encoder.layer.{i}."
        for kind in ("weight", "bias"):
            found |= {ours + native + kind: (theirs + name + kind,) for native, name in of_layer.items()}
            parts = tuple(f"{theirs}attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            found[ours + QKV[config.norm] + kind] = parts
    return found


def to_native(state_dict: Mapping[str, Tensor], config: GeneformerConfig, strict: bool = True) -> LazyTensors:
    """The native state dict for Hugging Face's; not `strict`: what can be made of what there is.

    Raises ValueError for missing or unexpected names, and for a decoder that is not the embedding.
    """
    found = {name for name in state_dict if not DERIVED_NAMES.fullmatch(name)}
    expected = {name for names in sources(config).values() for name in names}
    missing, unexpected = expected - found, found - expected - TIED.keys()
    if strict and (missing or unexpected):
        raise ValueError(
            f"This is no Geneformer of that size: missing {listed(missing)}; unexpected {listed(unexpected)}."
        )
    for name, other in TIED.items():
        if {name, other} <= found and not torch.equal(state_dict[name], state_dict[other]):
            raise ValueError(f"{name} is not {other}, and Geneformer has one of the two.")

    def make(native: str, names: tuple[str, ...]) -> Tensor:
        parts = [state_dict[name] for name in names]
        if native == EMBEDDING:
            more = config.padded_vocab_size - len(parts[0])
            return torch.cat((parts[0], parts[0].new_zeros(more, parts[0].shape[1])))
        if len(parts) == 1:
            return parts[0]
        heads = config.num_attention_heads
        return torch.stack([x.unflatten(0, (heads, -1)) for x in parts], dim=1).flatten(0, 2)

    makers = {native: partial(make, native, names) for native, names in sources(config).items()}
    return LazyTensors({n: makers[n] for n, names in sources(config).items() if found.issuperset(names)})


def from_native(state_dict: Mapping[str, Tensor], config: GeneformerConfig) -> LazyTensors:
    """The way back, without the second names of what is tied."""

    def split(native: str, index: int, number: int) -> Tensor:
        x = state_dict[native]
        if native == EMBEDDING:
            return x[: config.vocab_size].clone()
        return x.unflatten(0, (config.num_attention_heads, 3, -1))[:, index].flatten(0, 1) if number > 1 else x

    makers = {}
    for native, names in sources(config).items():
        makers |= {name: partial(split, native, i, len(names)) for i, name in enumerate(names)}
    return LazyTensors(makers)


def read_config(folder: Path) -> tuple[GeneformerConfig, str]:
    """The native configuration of a checkpoint folder, and its format, hf or native.

    That of an adapter of peft is its base's, and the format adapter. Raises ValueError for what Geneformer is not.
    """
    if is_adapter_folder(folder):
        return config_of_adapter(folder), "adapter"
    kind = named_type(folder)
    given = json.loads((folder / "config.json").read_text())
    if kind == GeneformerConfig.model_type:
        config, format = GeneformerConfig.from_pretrained(folder), "native"
    else:
        norm = next((norm for norm, (name, *_) in MODELS.items() if name == kind), None)
        if norm is None:
            raise ValueError(f"its model_type is {kind}, not bert, megatron-bert or {GeneformerConfig.model_type}.")
        needed = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
                  "tie_word_embeddings": True}  # fmt: skip
        for name, value in needed.items():
            if given.get(name, value) != value:
                raise ValueError(f"{name} is {given[name]!r}, but Geneformer needs {value!r}.")
        usual = MODELS[norm][1]()
        shared = {name: given.get(name, getattr(usual, name)) for name in FIELDS}
        known = name_of_size(shared["vocab_size"])
        more = {name: given[name] for name in ("vocabulary", "mask_token_id") if name in given}
        more |= task_of(folder, given)
        config, format = GeneformerConfig(**shared, norm=norm, **{"vocabulary": known or "", **more}), "hf"
    if (folder / FILE).exists():
        config.vocabulary = str(folder / FILE)
    return config, format


def base_of(folder: Path) -> Path:
    """The folder of the model that an adapter is for. Raises ValueError where there is none."""
    name = str(read_settings(folder)["base_model_name_or_path"])
    try:
        return local_folder(name)
    except ValueError as error:
        raise ValueError(f"{folder} is an adapter for base_model_name_or_path={name}: {error}") from error


def config_of_adapter(folder: Path) -> GeneformerConfig:
    """The base's, with the task and as many classes as the adapter has. Raises ValueError for other bases."""
    config, kind = read_config(base_of(folder))
    if kind != "hf":
        raise ValueError(f"{folder} is an adapter for {base_of(folder)}, which is no model of plain transformers.")
    given, weights = read_settings(folder), open_weights(folder)
    task = next((task for task, name in TASK_TYPES.items() if name == given["task_type"]), "masked_lm")
    classes = None
    if (name := "base_model.model.classifier.weight") in weights:
        same = config.task == task and len(config.classes) == len(weights[name])
        classes = config.classes if same else [f"LABEL_{i}" for i in range(len(weights[name]))]
    config.task, config.classes = task, classes
    return config


def read_weights(folder: Path, config: GeneformerConfig, kind: str, strict: bool = True) -> Mapping[str, Tensor]:
    """Our weights of a folder, configuration and format as `read_config` has them; not `strict`: what there is.

    Raises ValueError as `to_native`, and for an adapter of other maps than those of layers.
    """
    if kind == "native":
        return open_weights(folder)
    if kind == "hf":
        return to_native(with_prefix(open_weights(folder)), config, strict)
    lora, adapters, heads = read_adapter(folder, "geneformer", QKV[config.norm].rstrip("."))
    weights, used = (
        with_prefix(open_weights(base_of(folder))),
        {n for names in sources(config).values() for n in names},
    )
    if unknown := heads.keys() - used - TIED.keys():
        raise ValueError(f"{folder} has {listed(unknown)}, which task_type={lora['task_type']} does not.")
    weights = {name: read(heads if name in heads else weights, name) for name in used | heads.keys()
               if name in heads or name in weights}  # fmt: skip
    native = to_native(LazyTensors(weights), config, strict)
    both = LazyTensors(native.makers | {name: read(adapters, name) for name in adapters})
    return merged(both, lora, config.num_attention_heads)


def save_adapter(state_dict: Mapping[str, Tensor], config: GeneformerConfig, base: str, folder: Path) -> None:
    """Write what LoRA has trained beside the model `base`, as peft does."""
    heads = {theirs: state_dict[ours] for ours, theirs in HEADS[config.task].items()
             if ours not in LM_HEAD and not ours.startswith(REGRESSION)}  # fmt: skip
    write_adapter(folder, state_dict, config.lora, "bert.encoder", heads, TASK_TYPES.get(config.task), base)


def task_of(folder: Path, given: dict) -> dict:
    """The task and classes that a configuration of `transformers` tells of."""
    for task in ("cells", "genes"):
        if any(str(name).endswith(ARCHITECTURES[task]) for name in given.get("architectures") or ()):
            names = given.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
            return {"task": task, "classes": [names[key] for key in sorted(names, key=int)]}
    return {"task": "length" if (folder / f"{REGRESSION}safetensors").exists() else "masked_lm"}


def hf_config(config: GeneformerConfig) -> BertConfig | MegatronBertConfig:
    """The config with which `AutoModelForMaskedLM` opens what `from_native` makes of a model."""
    _, make, name = MODELS[config.norm]
    more = {"architectures": [name + ARCHITECTURES[config.task]]}
    if config.classes:
        more |= {"id2label": dict(enumerate(config.classes)), "label2id": {c: i for i, c in enumerate(config.classes)}}
    return make(**{name: getattr(config, name) for name in FIELDS}, **more)


def save(state_dict: Mapping[str, Tensor], config: GeneformerConfig, format: str, folder: Path) -> None:
    """Write native weights as a folder in one of the two formats; `hf` is for plain `transformers`."""
    folder.mkdir(parents=True, exist_ok=True)
    (config if format == "native" else hf_config(config)).save_pretrained(folder)
    weights = state_dict if format == "native" else from_native(state_dict, config)
    found = {name: weights[name].contiguous() for name in weights}
    if format == "hf" and config.task == "length":  # which `transformers` has no class for
        save_file({name: found.pop(name) for name in [*found] if name.startswith(REGRESSION)},
                  folder / f"{REGRESSION}safetensors", {"format": "pt"})  # fmt: skip
    save_torch_state_dict(found, folder)


def convert(source: Path, target: Path, format: str) -> str:
    """Write a checkpoint folder in another format, and say how to open it. Raises ValueError for what is none."""
    config, kind = read_config(source)
    weights = read_weights(source, config, kind)
    with new_folder(target) as folder:
        save(weights, config, format, folder)
        if Path(config.vocabulary).is_file():
            shutil.copy(config.vocabulary, folder / FILE)
    opens = {"native": f"modeling_geneformer.{TASKS[config.task].__name__}",
             "hf": f"transformers.AutoModel{ARCHITECTURES[config.task]}"}[format]  # fmt: skip
    return f"{target} is written; open it: {opens}.from_pretrained({str(target)!r})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("native", "hf"), required=True)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    with command():
        print(convert(local_folder(arguments.source), arguments.target, arguments.to))


if __name__ == "__main__":
    main()
