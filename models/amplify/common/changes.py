# SPDX-License-Identifier: Apache-2.0
"""What has changed between the configuration of a checkpoint and that of the run that goes on from it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common import RECIPE
from common.files import flat, names
from common.type_hints import as_text


DEFAULTS = RECIPE / "hydra_config" / "defaults.yaml"
# Keys that say where data lies, not which it is: that a resume sees by its sizes and content.
PLACES = re.compile(r"\.(data_files|data_dir|\w+_database|\w+_file)(\.\w+)?$")
# Of `datasets.load_dataset`: how data is fetched and kept.
NO_MATTER = re.compile(r"load_dataset_kwargs\.(cache_dir|num_proc|token|storage_options|download_\w+|keep_in_memory|"
                       r"verification_mode)\b")  # fmt: skip


def comparable(config: dict) -> dict[str, Any]:
    """Each key with its value: files and folders by their names alone, and the default of what `config` lacks.

    So a recipe may move, and a key that is newer than a checkpoint is no change.
    """
    defaults = OmegaConf.to_container(OmegaConf.load(DEFAULTS))
    whole = OmegaConf.merge({k: v for k, v in defaults.items() if k not in ("defaults", "hydra")}, config)
    found = flat(OmegaConf.to_container(whole, resolve=True, throw_on_missing=False))
    return {key: _named(key, value) for key, value in found.items() if not NO_MATTER.search(key)}


def _named(key: str, value: Any) -> Any:
    if not PLACES.search(key):
        return names(value)
    if isinstance(value, list):
        return [_named(key, item) for item in value]
    return Path(value).name if isinstance(value, str) and "://" not in value else value


def check_start(before: dict, now: dict, folder: Path) -> None:
    """Raise ValueError for other weights to start from: a run that goes on has those of its checkpoint."""
    was, is_ = before.get("init_from"), now.get("init_from")
    if was != is_:
        was, is_ = as_text(was), as_text(is_)
        raise ValueError(
            f"init_from was {was} and is {is_}, but checkpoint.ckpt_dir={folder} has weights to resume from; give "
            f"init_from={was}, or take another folder to start from other ones."
        )


def told(keys: Iterable[str], before: dict, now: dict, words: str) -> list[str]:
    """Each key in these words, with what it was and what it is as a user writes it."""
    return [words.format(key, as_text(before.get(key)), as_text(now.get(key))) for key in keys]


def may_change(key: str, before: dict, now: dict, safe: tuple[str, ...]) -> bool:
    """Whether `key` begins as one of `safe`, or is the length of a schedule as long as a run that got more steps."""
    length, steps = now.get("lr_scheduler_kwargs.num_training_steps"), now["num_train_steps"]
    is_stretched = key == "lr_scheduler_kwargs.num_training_steps" and length == steps > before["num_train_steps"]
    return is_stretched or key.startswith(safe)
