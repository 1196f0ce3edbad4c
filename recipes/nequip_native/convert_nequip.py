# SPDX-License-Identifier: Apache-2.0
"""Weights of the package `nequip` (0.19) to ours and back.

Theirs are flat, one block after the other for each irrep; ours have a name for each. What they keep although it can
reach no energy is left out here and comes back as zeros.

    python convert_nequip.py --to-native best.ckpt my_folder        # of nequip-train, or a *.nequip.zip
    python convert_nequip.py --to-nequip my_folder my_file.pt

`my_folder` has config.json, model.safetensors and calculator.py, as a final model; `my_file.pt` their section `model`
and their state dict.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from atoms.irreps import SCALAR, harmonics
from atoms.package_files import converter
from atoms.packages import (
    common_arguments,
    common_config,
    common_weights,
    fit_or_refuse,
    mlp_names,
    only_silu,
    stripped,
    zeros_added,
)
from modeling_nequip import SIZES, NequIP, NequIPConfig, layer_irreps


ARGUMENTS = {
    "num_layers": "num_layers", "parity": "parity", "type_embed_num_features": "num_element_features",
    "radial_mlp_depth": "radial_depth", "radial_mlp_width": "radial_width", "num_bessels": "num_bessels",
    "bessel_trainable": "train_bessels", "polynomial_cutoff_p": "cutoff_power",
    "readout_mlp_hidden_layers_depth": "readout_depth", "readout_mlp_hidden_layers_width": "readout_width",
}  # fmt: skip


class Block(NamedTuple):
    """A piece of one of their tensors: from `start` on in its last dimension; `columns` of it are ours (None: all)."""

    theirs: str
    start: int
    shape: tuple[int, ...]
    ours: str | None
    columns: list[int] | None = None


def blocks(config: NequIPConfig) -> Iterator[Block]:
    """All pieces of their irreps-wise weights, in their order."""
    edge, full, pruned = harmonics(config.l_max), layer_irreps(config, pruned=False), layer_irreps(config)
    for i in range(config.num_layers):
        theirs, ours, embedded = f"layer{i}_convnet.conv", f"layers.{i}", config.num_element_features
        before, after, kept = full[i], full[i + 1], pruned[i + 1]
        gates = [(ir, number) for ir, number in after.items() if ir.l]
        mixed = after | {SCALAR: after[SCALAR] + sum(number for _, number in gates)}
        gate_kept = [True] * after[SCALAR] + [ir in kept for ir, number in gates for _ in range(number)]
        columns = {SCALAR: [column for column, keep in enumerate(gate_kept) if keep]}
        start = 0
        for ir, number in before.items():
            name = f"{ours}.linear_1.weights.{ir.name}" if ir in pruned[i] else None
            yield Block(f"{theirs}.linear_1.weight", start, (number, number), name)
            start += number * number
        start, summed, width = 0, {}, config.radial_width if config.radial_depth else config.num_bessels
        last = f"{theirs}.edge_mlp.mlp.{2 * config.radial_depth}.weight"
        for ir, number in before.items():
            for out in (out for e in edge for out in ir.times(e) if out in mixed):
                summed[out] = summed.get(out, 0) + number
                used = ir in pruned[i] and (out in kept or out == SCALAR)
                name = f"{ours}.radial_mlp.weights.{config.radial_depth}" if used else None
                yield Block(last, start, (width, number), name)
                start += number
        start = 0
        for ir in sorted(summed):
            name = f"{ours}.linear_2.weights.{ir.name}" if ir in kept else None
            shape = (summed[ir], mixed[ir])
            yield Block(f"{theirs}.linear_2.weight", start, shape, name, columns.get(ir))
            start += shape[0] * shape[1]
        start = 0
        for ir, number in before.items() if i else ():
            if ir in mixed:
                name = f"{ours}.own.weights.{ir.name}" if ir in kept and ir in pruned[i] else None
                shape = (number, embedded, mixed[ir])
                yield Block(f"{theirs}.sc.weight", start, shape, name, columns.get(ir))
                start += shape[0] * shape[1] * shape[2]


def plain_names(config: NequIPConfig) -> dict[str, str]:
    """Tensors that are the same on both sides, theirs to ours."""
    found = {"type_embed.embed_module.weight": "elements"}
    for i in range(config.num_layers):
        names = mlp_names(f"layer{i}_convnet.conv.edge_mlp", f"layers.{i}.radial_mlp", config.radial_depth)
        found |= dict(list(names.items())[:-1])  # the last is made of blocks
    return found | mlp_names("per_atom_energy_readout.mlp_module", "readout", config.readout_depth)


def config_from_nequip(arguments: Mapping, state: Mapping[str, Tensor]) -> NequIPConfig:
    """Our configuration for their model. Raises ValueError for one that is not as ours can be."""
    arguments = only_silu(arguments, {"readout": 0})
    preset = SIZES.get(f"nequip_{str(arguments.get('preset')).upper()}", {})
    if preset:
        arguments = {"parity": False, "type_embed_num_features": 32, **arguments}
    features = arguments.pop("num_features", preset.get("num_features", 32))
    l_max = arguments.pop("l_max", len(preset.get("num_features", [0, 0])) - 1)
    features = [features] * (l_max + 1) if isinstance(features, int) else list(features)
    if len(features) != l_max + 1:
        raise ValueError(f"num_features={features} must be {l_max + 1} numbers, for l = 0 .. l_max={l_max}.")
    found = common_config(arguments, stripped(state), ARGUMENTS)
    defaults = {"num_layers": 4, "parity": True, "num_element_features": features[0]}
    if preset:
        defaults["num_layers"] = preset["num_layers"]
    return NequIPConfig(**{**defaults, **found}, num_features=features)


def nequip_arguments(config: NequIPConfig) -> dict:
    """The section `model` of their YAML for this model of ours."""
    found = {theirs: getattr(config, ours) for theirs, ours in ARGUMENTS.items()}
    found |= {"l_max": config.l_max, "num_features": config.num_features}
    return {"_target_": "nequip.model.NequIPGNNModel", **common_arguments(config), **found}


def nequip_to_native(state: Mapping[str, Tensor], config: NequIPConfig) -> dict[str, Tensor]:
    """Our weights. Raises ValueError where theirs have another size."""
    state = stripped(state)
    found = {ours: state[theirs] for theirs, ours in plain_names(config).items()}
    pieces: dict[str, list[Tensor]] = {}
    for block in blocks(config):
        if block.ours is None:
            continue
        whole = state[block.theirs]
        if whole.dim() == 2:
            piece = whole[:, block.start : block.start + block.shape[1]]
        else:
            count = torch.Size(block.shape).numel()
            piece = whole[block.start : block.start + count]
            if piece.numel() < count:
                raise ValueError(f"These weights do not fit: {block.theirs} has {whole.numel()} numbers, too few.")
            piece = piece.view(block.shape)
        pieces.setdefault(block.ours, []).append(piece if block.columns is None else piece[..., block.columns])
    found |= {name: torch.cat(parts, 1) if len(parts) > 1 else parts[0] for name, parts in pieces.items()}
    if config.train_bessels:
        values = state["bessel_encode.bessel_weights"].flatten().double()
        found["bessel.moved"] = values - torch.arange(1.0, len(values) + 1, dtype=torch.float64)
    found = {name: value.to(config.torch_dtype).contiguous() for name, value in found.items()} | zeros_added(config)
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in NequIP(config).state_dict().items()}
    fit_or_refuse(found, wanted)
    return found


def native_to_nequip(weights: Mapping[str, Tensor], config: NequIPConfig) -> dict[str, Tensor]:
    """Their weights and numbers; tables that are the same in each model of theirs are left out."""
    found = {theirs: weights[ours] for theirs, ours in plain_names(config).items()}
    flat: dict[str, list[Tensor]] = {}
    used: dict[str, int] = {}
    for block in blocks(config):
        piece = torch.zeros(block.shape, dtype=config.torch_dtype)
        if block.ours is not None:
            whole = weights[block.ours]
            if ".radial_mlp." in block.ours:
                start = used.get(block.ours, 0)
                used[block.ours] = start + block.shape[1]
                whole = whole[:, start : start + block.shape[1]]
            piece[..., slice(None) if block.columns is None else block.columns] = whole
        flat.setdefault(block.theirs, []).append(piece if ".edge_mlp." in block.theirs else piece.flatten())
    found |= {name: torch.cat(pieces, -1) for name, pieces in flat.items()}
    numbers = torch.arange(1.0, config.num_bessels + 1, dtype=torch.float64)
    if config.train_bessels:
        numbers = numbers + weights["bessel.moved"].double()
    found["bessel_encode.bessel_weights"] = numbers.view(1, -1)
    found |= common_weights(weights, config)
    return {f"model.func.{name}": value for name, value in found.items()}


if __name__ == "__main__":
    converter(
        "nequip", __doc__, NequIPConfig, NequIP, config_from_nequip, nequip_to_native, nequip_arguments,
        native_to_nequip,
    )  # fmt: skip
