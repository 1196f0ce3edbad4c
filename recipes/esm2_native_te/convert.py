# SPDX-License-Identifier: Apache-2.0
"""ESM-2 checkpoints between `transformers.EsmForMaskedLM` (hf) and `Esm2ForMaskedLM` (native), exactly, both ways.

    python convert.py --to-native facebook/esm2_t6_8M_UR50D my_folder
    python convert.py --to-hf my_folder my_hf_folder

A source is a local folder or a name on the Hugging Face hub.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import EsmConfig

from common.command import command, new_folder
from common.weights import LazyTensors, listed, local_folder, named_type, open_weights, read
from modeling_esm2 import Esm2Config, rope_inv_freq


EMBEDDING = "esm.embeddings.word_embeddings.weight"
DECODER = "lm_head.decoder.weight"
INV_FREQ = "esm.rotary_embeddings.inv_freq"
SAME_NAMES = (
    "esm.encoder.emb_layer_norm_after.weight",
    "esm.encoder.emb_layer_norm_after.bias",
    "esm.contact_head.regression.weight",
    "esm.contact_head.regression.bias",
    "lm_head.bias",
    "lm_head.dense.weight",
    "lm_head.dense.bias",
    "lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias",
)
# native name: hf name; both below `esm.encoder.layer.<i>.`
LAYER_NAMES = {
    "self_attention.layernorm_qkv.layer_norm_weight": "attention.LayerNorm.weight",
    "self_attention.layernorm_qkv.layer_norm_bias": "attention.LayerNorm.bias",
    "self_attention.proj.weight": "attention.output.dense.weight",
    "self_attention.proj.bias": "attention.output.dense.bias",
    "layernorm_mlp.layer_norm_weight": "LayerNorm.weight",
    "layernorm_mlp.layer_norm_bias": "LayerNorm.bias",
    "layernorm_mlp.fc1_weight": "intermediate.dense.weight",
    "layernorm_mlp.fc1_bias": "intermediate.dense.bias",
    "layernorm_mlp.fc2_weight": "output.dense.weight",
    "layernorm_mlp.fc2_bias": "output.dense.bias",
}
QKV_NAME = "self_attention.layernorm_qkv"
Q_K_V_NAMES = ("attention.self.query", "attention.self.key", "attention.self.value")
# Not copied: rotary frequencies, which the config describes, and the positions in old checkpoints, which ESM-2 does
# not use.
DERIVED_NAMES = re.compile(r".*\brotary_embeddings\.inv_freq|esm\.embeddings\.position_(ids|embeddings\.weight)")
# Fields that mean the same in both configs.
CONFIG_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "rope_theta",
    "token_dropout",
    "hidden_dropout_prob",
    "pad_token_id",
    "eos_token_id",
    "mask_token_id",
    "initializer_range",
)


def layer_prefixes(config: Esm2Config) -> list[str]:
    """What the names of a layer's tensors begin with, the same on both sides."""
    return [f"esm.encoder.layer.{i}." for i in range(config.num_hidden_layers)]


def sources(config: Esm2Config) -> dict[str, tuple[str, ...]]:
    """Of each native tensor, the names of the hf tensors that it is made of."""
    found = {name: (name,) for name in (EMBEDDING, *SAME_NAMES)}
    for layer in layer_prefixes(config):
        found |= {layer + native: (layer + hf,) for native, hf in LAYER_NAMES.items()}
        for kind in ("weight", "bias"):
            found[f"{layer}{QKV_NAME}.{kind}"] = tuple(f"{layer}{name}.{kind}" for name in Q_K_V_NAMES)
    return found


def with_prefix(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """As an `EsmForMaskedLM` names it, also where it is that of an `EsmModel`, the encoder alone."""
    if EMBEDDING.removeprefix("esm.") not in state_dict:
        return state_dict
    return LazyTensors({f"esm.{name}": read(state_dict, name) for name in state_dict})


def hf_to_native(state_dict: Mapping[str, Tensor], config: Esm2Config, strict: bool = True) -> LazyTensors:
    """The native state dict for that of an `EsmForMaskedLM`; not `strict`: what can be made of what there is.

    Raises ValueError for missing or unexpected names, a decoder that is not the embedding, and rotary frequencies that
    `config` does not describe.
    """
    names = {name for name in state_dict if not DERIVED_NAMES.fullmatch(name)}
    expected = native_to_hf({}, config).keys() - {INV_FREQ}
    missing, unexpected = expected - {DECODER} - names, names - expected
    if strict and (missing or unexpected):
        raise ValueError(
            f"This is no EsmForMaskedLM of that size: missing {listed(missing)}; unexpected {listed(unexpected)}."
        )
    if strict and DECODER in names and not torch.equal(state_dict[DECODER], state_dict[EMBEDDING]):
        raise ValueError(f"{DECODER} differs from {EMBEDDING}, but the native model has one matrix for both.")
    if stored_inv_freq_dtype(state_dict, config) not in (None, config.rope_inv_freq_dtype):
        raise ValueError(
            f"rope_inv_freq_dtype {config.rope_inv_freq_dtype} is not how the checkpoint's rotary frequencies are "
            f"rounded; it must be {stored_inv_freq_dtype(state_dict, config)}."
        )

    def pad_vocabulary() -> Tensor:
        embedding_VE = state_dict[EMBEDDING]
        embedding_PE = embedding_VE.new_zeros(config.padded_vocab_size, config.hidden_size)
        embedding_PE[: config.vocab_size] = embedding_VE
        return embedding_PE

    def fuse_qkv(layer: str, kind: str) -> Tensor:
        q_k_v = [state_dict[f"{layer}{name}.{kind}"] for name in Q_K_V_NAMES]
        return torch.stack([x.unflatten(0, (config.num_attention_heads, -1)) for x in q_k_v], dim=1).flatten(0, 2)

    makers = {EMBEDDING: pad_vocabulary} | {name: read(state_dict, name) for name in SAME_NAMES}
    for layer in layer_prefixes(config):
        makers |= {f"{layer}{QKV_NAME}.{kind}": partial(fuse_qkv, layer, kind) for kind in ("weight", "bias")}
        makers |= {layer + native: read(state_dict, layer + hf) for native, hf in LAYER_NAMES.items()}
    return LazyTensors({name: makers[name] for name, some in sources(config).items() if names.issuperset(some)})


def native_to_hf(state_dict: Mapping[str, Tensor], config: Esm2Config) -> LazyTensors:
    """The state dict of an `EsmForMaskedLM`, tied decoder and rotary frequencies included, for a native one."""

    def cut_vocabulary() -> Tensor:
        return state_dict[EMBEDDING][: config.vocab_size].clone()

    def split_qkv(name: str, index: int) -> Tensor:
        return state_dict[name].unflatten(0, (config.num_attention_heads, 3, -1))[:, index].flatten(0, 1)

    makers = {EMBEDDING: cut_vocabulary, DECODER: cut_vocabulary}
    makers |= {INV_FREQ: partial(rope_inv_freq, config, config.rope_inv_freq_dtype)}
    makers |= {name: read(state_dict, name) for name in SAME_NAMES}
    for layer in layer_prefixes(config):
        makers |= {layer + hf: read(state_dict, layer + native) for native, hf in LAYER_NAMES.items()}
        for index, hf in enumerate(Q_K_V_NAMES):
            for kind in ("weight", "bias"):
                makers[f"{layer}{hf}.{kind}"] = partial(split_qkv, f"{layer}{QKV_NAME}.{kind}", index)
    return LazyTensors(makers)


def stored_inv_freq_dtype(state_dict: Mapping[str, Tensor], config: Esm2Config) -> str | None:
    """The dtype that the checkpoint's rotary frequencies were rounded to; None if it has none.

    ESM-2 was trained with float16 frequencies, and the published checkpoints keep them (huggingface/transformers pull
    request 19587). They are up to 0.05% off: at position 1,000 up to half a radian.

    Raises ValueError for frequencies that do not follow from `config.rope_theta`.
    """
    name = next((name for name in state_dict if name.endswith("rotary_embeddings.inv_freq")), None)
    if name is None:
        return None
    stored = state_dict[name].float()
    for dtype in ("float32", "float16", "bfloat16"):
        expected = rope_inv_freq(config, dtype)
        if stored.shape == expected.shape and torch.allclose(stored, expected, rtol=1e-6, atol=0):
            return dtype
    raise ValueError(f"{name} does not follow from rope_theta {config.rope_theta}.")


def native_config(config: EsmConfig, state_dict: Mapping[str, Tensor] | None = None) -> Esm2Config:
    """The native config for an `EsmConfig`; the weights, if given, tell how rotary frequencies were rounded.

    Raises ValueError where the config is not ESM-2's.
    """
    required = {"position_embedding_type": "rotary", "is_decoder": False, "is_folding_model": False}
    for name, value in required.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)!r}, but ESM-2 needs {value!r}.")
    if config.emb_layer_norm_before:
        raise ValueError("emb_layer_norm_before is True: this is an ESM-1 model, and ESM-2 has no such norm.")
    native = Esm2Config(
        **{name: getattr(config, name) for name in CONFIG_FIELDS},
        padded_vocab_size=64 * -(-config.vocab_size // 64),
    )
    if state_dict is not None:
        native.rope_inv_freq_dtype = stored_inv_freq_dtype(state_dict, native) or "float32"
    return native


def hf_config(config: Esm2Config) -> EsmConfig:
    """The config with which `AutoModelForMaskedLM` opens what `native_to_hf` makes."""
    return EsmConfig(
        **{name: getattr(config, name) for name in CONFIG_FIELDS},
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        attention_probs_dropout_prob=0.0,
        architectures=["EsmForMaskedLM"],
    )


def save_hf(state_dict: Mapping[str, Tensor], config: Esm2Config, folder: Path) -> None:
    """Write native weights as a folder for `AutoModelForMaskedLM.from_pretrained`."""
    hf_config(config).save_pretrained(folder)
    # The tied decoder is left out, as transformers does.
    save_torch_state_dict({name: x for name, x in native_to_hf(state_dict, config).items() if name != DECODER}, folder)


def save_native(state_dict: Mapping[str, Tensor], config: Esm2Config, folder: Path) -> None:
    """Write native weights as a folder for `Esm2ForMaskedLM.from_pretrained`."""
    config.save_pretrained(folder)
    save_torch_state_dict(dict(state_dict), folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to-hf", nargs=2, metavar=("SRC", "DST"))
    direction.add_argument("--to-native", nargs=2, metavar=("SRC", "DST"))
    arguments = parser.parse_args()
    with command():
        print(convert(*(arguments.to_hf or arguments.to_native), bool(arguments.to_hf)))


def convert(source: str, destination: str, to_hf: bool) -> str:
    """Write one form of a model as the other, and say what comes next. Raises ValueError for one of another form."""
    source, destination = local_folder(source), Path(destination)
    kind, wanted = named_type(source), Esm2Config.model_type if to_hf else "esm"
    if kind != wanted:
        raise ValueError(f"{source}: its model_type is {kind}, not {wanted}; the other direction may be meant.")
    weights = open_weights(source)
    config = Esm2Config.from_pretrained(source) if to_hf else native_config(EsmConfig.from_pretrained(source), weights)
    with new_folder(destination) as folder:
        if to_hf:
            save_hf(weights, config, folder)
        else:
            save_native(hf_to_native(weights, config), config, folder)
        for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / name).exists():
                shutil.copy(source / name, folder)
    opens = "transformers.AutoModelForMaskedLM" if to_hf else "modeling_esm2.Esm2ForMaskedLM"
    return f"{destination} is written; open it: {opens}.from_pretrained({str(destination)!r})"


if __name__ == "__main__":
    main()
