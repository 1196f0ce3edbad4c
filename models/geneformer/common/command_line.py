# SPDX-License-Identifier: Apache-2.0
"""What users type, in the form that Hydra takes; what has no such form is one sentence with the right one."""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


VALUE_FLAGS = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")
SWITCHES = ("--hydra-help", "--version", "--resolve", "--multirun", "-m", "--run", "-r", "--info", "-i",
            "--shell-completion", "-sc", "--experimental-rerun")  # fmt: skip
LONG = {"-cn": "--config-name", "-cd": "--config-dir", "-cp": "--config-dir", "--config-path": "--config-dir"}
# What a configuration that builds on none of ours lacks: no folder of Hydra's own.
NO_FOLDER = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
# Variables of launchers that start several processes, but do not tell them of one another as torchrun does.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def for_hydra(words: Sequence[str], folder: Path, known_keys: Sequence[str]) -> list[str]:
    """The words of a command line, flags first; `folder` has the recipe's configurations.

    Raises ValueError for a flag that there is not, with the word that is meant.
    """
    flags, overrides = {}, []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, sign, value = word.partition("=")
        if word in known_keys and queue:
            value = next((other for other in queue if other != "="), "...")
            raise ValueError(f"{word} {' '.join(queue[:2])} cannot be read: write {word}={value}, without blanks.")
        if not word.startswith("-"):
            overrides.append(_override(word))
        elif name in VALUE_FLAGS:
            if not sign and not queue:
                raise ValueError(f"{name} needs a value, as in --config-name L0_sanity.")
            flags[LONG.get(name, name)] = value if sign else queue.pop(0)
        elif name in SWITCHES:
            flags[name] = value if sign else None
        else:
            after = value if sign else queue[0] if queue and "=" not in queue[0] and queue[0][:2] != "--" else "..."
            shown = word if sign or after == "..." else f"{word} {after}"
            raise ValueError(_meant(name, shown, after, known_keys))
    _find_config(flags, folder)
    own = Path(flags.get("--config-dir", folder), f"{flags.get('--config-name', 'L0_sanity')}.yaml")
    if own.is_file() and not re.search(r"^defaults\s*:", text := own.read_text(errors="replace"), re.MULTILINE):
        _check_whole(own, text, known_keys)
        overrides = NO_FOLDER + overrides
    given = [word for name, value in flags.items() for word in ([name] if value is None else [name, value])]
    return given + overrides


def _meant(flag: str, word: str, value: str, known_keys: Sequence[str]) -> str:
    """The sentence for a flag that there is not."""
    if close := get_close_matches(flag.replace("_", "-"), (*VALUE_FLAGS, *SWITCHES), n=1, cutoff=0.8):
        return f"Unknown flag {flag}: did you mean {close[0]}?"
    name = flag.lstrip("-")
    named = [key for key in known_keys if name in (key, key.replace("_", "-"))]
    named = named or [key for key in known_keys if key.replace("_", "-").endswith(f".{name.replace('_', '-')}")]
    right = " or ".join(f"{key}={value}" for key in named)
    if named:
        return f"{word} cannot be read: keys have no dashes before them and a = behind them: {right}."
    return f"Unknown flag {flag}: keys are set by key=value without dashes, as in seed=1; --help lists them all."


def _check_whole(file: Path, text: str, known_keys: Sequence[str]) -> None:
    """Raise ValueError for a configuration that neither builds on ours nor has all keys, as that of a run has."""
    absent = [key for key in known_keys if "." not in key and not re.search(rf"^{key}\s*:", text, re.MULTILINE)]
    if absent:
        raise ValueError(
            f"{file} lacks {', '.join(absent[:3])}{f' and {len(absent) - 3} more keys' * (len(absent) > 3)}; let it "
            "begin with the line `defaults: [L0_sanity, _self_]`, and it has them all, but for what it sets itself."
        )


def _find_config(flags: dict, folder: Path) -> None:
    """`--config-name some/where/mine.yaml` names a folder too, and a file in the working folder is found as well."""
    if (name := flags.get("--config-name")) is None:
        return
    path = Path(name).expanduser()
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    here = path.with_name(f"{stem}.yaml")
    is_ours = not path.is_absolute() and (folder / here).exists()
    if "--config-dir" not in flags and here.is_file() and not is_ours:
        flags["--config-dir"] = str(here.parent.absolute())
        flags["--config-name"] = stem
    elif path.suffix == ".yaml":
        flags["--config-name"] = name.removesuffix(".yaml")


def _override(word: str) -> str:
    """`key=value` with the home folder for `~`, and in quotes where it is a path or text that Hydra would misread."""
    key, sign, value = word.partition("=")
    if not sign or key.startswith("~"):
        return word
    value = re.sub(r"(?<![^\[,])~(?=/|$)", lambda _: str(Path.home()), value)
    quoted = "'" + re.sub(r"\\+$", r"\g<0>\g<0>", value.replace("'", "\\'")) + "'"
    try:
        found = OverridesParser.create().parse_override(f"{key}={value}")
        is_plain = not found.is_sweep_override() and isinstance(found.value(), str)
    except HydraException:
        is_plain = False
        if value[:1] not in ("[", "{", '"', "'"):
            return f"{key}={quoted}"
    # A number that is a folder's name too stays a number: what it is for tells which is meant.
    is_a_path = not is_plain and re.search(r"[^\w.+-]", value) is not None and Path(value).exists()
    return f"{key}={quoted}" if is_a_path else f"{key}={value}"


def typed_text(words: Sequence[str]) -> dict[str, str]:
    """What was typed for each key, as text: YAML reads 2024_01_31 as a number."""
    return {k.lstrip("+"): value for k, sign, value in (word.partition("=") for word in words) if sign}


def as_written(text: str) -> str | None:
    """The text of a plain scalar that YAML takes for a number or a switch; None of what has brackets or quotes."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return text if isinstance(value, int | float | str) and text[:1] not in ("'", '"') else None


def check_launcher(script: str) -> None:
    """Raise ValueError where something else than torchrun has started several processes, or told one half of it."""
    env = os.environ
    if given := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in env]:
        if missing := [name for name in TORCHRUN if not env.get(name)]:
            raise ValueError(
                f"{', '.join(f'{name}={env[name]}' for name in given)} is set in the environment, but "
                f"not {', '.join(missing)}; start with torchrun --nproc_per_node=N {script}, which sets all of them, "
                f"or unset {' '.join(given)}."
            )
        for name in (*given, "MASTER_PORT"):
            if not re.fullmatch("[0-9]+", env[name]):
                raise ValueError(f"{name}={env[name]} in the environment must be a whole number; torchrun sets it.")
        if not 0 < int(env["MASTER_PORT"]) < 65536:
            raise ValueError(f"MASTER_PORT={env['MASTER_PORT']} in the environment must lie between 1 and 65535.")
        if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
            raise ValueError(
                f"RANK={env['RANK']} in the environment must be less than WORLD_SIZE={env['WORLD_SIZE']}; "
                "torchrun sets both."
            )
        return
    for name in LAUNCHERS:
        if env.get(name, "1").isdigit() and int(env.get(name, "1")) > 1:
            raise ValueError(
                f"{name}={env[name]}: these processes know nothing of one another and would each train alone; start "
                f"one torchrun --nproc_per_node=N {script} on each node, as slurm.sh does (sbatch slurm.sh), or set "
                f"{name}=1 for a run of one process."
            )
