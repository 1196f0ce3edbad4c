# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv:2106.09685): the weights stay as they are, and a product of two narrow matrices is trained beside them.

Shapes: N tokens, I inputs and O outputs of a linear map, r the rank, n adapters that read the same input; H heads. A
is [r, I] and B is [O, r], as in the package peft, whose files are read and written here. Queries, keys and values are
one map in our layers and three in peft's: three adapters of rank r, not one.
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.weights import LazyTensors, listed, open_weights, random_uniform, read
from tokens.layers import Kernels


# Each map of a layer that can be adapted: its name here, and the one below a layer of BERT or ESM in `transformers`.
MAPS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
QKV = ("query", "key", "value")
# The modules that have them here.
MODULES = {
    "self_attention.qkv": QKV,
    "self_attention.layernorm_qkv": QKV,
    "self_attention.proj": ("proj",),
    "layernorm_mlp": ("fc1", "fc2"),
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = re.compile(r"(.*)\.layer\.(\d+)\.(self_attention\.\w+|layernorm_mlp)\.matmul\.(\w+)\.lora_([AB])")
THEIRS = re.compile(r"base_model\.model\.(.*)\.layer\.(\d+)\.(.+)\.lora_([AB])\.weight")


def lora_settings(*, r: int, lora_alpha: float, lora_dropout: float, target_modules: list[str]) -> dict | None:
    """What a model's configuration keeps of the section `lora`; None where r is 0, and all weights train.

    `target_modules` are names of maps as peft takes them: whole, or their ends. Raises ValueError for others,
    and for numbers out of range.
    """
    if r < 0 or lora_alpha <= 0 or not 0 <= lora_dropout < 1:
        raise ValueError(
            f"lora.r={r} must be at least 0, lora.lora_alpha={lora_alpha} above 0, and "
            f"lora.lora_dropout={lora_dropout} at least 0 and below 1."
        )
    if not r:
        return None
    chosen = []
    for target in target_modules:
        found = [name for name, theirs in MAPS.items() if f".{theirs}".endswith(f".{target}")]
        if not found:
            raise ValueError(
                f"lora.target_modules: no linear layer is named {target}; there are query, key, value, "
                "attention.output.dense, intermediate.dense, output.dense (which is attention's too) and dense (all "
                "three)."
            )
        chosen += found
    if not chosen:
        raise ValueError("lora.target_modules is empty; name at least one, as query, or set lora.r=0.")
    return {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
            "target_modules": [name for name in MAPS if name in chosen]}  # fmt: skip


def check_start(r: int, init_from: str | None, init_from_partial: bool) -> None:
    """Raise ValueError where there are no weights that adapters belong to."""
    if not r:
        return
    if init_from is None:
        raise ValueError(f"lora.r={r} trains beside weights that are there: give init_from, or lora.r=0 to train all.")
    if is_adapter_folder(Path(init_from)):
        raise ValueError(
            f"lora.r={r}: init_from={init_from} is an adapter too; convert it and its base to one model first."
        )
    if init_from_partial:
        raise ValueError(f"lora.r={r} needs weights that fit as a whole; leave init_from_partial out, or lora.r=0.")


# ---- in a model


class Adapter(nn.Module):
    """Of one map: B A is what it adds to its weight, times lora_alpha / r."""

    def __init__(self, in_features: int, out_features: int, r: int):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))


def joined(adapters: Mapping[str, tuple[Tensor, Tensor]], num_heads: int) -> tuple[Tensor, Tensor]:
    """A [n r, I] and B [O, n r] of all that one map has; of queries, keys and values in the order of its rows."""
    a_RI = torch.cat([a for a, _ in adapters.values()])
    if not adapters.keys() & {*QKV}:
        ((_, b_OR),) = adapters.values()
        return a_RI, b_OR
    r, parts = len(a_RI) // len(adapters), []
    for name in QKV:  # q, k and v of the first head, then those of the second, ...
        if name in adapters:
            place = [*adapters].index(name)
            b_OR = F.pad(adapters[name][1], (place * r, len(a_RI) - (place + 1) * r))
        else:
            b_OR = a_RI.new_zeros(len(next(iter(adapters.values()))[1]), len(a_RI))
        parts.append(b_OR.unflatten(0, (num_heads, -1)))
    return a_RI, torch.stack(parts, dim=1).flatten(0, 2)


class Adapted(nn.Module):
    """The product of a module's input with its weight, and what adapters add to it: x W^T + s (x A^T) B^T.

    That keeps small changes in BF16, where W + s B A would round them away, and no gradient of W is computed. In
    `product` another precision can come in, for x W^T alone.
    """

    def __init__(self, owner: nn.Module, adapters: Mapping[str, Adapter], num_heads: int, lora: Mapping):
        super().__init__()
        self.product = getattr(owner, "matmul", None)  # TransformerEngine's modules have none
        self.owner = (owner,)  # a tuple: not a module of this one
        self.num_heads, self.scale, self.dropout = num_heads, lora["lora_alpha"] / lora["r"], lora["lora_dropout"]
        for name, adapter in adapters.items():
            self.add_module(name, adapter)

    def forward(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """[N, I] to [N, O]."""
        y_NO = self.product(x_NI, weight_OI, bias_O)
        names = [*self._modules]
        if names[0].startswith("fc"):  # one module with two maps
            name = next(name for name in ("fc1", "fc2") if weight_OI is getattr(self.owner[0], f"{name}_weight"))
            names = [name] if name in names else []
        return y_NO + self.added(x_NI, names) if names else y_NO

    def added(self, x_NI: Tensor, names: list[str]) -> Tensor:
        """[N, I] to [N, O]."""
        adapters = {name: (self._modules[name].lora_A, self._modules[name].lora_B) for name in names}
        a_RI, b_OR = joined(adapters, self.num_heads)
        x_NI = F.dropout(x_NI, self.dropout, self.training) if self.dropout else x_NI
        return F.linear(self.scale * F.linear(x_NI, a_RI), b_OR)


def add_after(module: nn.Module, args: tuple, output):
    """The same as a hook behind a module of TransformerEngine, which computes norm and product in one."""
    (x_NI, *_), (y_NO, *others) = args, output if isinstance(output, tuple) else (output,)
    if (weight := getattr(module, "layer_norm_weight", None)) is not None:
        bias = None if module.layer_norm_bias is None else module.layer_norm_bias.to(x_NI.dtype)
        x_NI = Kernels().layer_norm(x_NI, weight.to(x_NI.dtype), bias, module.eps)
    adapted = module.matmul
    y_NO = y_NO + adapted.added(x_NI, [*adapted._modules])
    return (y_NO, *others) if isinstance(output, tuple) else y_NO


def add_adapters(model: PreTrainedModel, lora: Mapping, backend: str) -> None:
    """Let `model` train adapters and the heads that its task adds to masked-language modelling, and nothing else.

    Raises ValueError for a rank above a map's width, and for maps that TransformerEngine has no room beside.
    """
    if backend == "te" and (inner := {"fc1", "fc2"} & {*lora["target_modules"]}):
        names = ", ".join(MAPS[name] for name in sorted(inner))
        raise ValueError(
            f"lora.target_modules: TransformerEngine's layers cannot adapt {names}; leave that out, or take "
            "layer_backend=torch."
        )
    fixed = (f"{model.base_model_prefix}.", "lm_head.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed))
    for name, module in [*model.named_modules()]:
        kind = next((kind for kind in MODULES if name.endswith(f".{kind}")), None)
        adapters = {}
        for part in MODULES.get(kind, ()):
            if part in lora["target_modules"]:
                weight_OI = getattr(module, f"{part}_weight" if part.startswith("fc") else "weight")
                out_features, in_features = weight_OI.shape
                out_features //= len(MODULES[kind]) if part in QKV else 1
                if lora["r"] > (most := min(out_features, in_features)):
                    raise ValueError(f"lora.r={lora['r']} must be at most {most}, the width of {MAPS[part]}.")
                adapters[part] = Adapter(in_features, out_features, lora["r"])
        if adapters:
            module.matmul = Adapted(module, adapters, model.config.num_attention_heads, lora)
            if backend == "te":
                module.register_forward_hook(add_after)


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of one."""
    return name.endswith((".lora_A", ".lora_B"))


def first_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A uniform as peft has it, and B 0: at first the model is what it was without."""
    return torch.zeros(shape) if name.endswith("B") else random_uniform(shape, shape[1] ** -0.5, seed, name)


def merged(weights: Mapping[str, Tensor], lora: Mapping, num_heads: int) -> LazyTensors:
    """Our weights of the same model without adapters: W + s B A."""
    adapters: dict[str, dict[str, str]] = {}
    for name in weights:
        if name.endswith(".lora_A"):
            module, part = name.removesuffix(".lora_A").split(".matmul.")
            weight = f"{module}.{part}_weight" if part.startswith("fc") else f"{module}.weight"
            adapters.setdefault(weight, {})[part] = name.removesuffix("A")

    def with_adapters(name: str) -> Tensor:
        pairs = {part: (weights[f"{one}A"], weights[f"{one}B"]) for part, one in adapters[name].items()}
        a_RI, b_OR = joined(pairs, num_heads)
        return weights[name] + lora["lora_alpha"] / lora["r"] * b_OR @ a_RI

    makers = {name: partial(with_adapters, name) if name in adapters else read(weights, name) for name in weights}
    return LazyTensors({name: maker for name, maker in makers.items() if not is_adapter(name)})


# ---- peft's files


def write_adapter(
    folder: Path, weights: Mapping[str, Tensor], lora: Mapping, layers: str, heads: Mapping[str, Tensor],
    task_type: str | None, base: str,
) -> None:  # fmt: skip
    """A folder that `peft.PeftModel.from_pretrained` puts upon the model `base`.

    `layers` is what the encoder's layers are below in plain `transformers`, as bert.encoder, and `heads` are what the
    task has trained in full, by their names there; `task_type` is peft's.
    """
    found = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in heads.items()}
    for name in filter(is_adapter, weights):
        _, layer, _, part, kind = OURS.fullmatch(name).groups()
        found[f"base_model.model.{layers}.layer.{layer}.{MAPS[part]}.lora_{kind}.weight"] = weights[name].contiguous()
    modules = {name.removeprefix(f"{layers.partition('.')[0]}.").partition(".")[0] for name in heads}
    targets = [part if part in QKV else MAPS[part] for part in lora["target_modules"]]
    config = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base, "inference_mode": True,
        "r": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": lora["lora_dropout"], "bias": "none",
        "target_modules": targets, "modules_to_save": sorted(modules) or None,
    }  # fmt: skip
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(found, folder / WEIGHTS, {"format": "pt"})


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is an adapter of peft, and no model by itself."""
    return (folder / CONFIG).exists()


def read_settings(folder: Path) -> dict:
    """What an adapter of peft says of itself. Raises ValueError for what is more than LoRA of one rank."""
    given = json.loads((folder / CONFIG).read_text())
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
             "alpha_pattern": {}, "lora_bias": False}  # fmt: skip
    for key, value in plain.items():
        if (given.get(key) or value) != value:
            raise ValueError(f"{folder / CONFIG} has {key}={given[key]!r}, and {value!r} alone is read.")
    return given


def read_adapter(folder: Path, prefix: str, qkv: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Settings, tensors by our names below the encoder `prefix`, and heads by those of plain `transformers`.

    `qkv` is the module of queries, keys and values. Raises ValueError as `read_settings`, and for other maps.
    """
    given, weights = read_settings(folder), open_weights(folder)
    scale = given["lora_alpha"] / (given["r"] ** 0.5 if given.get("use_rslora") else given["r"])
    module_of = {part: kind for kind, parts in MODULES.items() for part in parts if "qkv" not in kind or kind == qkv}
    parts, ours, heads, unknown = {theirs: part for part, theirs in MAPS.items()}, {}, {}, []
    for name in weights:
        found = THEIRS.fullmatch(name)
        if found and found[3] in parts:
            part = parts[found[3]]
            ours[f"{prefix}.layer.{found[2]}.{module_of[part]}.matmul.{part}.lora_{found[4]}"] = weights[name]
        elif "lora_" in name or not name.startswith("base_model.model."):
            unknown.append(name)
        else:
            heads[name.removeprefix("base_model.model.")] = weights[name]
    if unknown:
        raise ValueError(
            f"{folder} has {listed(unknown)}; only linear layers of transformer layers can be adapted here."
        )
    return {"r": given["r"], "lora_alpha": scale * given["r"], "task_type": given["task_type"],
            "base": given["base_model_name_or_path"]}, ours, heads  # fmt: skip
