# SPDX-License-Identifier: Apache-2.0
"""The configuration is checked before anything is built; a user's mistake ends as one sentence and exit code 2.

Each YAML section is the keyword arguments of one callable. Its signature says which keys exist, which must be given
and what type they have.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from yaml import YAMLError

from anomalies import Anomalies
from build_model import is_reference, model_config
from checkpoint import Checkpointer
from dataset import TrainLoader
from distributed import end_of_process, stop_with
from perf_logger import PerfLogger, start_wandb
from precision import FP4, FP8
from quant_stats import QuantStats
from scheduler import adamw, linear_schedule
from validation import Validator


OmegaConf.register_new_resolver("recipe_dir", lambda: str(Path(__file__).parent), replace=True)


def top_level(
    *,
    model_tag: str,
    num_train_steps: PositiveInt,
    init_from: str | None = None,
    layer_backend: Literal["auto", "te", "cpp", "torch"] = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    micro_batches_per_step: PositiveInt | None = None,
    use_sequence_packing: bool = False,
    use_torch_compile: bool = False,
    use_activation_checkpointing: bool = False,
    fp8_layers: list[int | str] | str | int | None = None,
    fp4_layers: list[int | str] | str | int | None = None,
    cp_size: PositiveInt = 1,
    max_grad_norm: PositiveFloat = 1.0,
    seed: NonNegativeInt = 42,
    deterministic: bool = False,
) -> None:
    """The keys that stand outside any section; what each means is said in `hydra_config/defaults.yaml`."""


SECTIONS = {
    "model_kwargs": model_config,
    "fp8_config": FP8,
    "fp4_config": FP4,
    "quant_stats_config": QuantStats,
    "dataset": TrainLoader,
    "validation": Validator,
    "adamw_kwargs": adamw,
    "lr_scheduler_kwargs": linear_schedule,
    "anomalies": Anomalies,
    "checkpoint": Checkpointer,
    "logger": PerfLogger,
    "wandb_init_args": start_wandb,
}
FOLDER = Path(__file__).parent / "hydra_config"


def check_config(config: DictConfig) -> None:
    """Stop with one sentence at a key that is unknown, missing or of the wrong type, and at two that cannot be."""
    try:
        values = OmegaConf.to_container(config)
        for key in (*keyword_only(top_level), *SECTIONS):
            if key not in values:
                raise ValueError(f"{key} was taken out of the configuration; to leave it as it is, do not name it.")
            if key in SECTIONS and not isinstance(values[key], dict):
                raise ValueError(f"{key}={_shown(values[key])} must be a section; set its keys, {key}.<name>=<value>.")
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"{missing[0]} is not set; give it on the command line or in the config.")
        values = OmegaConf.to_container(config, resolve=True)
        sections = {key: values.pop(key) for key in SECTIONS}
        check_section("", values, top_level)
        for name, callable_ in SECTIONS.items():
            check_section(name, sections[name], callable_)
        lacks = {
            "fp8_config.enabled=true": config.fp8_config.enabled,
            "fp4_config.enabled=true": config.fp4_config.enabled,
            f"layer_backend={config.layer_backend}": config.layer_backend in ("te", "cpp"),
            f"cp_size={config.cp_size}": config.cp_size > 1,
        }
        if is_reference(config.model_tag) and any(lacks.values()):
            wrong = next(key for key, asked in lacks.items() if asked)
            own = config.model_tag.removeprefix("facebook/")
            raise ValueError(f"{wrong} is nothing that Hugging Face's model_tag={config.model_tag} has; {own} has it.")
        if config.cp_size > 1 and not config.use_sequence_packing:
            raise ValueError(f"cp_size={config.cp_size} needs use_sequence_packing=true.")
        for section in (FP8(**sections["fp8_config"]), FP4(**sections["fp4_config"])):
            attention = [key for key in ("fp8_dpa", "fp8_mha") if (section["recipe_kwargs"] or {}).get(key)]
            if section.enabled and config.cp_size > 1 and attention:
                raise ValueError(
                    f"{section.told('recipe_kwargs')} cannot be with cp_size={config.cp_size}, which exchanges "
                    f"attention's inputs in BF16; leave {attention[0]} out."
                )
            if section.enabled and config.use_torch_compile and section.recipe == "DelayedScaling":
                raise ValueError(
                    f"{section.told()} cannot be with use_torch_compile=true: TransformerEngine does not compile it; "
                    "Float8CurrentScaling can be."
                )
        if config.quant_stats_config.enabled and config.use_torch_compile:
            raise ValueError("quant_stats_config.enabled=true cannot be with use_torch_compile=true; leave one out.")
        # Once on a parameter that nobody trains: what these two refuse shows now.
        linear_schedule(
            adamw([torch.nn.Parameter(torch.zeros(1))], **sections["adamw_kwargs"]), **sections["lr_scheduler_kwargs"]
        )
    except (ValueError, OmegaConfBaseException) as error:
        stop_with(str(error))


def keyword_only(callable_: Callable) -> dict[str, Parameter]:
    """The arguments that are the user's; those before the `*` are the script's to give."""
    return {k: p for k, p in signature(callable_).parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_section(name: str, values: dict, callable_: Callable) -> None:
    """Raise ValueError unless `values` are keyword-only arguments of `callable_`, of the right types."""
    hints = get_type_hints(callable_.__init__ if isinstance(callable_, type) else callable_, include_extras=True)
    known, passes_on = keyword_only(callable_), "passed_on" in signature(callable_).parameters
    for key, value in values.items():
        full_key = f"{name}.{key}" if name else key
        if key in known:
            try:
                TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError:
                raise ValueError(f"{full_key}={_shown(value)} must be {_wanted(hints[key])}.") from None
        elif not passes_on:
            raise ValueError(unknown_key(full_key))


def unknown_key(key: str) -> str:
    """The sentence for a key that nobody reads."""
    known, (section, _, name) = _known_keys(), key.rpartition(".")
    if section in known and not any(k.startswith(f"{section}.") for k in known):  # null, or a value
        return f"Unknown key {key}: {section} has no keys yet; +{key}=... adds one."
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    close = [k for k in known if k.endswith(f".{name}")] or [beside[k] for k in get_close_matches(name, beside, n=1)]
    if close:
        return f"Unknown key {key}: did you mean {' or '.join(close)}?"
    return f"Unknown key {key}: known are {', '.join(sorted(beside.values()))}."


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        words = {"gt": "above", "ge": "of at least"}
        told = [f"{words[sign]} {getattr(x, sign)}" for x in limits for sign in words if hasattr(x, sign)]
        return " ".join([_wanted(kind), *told])
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_wanted, get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
             dict: "a section of keys", list[float]: "a list of numbers",
             list[int | str]: "a list of layers"}  # fmt: skip
    return names[hint]


def launch(main: Callable[[DictConfig], None]) -> None:
    """Run a `@hydra.main` function, and end the process if it is the script's.

    A mistake on the command line ends it with one sentence.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(sys.modules[main.__module__].__doc__))
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints and exits by itself
    with end_of_process() if main.__module__ == "__main__" else nullcontext():
        try:
            main()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            stop_with(_told(error))


def help_text(docstring: str) -> str:
    """What a trainer is, its configurations, and every key with its default and what it is for."""
    keys = (FOLDER / "defaults.yaml").read_text().partition("# ---- model")
    configs = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "defaults"))
    return (
        f"{docstring.strip()}\n\n--config-name takes one of {configs}, or yours from {FOLDER}.\n"
        "--cfg job --resolve shows what it sets; --hydra-help has Hydra's own options.\n\n"
        "Every key, with its default; set one by key=value, one in a section by section.key=value:\n\n"
        f"{''.join(keys[1:]).partition('hydra:')[0].rstrip()}"
    )


def _told(error: Exception) -> str:
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    if key and "is not in struct" in str(cause):
        return unknown_key(key)
    if isinstance(error, MissingConfigException):
        known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        return f"--config-name {error.missing_cfg_file}: there is no such file; known are {', '.join(known)}."
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write key=value, as in seed=1, and quote commas and brackets."
    return str(error) if isinstance(error, YAMLError) else str(error).splitlines()[0]


def _known_keys() -> list[str]:
    def walk(node: dict, prefix: str = "") -> list[str]:
        below = [k for key, v in node.items() if isinstance(v, dict) for k in walk(v, f"{prefix}{key}.")]
        return [prefix + key for key in node] + below

    known = OmegaConf.to_container(OmegaConf.load(FOLDER / "defaults.yaml"))
    return walk({key: value for key, value in known.items() if key not in ("defaults", "hydra")})
