# SPDX-License-Identifier: Apache-2.0
"""Build NequIP or Allegro from the name of a size, the keys of `model_kwargs`, and statistics of the data."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

import modeling_allegro
import modeling_nequip
from atoms.compiled import CompiledDerivatives
from atoms.elements import SYMBOLS
from atoms.first_weights import init_parameters
from atoms.kernels import products
from atoms.losses import loss_terms
from atoms.neighbours import Cutoffs
from atoms.potential import Potential, PotentialConfig
from common.batch import Batch
from common.command import one_line
from common.distributed import Distributed
from common.precision import Precision
from common.weights import copy_parameters
from dataset import open_validation
from metrics import Recorded
from pretrained import KINDS, MEASURED, architecture_of, continued, named_cutoffs, open_pretrained


SIZES = modeling_nequip.SIZES | modeling_allegro.SIZES
# Keys that mean something with one kind of functions of the distance only.
BY_RADIAL = {"bessel": ("num_bessels", "train_bessels", "cutoff_power"), "spline": ("num_splines", "spline_span")}


@dataclass
class Wanted:
    """What the configuration says of the model, before the data is known."""

    kind: str  # nequip or allegro
    options: dict  # arguments of that kind's configuration: architecture, precision, ZBL
    cutoffs: Cutoffs
    elements: list[str] | None  # None: those of the data
    given: dict  # of MEASURED, what a key sets by hand
    pretrained: PotentialConfig | None  # of the model that init_from names

    def on(self, elements: list[str], statistics: Mapping) -> PotentialConfig:
        """Return the model's configuration for training data with these elements and statistics."""
        measured = {
            "num_neighbors": max(statistics["num_neighbors_mean"], 1.0),
            "energy_scales": statistics["forces_rms"] or 1.0, "energy_shifts": statistics["per_element_energy"],
        }  # fmt: skip
        if self.pretrained is not None:
            measured = continued(self.pretrained, elements, statistics)
        given = dict(self.given)
        for name in MEASURED[1:] if self.pretrained else ():  # those of elements that are not named stay
            if isinstance(given[name], Mapping):
                given[name] = dict(zip(elements, measured[name], strict=True)) | dict(given[name])
        values = {name: by_element(name, given[name], elements, measured[name]) for name in MEASURED}
        pairs = self.cutoffs.matrix(elements).tolist() if self.cutoffs.pairs else None
        return KINDS[self.kind][0](
            elements=elements, cutoff=self.cutoffs.largest, pair_cutoffs=pairs, **values, **self.options
        )


def by_element(name: str, given, elements: list[str], measured):
    """Return a number for each element: the `given` one (for all, or by symbol), or the `measured` one."""
    if isinstance(given, Mapping):
        if missing := [element for element in elements if element not in given]:
            raise ValueError(f"model_kwargs.{name} has no number for {missing[0]}; give one for each element.")
        return [float(given[element]) for element in elements]
    value = measured if given is None else float(given)
    if name == "num_neighbors" or isinstance(value, list):
        return value
    return [value] * len(elements)


def model_config(
    model_tag: str,
    precision: str,
    init_from: str | None = None,
    *,
    cutoff: PositiveFloat | None = 5.0,
    pair_cutoffs: dict[str, float] | None = None,
    elements: list[str] | None = None,
    num_neighbors: PositiveFloat | dict[str, PositiveFloat] | None = None,
    energy_scales: PositiveFloat | dict[str, PositiveFloat] | None = None,
    energy_shifts: float | dict[str, float] | None = None,
    train_scales: bool = False,
    train_shifts: bool = False,
    zbl: Literal["metal", "real"] | None = None,
    parity: bool | None = None,
    num_layers: Annotated[int, Gt(0), Le(1000)] | None = None,
    num_features: list[int] | None = None,
    num_element_features: PositiveInt | None = None,
    radial_depth: NonNegativeInt | None = None,
    radial_width: PositiveInt | None = None,
    l_max: Annotated[int, Ge(0), Le(6)] | None = None,
    num_scalars: PositiveInt | None = None,
    num_tensors: PositiveInt | None = None,
    mlp_depth: NonNegativeInt | None = None,
    mlp_width: PositiveInt | None = None,
    radial: Literal["bessel", "spline"] | None = None,
    num_bessels: PositiveInt | None = None,
    train_bessels: bool | None = None,
    cutoff_power: Annotated[float, Ge(2)] | None = None,
    readout_depth: NonNegativeInt | None = None,
    readout_width: PositiveInt | None = None,
    embedding_depth: NonNegativeInt | None = None,
    embedding_width: PositiveInt | None = None,
    radial_features: PositiveInt | None = None,
    num_splines: PositiveInt | None = None,
    spline_span: PositiveInt | None = None,
    coupled_paths: bool | None = None,
) -> Wanted:
    """Read the section `model_kwargs`: a size, or the architecture of a model, and the keys that change it.

    With `init_from`, elements and measured numbers are those of that model unless they are given. Raises ValueError
    for an unknown size, and for a key that this kind of model does not have.
    """
    architecture = {
        "parity": parity, "num_layers": num_layers, "num_features": num_features,
        "num_element_features": num_element_features, "radial_depth": radial_depth, "radial_width": radial_width,
        "l_max": l_max, "num_scalars": num_scalars, "num_tensors": num_tensors, "mlp_depth": mlp_depth,
        "mlp_width": mlp_width, "radial": radial, "num_bessels": num_bessels, "train_bessels": train_bessels,
        "cutoff_power": cutoff_power, "readout_depth": readout_depth, "readout_width": readout_width,
        "embedding_depth": embedding_depth, "embedding_width": embedding_width, "radial_features": radial_features,
        "num_splines": num_splines, "spline_span": spline_span, "coupled_paths": coupled_paths,
    }  # fmt: skip
    if model_tag not in SIZES and not Path(model_tag).exists():
        raise ValueError(f"model_tag={model_tag} must be one of {', '.join(SIZES)}, or the folder of a model.")
    like = None if model_tag in SIZES else config_of("model_tag", model_tag)
    pretrained = None if init_from is None else config_of("init_from", init_from)
    kind = like.model_type if like else model_tag.partition("_")[0]
    if cutoff is None and like is None:
        raise ValueError("model_kwargs.cutoff=null needs a model_tag that names a model; for a size give a number.")
    if like is not None:
        cutoff = like.cutoff if cutoff is None else cutoff
        pair_cutoffs = named_cutoffs(like) if pair_cutoffs is None else pair_cutoffs
        zbl = like.zbl if zbl is None else zbl
    if pretrained is not None and elements is None:
        elements = pretrained.elements
    known = {field.name for field in fields(KINDS[kind][0])}
    overrides = {name: value for name, value in architecture.items() if value is not None}
    if foreign := sorted(set(overrides) - known):
        unset = " ".join(f"model_kwargs.{name}=null" for name in foreign)
        wrong = f"model_kwargs.{foreign[0]}={overrides[foreign[0]]}"
        raise ValueError(f"{wrong}: model_tag={model_tag} has no {foreign[0]}; give {unset}.")
    if num_features is not None and not (0 < len(num_features) <= 7 and min(num_features) > 0):
        raise ValueError(
            f"model_kwargs.num_features={num_features} must be channels for l = 0, 1, ..., up to 6, each above 0."
        )
    given = {"num_neighbors": num_neighbors, "energy_scales": energy_scales, "energy_shifts": energy_shifts}
    by_symbol = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    for name, symbols in {"elements": elements or [], **by_symbol}.items():
        if unknown := [symbol for symbol in symbols if symbol not in SYMBOLS[1:]]:
            raise ValueError(f"model_kwargs.{name}: {unknown[0]} is no symbol of an element.")
    if twice := [symbol for i, symbol in enumerate(elements or []) if symbol in elements[:i]]:
        raise ValueError(f"model_kwargs.elements lists {twice[0]} twice; list each element once.")
    try:
        cutoffs = Cutoffs(cutoff, pair_cutoffs)
    except ValueError as error:
        raise ValueError(f"model_kwargs.pair_cutoffs: {error}") from error
    overrides = {name: list(value) if name == "num_features" else value for name, value in overrides.items()}
    options = (SIZES[model_tag] if like is None else architecture_of(like)) | overrides
    options.pop("cutoff", None)
    other = "bessel" if options.get("radial") == "spline" else "spline"
    if unused := [name for name in BY_RADIAL[other] if name in overrides]:
        wrong = f"model_kwargs.{unused[0]}={overrides[unused[0]]}"
        raise ValueError(f"{wrong} needs radial={other}; without it, give model_kwargs.{unused[0]}=null.")
    embedded = options.get("radial_features") or options.get("num_scalars", 0)
    if options.get("radial", "bessel") == "bessel" and embedded % 2:
        name = "radial_features" if options.get("radial_features") else "num_scalars"
        raise ValueError(f"model_kwargs.{name}={embedded} must be even (half are of the centre), or radial be spline.")
    options |= {"train_scales": train_scales, "train_shifts": train_shifts, "zbl": zbl, "dtype": DTYPES[precision]}
    return Wanted(kind, options, cutoffs, list(elements) if elements else None, given, pretrained)


def config_of(key: str, source: str) -> PotentialConfig:
    """Return the configuration of the model at `source`. Raises ValueError that names `key`."""
    try:
        return open_pretrained(source)[0]
    except ValueError as error:
        raise ValueError(f"{key}={source} cannot be used: {error}") from error


DTYPES = {"fp32": "float32", "tf32": "float32", "fp64": "float64"}


def build_precision(config: DictConfig, device: torch.device) -> Precision:
    """Set FP32, FP32 with matrix products in TF32 (on GPUs that have it), or float64."""
    found = Precision(device, "fp32", bf16_pays=False)
    found.name = config.precision
    if config.precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
        if device.type == "cpu":
            found.notes.append("precision=tf32 is fp32 on a CPU.")
    return found


def build_model(shape: PotentialConfig, loss_kwargs: Mapping, distributed: Distributed) -> Potential:
    """Build the model without storage; `materialize` gives it weights once it is split over the ranks."""
    losses = loss_terms(shape.elements, **loss_kwargs)
    with torch.device("meta"):
        model = KINDS[shape.model_type][1](shape)
    model.losses = losses
    return model


def prepare(model: Potential, config: DictConfig, precision: Precision) -> None:
    """Choose the kernels, and whether training runs a compiled program.

    Raises ValueError where a compiler is needed and there is none.
    """
    model.kernels, precision.backend, note = products(config.layer_backend, precision.device)
    precision.notes += [note] if note else []
    if config.use_torch_compile:
        if precision.device.type == "cpu" and products("auto", precision.device)[2]:
            raise ValueError("use_torch_compile=true needs a C++ compiler on a CPU, and there is none; give false.")
        model.compiled = CompiledDerivatives(model)


def sharded_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the whole model: the derivative inside the forward pass needs all parameters at once."""
    return [model]


def materialize(
    model: torch.nn.Module, seed: int, pretrained: Mapping[str, torch.Tensor] | None, device: torch.device
) -> None:
    """Give the model storage and its first weights; it may be split already: then each rank has its part only."""
    model.to_empty(device=device)
    if pretrained is None:
        init_parameters(model, seed)
    else:
        copy_parameters(model, pretrained)


def open_potential(source: str | Path) -> Potential:
    """Open a run, a checkpoint or a final model, or a checkpoint or package of nequip or allegro.

    Raises ValueError for others and damaged ones.
    """
    try:
        config, weights = open_pretrained(str(source))
        model = KINDS[config.model_type][1](config)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source} cannot be used: {one_line(error):.300}") from error
    return model


def open_evaluation(config: DictConfig, source: str, distributed: Distributed) -> tuple:
    """Return what `evaluate.py` needs: a trained model, a validator of `config.validation`, the forward context."""
    model = open_potential(source).to(distributed.device).requires_grad_(False)
    model.kernels, *_ = products(config.layer_backend, distributed.device)
    shape = model.config
    precision = build_precision(config, distributed.device)
    validator = open_validation(
        distributed, Cutoffs(shape.cutoff, named_cutoffs(shape)), shape.elements, **config.validation
    )
    validator.metrics = Recorded(validator.metrics)
    return model, validator, precision.forward


def facts(shape: PotentialConfig, saved: dict | None = None) -> dict:
    """Return what a checkpoint records of the model, which is all that `export.py` needs.

    When a run is resumed, `saved` is what its checkpoint recorded: raises ValueError if that is another model, and
    takes over the statistics that were measured when the run began.
    """
    if saved:
        now = shape.to_dict()
        if wrong := [name for name in now if name not in MEASURED and now[name] != saved.get(name)]:
            changes = ", ".join(f"{name} was {saved.get(name)} and is {now[name]}" for name in wrong)
            precision = next(name for name, dtype in DTYPES.items() if dtype == saved.get("dtype", "float32"))
            given = f"precision={precision}" if wrong == ["dtype"] else "model_tag or model_kwargs of that model"
            raise ValueError(f"{changes}; give {given}")
        for name in MEASURED:
            setattr(shape, name, saved[name])
    return shape.to_dict()


def harmless_keys(config: Mapping) -> tuple[str, ...]:
    """Return the keys of this recipe that a resume may change, because they change the curve by rounding only."""
    return ("layer_backend",)


def training_flops(shape: PotentialConfig, batch: Batch) -> float:
    """Estimate the floating-point operations of a training step from the matrix products over edges, which are most.

    Forces take a second pass, and their gradients two more.
    """
    edges = batch.counts["edges"]
    if shape.model_type == "nequip":
        per_edge = 0
        irreps = modeling_nequip.layer_irreps(shape)
        for before, after in pairwise(irreps):
            for ir, number in before.items():
                for edge in modeling_nequip.harmonics(shape.l_max):
                    outs = [out for out in ir.times(edge) if out in after]
                    per_edge += sum(2 * number * (shape.radial_width + ir.dim * out.dim) for out in outs)
    else:
        width, s, tensors = shape.mlp_width, shape.num_scalars, shape.num_tensors
        components = (shape.l_max + 1) ** 2
        per_edge = shape.num_layers * 2 * (width * (2 * s + 2 * tensors) + tensors * components**2)
    return 6.0 * edges * per_edge
