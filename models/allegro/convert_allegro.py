# SPDX-License-Identifier: Apache-2.0
"""Weights of the package `nequip-allegro` (0.8) to ours and back.

    python convert_allegro.py --to-native best.ckpt my_folder        # of nequip-train, or a *.nequip.zip
    python convert_allegro.py --to-allegro my_folder my_file.pt

`my_folder` has config.json, model.safetensors and calculator.py, as a final model; `my_file.pt` their section `model`
and their state dict.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
from collections.abc import Mapping

import torch
from torch import Tensor

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
from modeling_allegro import Allegro, AllegroConfig


ARGUMENTS = {
    "l_max": "l_max", "parity": "parity", "num_layers": "num_layers", "num_scalar_features": "num_scalars",
    "num_tensor_features": "num_tensors", "radial_chemical_embed_dim": "radial_features",
    "scalar_embed_mlp_hidden_layers_depth": "embedding_depth",
    "scalar_embed_mlp_hidden_layers_width": "embedding_width",
    "allegro_mlp_hidden_layers_depth": "mlp_depth", "allegro_mlp_hidden_layers_width": "mlp_width",
    "readout_mlp_hidden_layers_depth": "readout_depth", "readout_mlp_hidden_layers_width": "readout_width",
    "tp_path_channel_coupling": "coupled_paths",
}  # fmt: skip
RADIAL = {
    "num_bessels": "num_bessels", "bessel_trainable": "train_bessels", "polynomial_cutoff_p": "cutoff_power",
    "num_splines": "num_splines", "spline_span": "spline_span",
}  # fmt: skip
DEPTHS = {"scalar_embed": 1, "allegro": 1, "readout": 1}  # of their networks, unless they are given


def names(config: AllegroConfig) -> dict[str, str]:
    """Tensors of both sides, theirs to ours; some need `rearranged` besides."""
    embed, found = "radial_chemical_embed", {}
    if config.radial == "bessel":
        found |= {f"{embed}.type_embed.{side}_embed.weight": f"{ours}_elements"
                  for side, ours in (("center", "centre"), ("neighbor", "neighbor"))}  # fmt: skip
        found |= mlp_names(f"{embed}.type_embed.basis_linear", "bessel_mlp", 0)
    else:
        found[f"{embed}.spline.class_embed.weight"] = "spline.weight"
    found |= mlp_names("scalar_embed_mlp.mlp_module", "embedding_mlp", config.embedding_depth)
    found |= mlp_names("tensor_embed.env_embed_linear", "tensor_mlp", 0)
    found |= mlp_names("allegro.first_layer_env_embed_projection", "environment_mlp", 0)
    for i in range(config.num_layers):
        found[f"allegro.tps.{i}.weights"] = f"products.{i}.weight"
        found |= mlp_names(f"allegro.latents.{i}", f"latent_mlps.{i}", config.mlp_depth)
    return found | mlp_names("edge_readout.mlp_module", "readout", config.readout_depth)


def num_leading(name: str, config: AllegroConfig) -> int | None:
    """How many columns come before weights of tensors by l and channel; None where there are no such weights."""
    if name == "tensor_mlp.weights.0":
        return 0
    latents = [f"latent_mlps.{i}.weights.{config.mlp_depth}" for i in range(config.num_layers - 1)]
    return config.num_scalars if name in ("environment_mlp.weights.0", *latents) else None


def rearranged(name: str, value: Tensor, config: AllegroConfig, back: bool = False) -> Tensor:
    """Channels come before l in their columns, and after it in ours."""
    lead = num_leading(name, config)
    if lead is None:
        return value
    u, l = config.num_tensors, config.l_max + 1  # noqa: E741
    shape = (l, u) if back else (u, l)
    columns = value[:, lead:].view(len(value), *shape).transpose(1, 2).flatten(1)
    return torch.cat([value[:, :lead], columns], 1)


def config_from_allegro(arguments: Mapping, state: Mapping[str, Tensor]) -> AllegroConfig:
    """Our configuration for their model. Raises ValueError for one that is not as ours can be."""
    arguments = only_silu(arguments, DEPTHS)
    embed = dict(arguments.pop("radial_chemical_embed"))
    radial = "spline" if embed.pop("_target_").endswith("TwoBodySplineScalarEmbed") else "bessel"
    found = common_config(arguments, stripped(state), ARGUMENTS)
    return AllegroConfig(**found, radial=radial, **{RADIAL[key]: value for key, value in embed.items()})


def allegro_arguments(config: AllegroConfig) -> dict:
    """The section `model` of their YAML for this model of ours."""
    kind = "Spline" if config.radial == "spline" else "Bessel"
    keys = list(RADIAL)[3:] if config.radial == "spline" else list(RADIAL)[:3]
    embed = {"_target_": f"allegro.nn.TwoBody{kind}ScalarEmbed"} | {key: getattr(config, RADIAL[key]) for key in keys}
    found = {theirs: getattr(config, ours) for theirs, ours in ARGUMENTS.items()}
    found |= {"_target_": "allegro.model.AllegroModel", "radial_chemical_embed": embed}
    return common_arguments(config) | found


def allegro_to_native(state: Mapping[str, Tensor], config: AllegroConfig) -> dict[str, Tensor]:
    """Our weights. Raises ValueError where theirs have another size."""
    state, found = stripped(state), {}
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in Allegro(config).state_dict().items()}
    for theirs, ours in names(config).items():
        value = state[theirs]
        if value.numel() != wanted[ours].numel():
            raise ValueError(
                f"These weights do not fit: {theirs} has {value.numel()} numbers, not {wanted[ours].numel()}."
            )
        value = value.reshape(wanted[ours])
        found[ours] = rearranged(ours, value, config)
    if "bessel.moved" in wanted:
        values = state["radial_chemical_embed.bessel_encode.bessel_weights"].flatten().double()
        found["bessel.moved"] = values - torch.arange(1.0, len(values) + 1, dtype=torch.float64)
    found = {name: value.to(config.torch_dtype).contiguous() for name, value in found.items()} | zeros_added(config)
    fit_or_refuse(found, wanted)
    return found


def native_to_allegro(weights: Mapping[str, Tensor], config: AllegroConfig) -> dict[str, Tensor]:
    """Their weights and numbers; tables that are the same in each model of theirs are left out."""
    found = {theirs: rearranged(ours, weights[ours], config, back=True) for theirs, ours in names(config).items()}
    for name in [name for name in found if ".tps." in name]:
        paths = found[name].shape[1]
        shape = (config.num_tensors,) * config.coupled_paths + (paths,) * (paths > 1)
        found[name] = found[name].reshape(shape)
    if config.radial == "spline":
        name = "radial_chemical_embed.spline.class_embed.weight"
        found[name] = found[name].flatten(1).double()  # theirs are always float64
    else:
        numbers = torch.arange(1.0, config.num_bessels + 1, dtype=torch.float64)
        if config.train_bessels:
            numbers = numbers + weights["bessel.moved"].double()
        found["radial_chemical_embed.bessel_encode.bessel_weights"] = numbers.view(1, -1)
    found |= common_weights(weights, config)
    return {f"model.func.{name}": value for name, value in found.items()}


if __name__ == "__main__":
    converter(
        "allegro", __doc__, AllegroConfig, Allegro, config_from_allegro, allegro_to_native, allegro_arguments,
        native_to_allegro,
    )  # fmt: skip
