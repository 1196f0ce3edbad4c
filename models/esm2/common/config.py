# SPDX-License-Identifier: Apache-2.0
"""The configuration is checked before anything is built; a user's mistake ends as one sentence and exit code 2.

Each YAML section is the keyword-only arguments of one callable. Its signature says which keys exist, which must be
given and what type they have. Which sections a recipe has, and which values cannot be together, is in its `keys.py`.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common import RECIPE, quiet
from common.command_line import as_written, check_launcher, for_hydra, typed_text
from common.distributed import Distributed, end_of_process, process_group, stop_with
from common.files import flat, names
from common.own_data import take_own
from common.redaction import SECTIONS, redacted, refuse_hidden
from common.type_hints import as_text, misfit


FOLDER = RECIPE / "hydra_config"
IN_SAMPLE = str(RECIPE / "data") + os.sep
FOLDER_KEY = re.compile(r"(?<!data)_dir$|\.dir$")  # of a folder that is written to


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
        # OmegaConf's own list of them fails where another key refers to one.
        missing = sorted(key for key, value in flat(values).items() if value == "???")
        if missing := missing or sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"{missing[0]} is not set; give it on the command line or in the config.")
        refuse_hidden(flat(values), "give it anew on the command line")
        _as_meant(config, {"": top_level, **sections})
        take_own(config, _typed())
        values = OmegaConf.to_container(config, resolve=True)
        check_section("", {key: value for key, value in values.items() if key not in sections}, top_level)
        for name, callable_ in sections.items():
            check_section(name, values[name], callable_)
        check_pairs(config)
    except (ValueError, OmegaConfBaseException) as error:
        stop_with(str(error))


def _as_meant(config: DictConfig, callables: Mapping[str, Callable]) -> None:
    """Texts that look like numbers become texts where no number can be meant, and ~ the home folder.

    Raises ValueError for an address where a folder is written, and for a number that no computer word holds.
    """
    typed = _typed()
    for key, value in flat(OmegaConf.to_container(config, resolve=True)).items():
        for one in value if isinstance(value, list) else [value]:
            bits = 63 if key.endswith(("seed", "max_rows")) else 31
            if type(one) is int and abs(one) >= 2**bits and not _is_text(key, callables) and _hint(key, callables):
                raise ValueError(f"{key}={one} must be less than 2^{bits}, {2**bits}.")
        if isinstance(value, str) and "://" in value and FOLDER_KEY.search(key):
            raise ValueError(f"{key}={redacted(value)}: nothing is written to an address; give a folder.")
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(config, key, str(Path(value).expanduser()))
        elif isinstance(value, list) and any(isinstance(one, str) and one.startswith("~/") for one in value):
            OmegaConf.update(config, key, [str(Path(x).expanduser()) if isinstance(x, str) else x for x in value])
        elif isinstance(value, int | float) and _is_text(key, callables) and as_written(typed.get(key, "")):
            OmegaConf.update(config, key, typed[key])


def _typed() -> dict[str, str]:
    return typed_text(HydraConfig.get().overrides.task) if HydraConfig.initialized() else {}


def _is_text(key: str, callables: Mapping[str, Callable]) -> bool:
    """Whether a key takes text, and no number or switch."""
    section, _, name = key.rpartition(".")
    if section.endswith("load_dataset_kwargs"):
        return name in ("path", "name", "data_dir", "data_files", "split", "cache_dir", "revision")
    hint = _hint(key, callables)
    return misfit(key, "text", hint) is None and misfit(key, 1, hint) is not None if hint else False


def _hint(key: str, callables: Mapping[str, Callable]) -> Any:
    """The type of a key, None for one that its section does not name."""
    section, _, name = key.rpartition(".")
    if section not in callables:
        return None
    callable_ = callables[section]
    return get_type_hints(callable_.__init__ if isinstance(callable_, type) else callable_).get(name)


@contextmanager
def joined(config: DictConfig):
    """Join the ranks of a run, which then have one configuration. Stops them where they cannot have."""
    with process_group(config.seed, config.get("deterministic", False)) as distributed:
        with distributed.fail_together():
            agree(config, distributed)
        yield distributed


def agree(config: DictConfig, distributed: Distributed) -> None:
    """Let all ranks take rank 0's folders, as where one is named by the time. Raises ValueError for other differences.

    Files of one name in different folders are no difference: nodes may have copies.
    """
    found = distributed.gather(flat(OmegaConf.to_container(config, resolve=True)))
    for key in sorted({key for values in found for key in values}):
        *above, name = key.split(".")
        values = [redacted(values.get(key), name, bool({*above} & {*SECTIONS})) for values in found]
        others = [(rank, value) for rank, value in enumerate(values) if repr(value) != repr(values[0])]
        if not others:
            continue
        if key.startswith(("checkpoint.", "logger.", "wandb_init_args.")):
            OmegaConf.update(config, key, found[0].get(key))
            distributed.say(f"{key} is not the same on all ranks; all take rank 0's, {as_text(values[0])}.")
        elif len({repr(names(value)) for value in values}) > 1:
            rank, value = others[0]
            raise ValueError(
                f"{key} is not the same on all ranks: {as_text(values[0])} on rank 0 and {as_text(value)} on rank "
                f"{rank}; give one value, and the ranks share out the work by themselves."
            )


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
    """Let configs say `${recipe_dir:}`, the recipe's folder, and `${max:1,2}`; `launch` does so itself."""
    OmegaConf.register_new_resolver("recipe_dir", lambda: str(RECIPE), replace=True)
    OmegaConf.register_new_resolver("max", max, replace=True)


def notes_on_continuing(config: DictConfig, highest_lr: float = 1e-4, usual_lr: str = "1e-5") -> list[str]:
    """Sentences for a run that starts from weights with what is meant for a start from scratch."""
    notes = []
    if config.adamw_kwargs.lr > highest_lr:
        notes.append(
            f"adamw_kwargs.lr={config.adamw_kwargs.lr:g} is a rate for training from scratch and may undo what "
            f"init_from={config.init_from} has learnt; to continue, about {usual_lr} with a warm-up is usual."
        )
    data = flat(OmegaConf.to_container(config.dataset, resolve=True), "dataset.")
    sample = [
        f"{key}={value}" for key, value in data.items() if key.endswith("data_files") and IN_SAMPLE in str(value)
    ]
    if sample:
        notes.append(
            f"{sample[0]} is the bundled sample, from which init_from={config.init_from} learns nothing of use; give "
            "your own data."
        )
    return notes


def launch(main: Callable[[DictConfig], None]) -> None:
    """Run a `@hydra.main` function, and end the process if it is the script's.

    A mistake on the command line ends it with one sentence.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(sys.modules[main.__module__].__doc__))
        return
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints and exits by itself
    is_script = main.__module__ == "__main__"
    if is_script:
        quiet.keep_streams()
    with end_of_process() if is_script else nullcontext():
        try:
            check_launcher(Path(sys.argv[0]).name)
        except ValueError as error:  # said by each process: none knows of the others
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        try:
            sys.argv[1:] = for_hydra(sys.argv[1:], FOLDER, _known_keys())
        except ValueError as error:
            stop_with(str(error))
        try:
            main()
        except KeyboardInterrupt:  # later ones are StopSignal's
            stop_with("interrupted before the first step; nothing was changed.", 130)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            stop_with(one_sentence(error))


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


def one_sentence(error: Exception) -> str:
    """What Hydra complains of, in the words of this configuration."""
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    if key and "is not in struct" in str(cause):
        return unknown_key(key)
    if isinstance(error, MissingConfigException):
        known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        return f"--config-name {error.missing_cfg_file}: there is no such file; known are {', '.join(known)}."
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write key=value, as in seed=1, and quote commas and brackets."
    if str(error).startswith("Ambiguous value"):
        word = str(error).splitlines()[0].split("'", 1)[1].rstrip("'")
        key, _, value = word.partition("=")
        return f"{word} can mean several things: a list is {key}=[{value}], a text \"{key}='{value}'\"."
    return str(error) if isinstance(error, YAMLError) else str(error).splitlines()[0]
