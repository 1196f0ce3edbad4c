# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay, what they hold, and the room that they take."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.step_folder import complete_steps


def fingerprint(weights: Mapping[str, Tensor], saved: str | None, source: str) -> str:
    """What tells these weights from others: names, shapes, and up to 64 numbers of each, spread over it.

    Raises ValueError if that is not what a checkpoint has `saved` of the `source`.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu()
        some = tensor.flatten()[:: max(1, tensor.numel() // 64)][:64].to(torch.float64)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + some.numpy().tobytes())
    found = digest.hexdigest()[:16]
    if saved not in (None, found):
        raise ValueError(
            f"{source} is not what the checkpoint was begun with, and the frozen weights are read from it; put the "
            "old one back, or start again in another folder."
        )
    return found


def frozen_names(model: nn.Module, init_from: str | None) -> set[str]:
    """What `checkpoint.trained_only` leaves out. Raises ValueError where nothing is frozen, or could be read again."""
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not names or not init_from:
        raise ValueError(
            "checkpoint.trained_only=true needs adamw_kwargs.groups of which some are frozen, and init_from, which "
            "names the weights that are then not saved."
        )
    return names


def with_past(moments: dict[str, dict[str, Tensor]], known: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of what a checkpoint has one for; that of others, frozen until then, is set to 0."""
    found = {}
    for name, tensors in moments.items():
        if all(f"optimizer.state.{name}.{key}" in known for key in tensors):
            found[name] = tensors
        else:
            for tensor in tensors.values():
                tensor.zero_()
    return found


def num_bytes(model: nn.Module, left_out: set[str], averaged: bool) -> tuple[int, int]:
    """Of a checkpoint (weights not left out; two moments of what trains, perhaps an average), and of a model."""
    sizes = {name: (p.numel() * p.element_size(), p.requires_grad) for name, p in model.named_parameters()}
    trained = sum(size for size, trains in sizes.values() if trains)
    saved = sum(size for name, (size, _) in sizes.items() if name not in left_out)
    return saved + (2 + averaged) * trained, sum(size for size, _ in sizes.values())


def check_room(folder: Path, model: nn.Module, left_out: set[str], config: DictConfig, step: int) -> None:
    """Raise ValueError unless what a run after `step` will write fits: checkpoints, and a final model.

    A new checkpoint is complete before the one that it replaces goes.
    """
    keys, steps_left = config.checkpoint, config.num_train_steps - step
    one, final = num_bytes(model, left_out, config.get("ema_decay") is not None)
    final *= bool(keys.get("save_final_model"))
    every, keep = keys.get("save_every_n_steps"), keys.get("max_to_keep", 2)
    saves = math.ceil(steps_left / every) if every else int(steps_left > 0)
    if keep is not None:
        more = keep + 1 + bool(keys.get("keep_best")) - len(complete_steps(folder))
        saves = min(saves, max(1, more))
    needed = saves * one + final
    if (free := shutil.disk_usage(folder).free) < needed:
        also = f" and a final model of {final / 2**20:,.1f}" if final else ""
        raise ValueError(
            f"checkpoint.ckpt_dir={folder} has {free / 2**20:,.1f} MiB free, and this run will write {saves} "
            f"checkpoint(s) of {one / 2**20:,.1f} MiB{also}: {needed / 2**20:,.1f} MiB; make room or take another "
            "folder, or keep fewer (checkpoint.max_to_keep)."
        )


def best_step(folder: Path, metric: str, better: Callable) -> tuple[float, int] | None:
    """Value and step of the best of the complete checkpoints that were validated when they were saved."""
    found = []
    for step in complete_steps(folder):
        try:
            run = json.loads((folder / f"step_{step}" / "run.json").read_text())
        except (OSError, ValueError):  # damaged, or removed meanwhile
            continue
        validation = run.get("logger", run).get("validation") or {}
        if validation.get("step") == step and is_number(validation.get(metric)):
            found.append((validation[metric], step))
    return better(found, key=lambda item: item[0]) if found else None  # of equal ones the first


def is_number(value) -> bool:
    """Whether it can be compared."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_better(value, best: tuple[float, int] | None, better: Callable) -> bool:
    """Whether this is a number, and better than that of the best step so far."""
    return is_number(value) and (best is None or (value != best[0] and better(value, best[0]) == value))


def check_metric(keep_best: str | None, known: Mapping[str, Callable], validation: Mapping | None) -> None:
    """Raise ValueError for a metric that there will not be."""
    if keep_best and keep_best not in known:
        raise ValueError(f"checkpoint.keep_best={keep_best} must be one of {', '.join(known)}, or null.")
    if keep_best and not validation:
        raise ValueError(f"checkpoint.keep_best={keep_best} needs a validation: give validation.load_dataset_kwargs.")
