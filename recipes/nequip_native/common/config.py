# SPDX-License-Identifier: Apache-2.0
"""The configuration is checked before anything is built; a user's mistake ends as one sentence and exit code 2.

Each YAML section is the keyword-only arguments of one callable. Its signature says which keys exist, which must be
given and what type they have. Which sections a recipe has, and which values cannot be together, is in its `keys.py`.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common import RECIPE
from common.distributed import end_of_process, stop_with
from common.type_hints import as_text, misfit


FOLDER = RECIPE / "hydra_config"


def check_config(
    config: DictConfig,
    top_level: Callable,
    sections: Mapping[str, Callable],
    check_pairs: Callable[[DictConfig], None],
) -> None:
    """Stop with one sentence at a key that is unknown, missing or of the wrong type, and at two that cannot be.

    `top_level` takes the keys outside any section, `sections` says whose arguments each section is, and `check_pairs`
    raises ValueError for values that cannot be together; by then each of them has its type.
    """
    try:
        values = OmegaConf.to_container(config)
        for key in (*keyword_only(top_level), *sections):
            if key not in values:
                raise ValueError(_taken_out(key))
            if key in sections and not isinstance(values[key], dict):
                raise ValueError(
                    f"{key}={as_text(values[key])} must be a section; set its keys, {key}.<name>=<value>."
                )
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"{missing[0]} is not set; give it on the command line or in the config.")
        values = OmegaConf.to_container(config, resolve=True)
        check_section("", {key: value for key, value in values.items() if key not in sections}, top_level)
        for name, callable_ in sections.items():
            check_section(name, values[name], callable_)
        check_pairs(config)
    except (ValueError, OmegaConfBaseException) as error:
        stop_with(str(error))


def keyword_only(callable_: Callable) -> dict[str, Parameter]:
    """The arguments that are the user's; those before the `*` are the script's to give."""
    return {k: p for k, p in signature(callable_).parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_section(name: str, values: dict, callable_: Callable) -> None:
    """Raise ValueError unless `values` are keyword-only arguments of `callable_`, of the right types.

    What has no such name is right where the callable takes `**kwargs`, which it gives to another one.
    """
    hints = get_type_hints(callable_.__init__ if isinstance(callable_, type) else callable_, include_extras=True)
    known = keyword_only(callable_)
    others = next((p.name for p in signature(callable_).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    for key, value in values.items():
        full_key = f"{name}.{key}" if name else key
        if key not in known and others is None:
            raise ValueError(unknown_key(full_key))
        if sentence := misfit(full_key, value, hints.get(key if key in known else others, Any)):
            raise ValueError(sentence)
    for key, argument in known.items():
        if argument.default is argument.empty and key not in values:
            raise ValueError(_taken_out(f"{name}.{key}" if name else key))


def _taken_out(key: str) -> str:
    return f"{key} was taken out of the configuration; to leave it as it is, do not name it."


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


def _known_keys() -> list[str]:
    def walk(node: dict, prefix: str = "") -> list[str]:
        below = [k for key, v in node.items() if isinstance(v, dict) for k in walk(v, f"{prefix}{key}.")]
        return [prefix + key for key in node] + below

    known = OmegaConf.to_container(OmegaConf.load(FOLDER / "defaults.yaml"))
    return walk({key: value for key, value in known.items() if key not in ("defaults", "hydra")})


def register_resolvers() -> None:
    """Let configs say `${recipe_dir:}`, the recipe's folder; whoever composes one without `launch` calls it."""
    OmegaConf.register_new_resolver("recipe_dir", lambda: str(RECIPE), replace=True)


def launch(main: Callable[[DictConfig], None]) -> None:
    """Run a `@hydra.main` function, and end the process if it is the script's.

    A mistake on the command line ends it with one sentence.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(sys.modules[main.__module__].__doc__))
        return
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints and exits by itself
    with end_of_process() if main.__module__ == "__main__" else nullcontext():
        try:
            main()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            stop_with(_one_sentence(error))


def help_text(docstring: str) -> str:
    """What a trainer is, its configurations, and every key with its default and what it is for."""
    defaults = (FOLDER / "defaults.yaml").read_text()
    keys = defaults[defaults.index("# ---- ") :].partition("\nhydra:")[0].rstrip()
    configs = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "defaults"))
    return (
        f"{docstring.strip()}\n\n--config-name takes one of {configs}, or yours from {FOLDER}.\n"
        "--cfg job --resolve shows what it sets; --hydra-help has Hydra's own options.\n\n"
        f"Every key, with its default; set one by key=value, one in a section by section.key=value:\n\n{keys}"
    )


def _one_sentence(error: Exception) -> str:
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
