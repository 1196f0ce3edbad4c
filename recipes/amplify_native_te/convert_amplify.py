# SPDX-License-Identifier: Apache-2.0
"""AMPLIFY checkpoints between the published format, `transformers.EuroBertForMaskedLM` and `AmplifyForMaskedLM`.

    python convert_amplify.py --to native chandar-lab/AMPLIFY_120M my_folder
    python convert_amplify.py --to eurobert my_folder my_hf_folder
    python convert_amplify.py --to amplify my_folder my_published_folder

A source is a local folder in any of the three formats, or a name on the Hugging Face hub.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import EuroBertConfig

from common.command import command, new_folder
from common.weights import LazyTensors, listed, local_folder, named_type, open_weights, read
from modeling_amplify import AmplifyConfig, swiglu_width


# native name: its names in the published format and in EuroBERT. Of layers, below `LAYERS[format].<i>.`; several names
# are q, k and v, or the two halves of SwiGLU's first map.
NAMES = {
    "amplify.embeddings.weight": ("encoder.weight", "model.embed_tokens.weight"),
    "amplify.norm.weight": ("layer_norm_2.weight", "model.norm.weight"),
    "decoder.weight": ("decoder.weight", "lm_head.weight"),
    "decoder.bias": ("decoder.bias", "lm_head.bias"),
}
LAYER_NAMES = {
    "self_attention.layernorm_qkv.layer_norm_weight": ("attention_norm.weight", "input_layernorm.weight"),
    "self_attention.proj.weight": ("wo.weight", "self_attn.o_proj.weight"),
    "layernorm_mlp.layer_norm_weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "layernorm_mlp.fc2_weight": ("ffn.w3.weight", "mlp.down_proj.weight"),
}
QKV, FC1 = "self_attention.layernorm_qkv.weight", "layernorm_mlp.fc1_weight"
FORMATS = ("amplify", "eurobert")
Q_K_V_NAMES = (
    ("q.weight", "k.weight", "v.weight"),
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
)
SWIGLU_NAMES = (("ffn.w12.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"))
ZERO_NAMES = ((), ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"))  # come with the head's bias
LAYERS = ("transformer_encoder", "model.layers")
# Fields that mean the same in our configuration and in the published one, and EuroBERT's.
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "initializer_range")
IDS = ("pad_token_id", "unk_token_id", "mask_token_id", "bos_token_id", "eos_token_id")


def halves(x_RC: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k as the published code pairs them (0 and 1, 2 and 3, ...), as we do: even ones, then odd ones."""
    return x_RC.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs(x_RC: Tensor, num_heads: int) -> Tensor:
    """The way back."""
    return x_RC.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def with_prefix(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names of a `EuroBertForMaskedLM` where those of an `EuroBertModel`, without a head, are given."""
    if any(name.startswith("model.") for name in state_dict):
        return state_dict
    return LazyTensors({f"model.{name}": read(state_dict, name) for name in state_dict})


def sources(config: AmplifyConfig, format: str) -> dict[str, tuple[str, ...]]:
    """The tensors in a format of FORMATS that each native tensor is made of."""
    at, found = FORMATS.index(format), {}
    layer = {native: (names[at],) for native, names in LAYER_NAMES.items()}
    layer |= {QKV: Q_K_V_NAMES[at], FC1: SWIGLU_NAMES[at]}
    for i in range(config.num_hidden_layers):
        for native, names in layer.items():
            found[f"amplify.layer.{i}.{native}"] = tuple(f"{LAYERS[at]}.{i}.{name}" for name in names)
    return {native: (names[at],) for native, names in NAMES.items()} | found


def zero_names(config: AmplifyConfig, format: str) -> list[str]:
    """The biases of a format that AMPLIFY does not have."""
    at = FORMATS.index(format)
    return [f"{LAYERS[at]}.{i}.{name}" for i in range(config.num_hidden_layers) for name in ZERO_NAMES[at]]


def to_native(
    state_dict: Mapping[str, Tensor], config: AmplifyConfig, format: str, strict: bool = True
) -> LazyTensors:
    """The native state dict for one in a format of FORMATS; not `strict`: what can be made of what there is.

    Raises ValueError for missing or unexpected names, and for biases that are not 0 where AMPLIFY has none.
    """
    heads, found = config.num_attention_heads, set(state_dict)
    expected, zeros = set(from_native({}, config, format)), zero_names(config, format)
    missing, unexpected = expected - found, found - expected
    if strict and (missing or unexpected):
        raise ValueError(
            f"This is no {format} of that size: missing {listed(missing)}; unexpected {listed(unexpected)}."
        )
    for name in zeros:
        if name in found and state_dict[name].any():
            raise ValueError(f"{name} is not 0, and AMPLIFY has no such bias.")

    def make(native: str, names: tuple[str, ...]) -> Tensor:
        parts = [state_dict[name] for name in names]
        if native.endswith(QKV):
            if format == "amplify":
                parts[:2] = [halves(x, heads) for x in parts[:2]]
            return torch.stack([x.unflatten(0, (heads, -1)) for x in parts], dim=1).flatten(0, 2)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    makers = {native: partial(make, native, names) for native, names in sources(config, format).items()}
    return LazyTensors({n: makers[n] for n, names in sources(config, format).items() if found.issuperset(names)})


def from_native(state_dict: Mapping[str, Tensor], config: AmplifyConfig, format: str) -> LazyTensors:
    """The way back."""
    heads = config.num_attention_heads

    def split(native: str, index: int, number: int) -> Tensor:
        if native.endswith(QKV):
            x = state_dict[native].unflatten(0, (heads, 3, -1))[:, index].flatten(0, 1)
            return pairs(x, heads) if format == "amplify" and index < 2 else x
        return state_dict[native].chunk(number)[index].clone() if number > 1 else state_dict[native]

    def zeros(name: str) -> Tensor:
        return torch.zeros(config.hidden_size if "down" in name else config.intermediate_size)

    makers = {}
    for native, names in sources(config, format).items():
        makers |= {name: partial(split, native, i, len(names)) for i, name in enumerate(names)}
    return LazyTensors(makers | {name: partial(zeros, name) for name in zero_names(config, format)})


def read_config(folder: Path) -> tuple[AmplifyConfig, str]:
    """The native configuration of a checkpoint folder, and its format. Raises ValueError for what AMPLIFY is not."""
    kind = named_type(folder)
    given = json.loads((folder / "config.json").read_text())
    if kind == AmplifyConfig.model_type:
        return AmplifyConfig.from_pretrained(folder), "native"
    if kind == "AMPLIFY":
        needed = {"hidden_act": "SwiGLU", "rms_norm": True, "att_bias": False, "ffn_bias": False,
                  "layer_norm_after_embedding": False, "layer_norm_before_last_layer": True}  # fmt: skip
        own = {"rms_norm_eps": given.get("norm_eps", 1e-5), "max_position_embeddings": given.get("max_length", 2048),
               "intermediate_size": swiglu_width(given["intermediate_size"])}  # fmt: skip
    elif kind == "eurobert":
        needed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": True, "tie_word_embeddings": False,
                  "num_key_value_heads": given.get("num_attention_heads")}  # fmt: skip
        rope = given.get("rope_parameters") or {}
        own = {name: given[name] for name in ("intermediate_size", "rms_norm_eps", "max_position_embeddings")}
        own["rope_theta"] = float(rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type is {rope['rope_type']!r}, but AMPLIFY needs 'default'.")
    else:
        raise ValueError(f"its model_type is {kind}, not AMPLIFY, eurobert or {AmplifyConfig.model_type}.")
    for name, value in needed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} is {given[name]!r}, but AMPLIFY needs {value!r}.")
    shared = {name: given[name] for name in (*FIELDS, *IDS) if name in given}
    return AmplifyConfig(**shared, **own), kind.lower()


def eurobert_config(config: AmplifyConfig) -> EuroBertConfig:
    """The config with which `AutoModelForMaskedLM` opens what `from_native` makes of a model."""
    return EuroBertConfig(
        **{name: getattr(config, name) for name in (*FIELDS, *IDS)},
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        mlp_bias=True,  # also the bias of lm_head; those of the layers are 0
        architectures=["EuroBertForMaskedLM"],
    )


def published_config(config: AmplifyConfig) -> dict:
    """What the published code's `config.json` says of the model. Raises ValueError for a width that it cannot have."""
    intermediate = next(
        (n for n in (4 * config.hidden_size, *range(config.intermediate_size, 2 * config.intermediate_size + 8))
         if swiglu_width(n) == config.intermediate_size), None,
    )  # fmt: skip
    if intermediate is None:
        raise ValueError(f"intermediate_size {config.intermediate_size} must divide by 8 in the published format.")
    if config.rope_theta != 10000.0:
        raise ValueError(f"rope_theta {config.rope_theta} must be 10000 in the published format.")
    return {
        "architectures": ["AMPLIFY"], "model_type": "AMPLIFY", "hidden_act": "SwiGLU", "rms_norm": True,
        "att_bias": False, "ffn_bias": False, "dropout_prob": 0, "embedding_init_range": config.initializer_range,
        "decoder_init_range": config.initializer_range, "layer_norm_after_embedding": False,
        "layer_norm_before_last_layer": True, "intermediate_size": intermediate, "norm_eps": config.rms_norm_eps,
        "max_length": config.max_position_embeddings,
        **{name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                                     "vocab_size", *IDS)},
    }  # fmt: skip


def save(state_dict: Mapping[str, Tensor], config: AmplifyConfig, format: str, folder: Path) -> None:
    """Write native weights as a folder in one of the three formats; EuroBERT's is for plain `transformers`."""
    folder.mkdir(parents=True, exist_ok=True)
    if format == "amplify":
        (folder / "config.json").write_text(json.dumps(published_config(config), indent=2) + "\n")
    else:
        (config if format == "native" else eurobert_config(config)).save_pretrained(folder)
    weights = state_dict if format == "native" else from_native(state_dict, config, format)
    save_torch_state_dict({name: weights[name].contiguous() for name in weights}, folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("native", *FORMATS), required=True)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    with command():
        print(convert(local_folder(arguments.source), arguments.target, arguments.to))


def convert(source: Path, target: Path, format: str) -> str:
    """Write a checkpoint folder in another format, and say what comes next. Raises ValueError if it is no AMPLIFY."""
    config, kind = read_config(source)
    weights = open_weights(source)
    weights = weights if kind == "native" else to_native(weights, config, kind)
    with new_folder(target) as folder:
        save(weights, config, format, folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / name).exists():
                shutil.copy(source / name, folder)
    opens = {"native": "modeling_amplify.AmplifyForMaskedLM", "eurobert": "transformers.AutoModelForMaskedLM"}
    way = f"; open it: {opens[format]}.from_pretrained({str(target)!r})" if format in opens else ""
    return f"{target} is written{way}"


if __name__ == "__main__":
    main()
