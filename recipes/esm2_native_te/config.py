# SPDX-License-Identifier: Apache-2.0
"""The configuration is checked before anything is built; a user's mistake ends as one sentence and exit code 2.

Each YAML section is the keyword arguments of one callable. Its signature says which keys exist, which must be given
and what type they have.
"""

import os
from collections.abc import Callable
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from build_model import model_config
from checkpoint import Checkpointer
from dataset import TrainLoader
from distributed import stop_with
from perf_logger import PerfLogger
from precision import Precision
from scheduler import adamw, linear_schedule
from validation import Validator


OmegaConf.register_new_resolver("recipe_dir", lambda: str(Path(__file__).parent), replace=True)


def top_level(
    *,
    model_tag: str,
    num_train_steps: int,
    init_from: str | None = None,
    layer_backend: Literal["auto", "te", "torch"] = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    micro_batches_per_step: int | None = None,
    use_sequence_packing: bool = False,
    use_torch_compile: bool = False,
    use_activation_checkpointing: bool = False,
    max_grad_norm: float = 1.0,
    seed: int = 42,
    deterministic: bool = False,
) -> None:
    """The keys that stand outside any section; what each means is said in `hydra_config/defaults.yaml`."""


SECTIONS = {
    "model_kwargs": model_config,
    "fp8_config": Precision,
    "dataset": TrainLoader,
    "validation": Validator,
    "adamw_kwargs": adamw,
    "lr_scheduler_kwargs": linear_schedule,
    "checkpoint": Checkpointer,
    "logger": PerfLogger,
}
OPEN_SECTIONS = ("wandb_init_args",)  # passed on to a library that checks its own


def check_config(config: DictConfig) -> None:
    """Stop with one sentence at an unknown key, a missing one or one of the wrong type."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"{missing[0]} is not set; give it on the command line or in the config.")
        values = OmegaConf.to_container(config, resolve=True)
        sections = {key: values.pop(key) for key in (*SECTIONS, *OPEN_SECTIONS)}
        check_section("", values, top_level)
        for name, callable_ in SECTIONS.items():
            check_section(name, sections[name], callable_)
    except (ValueError, OmegaConfBaseException) as error:
        stop_with(str(error))


def check_section(name: str, values: dict, callable_: Callable) -> None:
    """Raise ValueError unless `values` are keyword arguments of `callable_`, of the right types.

    Its keyword-only arguments are the user's; those before the `*` are the script's to give.
    """
    prefix = f"{name}." if name else ""
    hints = get_type_hints(callable_.__init__ if isinstance(callable_, type) else callable_)
    parameters = {k: p for k, p in signature(callable_).parameters.items() if p.kind is Parameter.KEYWORD_ONLY}
    for key, value in values.items():
        if key not in parameters:
            raise ValueError(unknown_key(prefix + key, [prefix + other for other in parameters]))
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError:
            shown = "null" if value is None else value
            raise ValueError(f"{prefix}{key}={shown} must be {_wanted(hints[key])}.") from None


def unknown_key(key: str, known: list[str]) -> str:
    """The sentence for a key that nobody reads."""
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
    return f"Unknown key {key}: {hint}"


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    parts = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    return " or ".join(names.get(part) or str(part) for part in parts)


def launch(main: Callable[[DictConfig], None]) -> None:
    """Run a `@hydra.main` function; a mistake on the command line ends it with one sentence."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints and exits by itself
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        stop_with(_override_mistake(error))


def _override_mistake(error: Exception) -> str:
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    if key and "is not in struct" in str(cause):
        return unknown_key(key, _known_keys())
    return str(error).split("\n")[0]


def _known_keys() -> list[str]:
    def walk(node: dict, prefix: str) -> list[str]:
        keys = [prefix + key for key in node]
        return keys + [k for key, v in node.items() if isinstance(v, dict) for k in walk(v, f"{prefix}{key}.")]

    defaults = OmegaConf.load(Path(__file__).parent / "hydra_config" / "defaults.yaml")
    return walk(OmegaConf.to_container(defaults), "")
