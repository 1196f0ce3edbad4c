# SPDX-License-Identifier: Apache-2.0
"""Whose data a configuration names: a user's own takes the place of the sample that comes with the recipe."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from common import RECIPE
from common.files import short


SAMPLE = RECIPE / "data"
KWARGS = "load_dataset_kwargs"


def take_own(config: DictConfig, typed: Collection[str] = ()) -> None:
    """Leave the sample's files out where other data is named: a folder, a name of the hub, a `data_dir`.

    With other data for training, the sample is nothing to validate on either, unless one of the keys `typed` names it.
    """
    read_whole(config, typed)
    for key, kwargs in _named(config):
        if _of_sample(kwargs) and _names_other(kwargs):
            OmegaConf.update(config, f"{key}.data_files", None)
    trained = [kwargs for key, kwargs in _named(config) if key.startswith("dataset.")]
    if not any(_is_other(kwargs) for kwargs in trained) or any(key.startswith("validation.load_") for key in typed):
        return
    for key, kwargs in list(_named(config)):
        if key.startswith("validation.") and _of_sample(kwargs):
            OmegaConf.update(config, key, None)


def read_whole(config: DictConfig, typed: Collection[str]) -> None:
    """Of other data for validation, named by the keys `typed`, take all: a part as train[95%:] is of training's."""
    section, trained = (
        OmegaConf.select(config, f"{name}.{KWARGS}") or OmegaConf.create() for name in ("validation", "dataset")
    )
    named = [key for key in ("path", "data_files", "data_dir") if f"validation.{KWARGS}.{key}" in typed]
    differ = any(OmegaConf.select(section, key) != OmegaConf.select(trained, key) for key in named)
    if differ and f"validation.{KWARGS}.split" not in typed and "split" in section:
        section.split = str(section.split).partition("[")[0]


def no_validation(config: DictConfig) -> str | None:
    """The sentence for a run without validation."""
    if any(key.startswith("validation.") for key, _ in _named(config)) or KWARGS not in config.get("validation", {}):
        return None
    return f"There is no validation: name data of your own for it by validation.{KWARGS}, as for training."


def data_names(kwargs: dict | None) -> str:
    """What data is called, for a card or a log that others read: files and folders by their names alone."""
    if not kwargs:
        return "-"
    found = [
        file for file in _texts(kwargs.get("data_files")) or [kwargs.get("data_dir") or kwargs.get("path")] if file
    ]
    shown = ", ".join(str(f) if str(f).count("/") == 1 and f[:1] not in "/.~" else Path(f).name for f in found)
    split = str(kwargs.get("split") or "")
    return f"{shown}, {split}" if "[" in split else shown


def validated_on(run: dict) -> str:
    """Of the figures in a checkpoint's `run.json`: which data, and when. Text for a model card."""
    validation = run.get("logger", run).get("validation") or {}
    if not validation:
        return "none"
    data = validation.get("data") or data_names(run["config"]["validation"].get(KWARGS))
    return f"`{data}`" + (f", after {validation['step']:,} steps" if validation["step"] != run["step"] else "")


def published(config: dict) -> dict:
    """What a model card shows of a configuration: others read it, whom the folders of this machine do not concern."""
    shown = {k: v for k, v in config.items() if k not in ("checkpoint", "logger", "validation", "wandb_init_args")}
    return json.loads(re.sub(r'"/[^"]*/([^"/]+)/?"', r'"\1"', json.dumps(shown)))


def weights_of(run: dict) -> str:
    """Which weights are exported from a checkpoint, and which were best. Text for a model card."""
    average, best = run.get("ema"), run.get("best")
    text = f"running average (ema_decay={average.get('decay')})" if average else "of the last step"
    if best and best["step"] == run["step"]:
        text += f", the best by {best['metric']} in the validation"
    elif best:
        text += f"; those after {best['step']:,} steps were better by {best['metric']} in the validation, "
        text += short(best["value"])
    return text


def _named(node: DictConfig, above: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Each section of data in the configuration, by its key."""
    for name in node if isinstance(node, DictConfig) and not node._is_none() else ():
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if name == KWARGS and isinstance(value, DictConfig):
            yield f"{above}{name}", value
        elif isinstance(value, DictConfig):
            yield from _named(value, f"{above}{name}.")


def _texts(value: Any) -> list[str]:
    """All file names in `data_files`, which may be a text, a list, or either by split."""
    if isinstance(value, dict | DictConfig):
        return [text for item in value.values() for text in _texts(item)]
    return [value] if isinstance(value, str) else [text for item in value or () for text in _texts(item)]


def _of_sample(kwargs: DictConfig) -> bool:
    files = _texts(kwargs.get("data_files"))
    return bool(files) and all(Path(file).is_relative_to(SAMPLE) for file in files)


def _names_other(kwargs: DictConfig) -> bool:
    path, folder = kwargs.get("path"), kwargs.get("data_dir")
    return bool(folder) or (isinstance(path, str) and ("/" in path or Path(path).is_dir()))


def _is_other(kwargs: DictConfig) -> bool:
    return not _of_sample(kwargs) and (bool(_texts(kwargs.get("data_files"))) or _names_other(kwargs))
