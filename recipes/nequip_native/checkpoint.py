# SPDX-License-Identifier: Apache-2.0
"""Save and resume a run under any strategy, on any number of ranks.

A checkpoint is a folder `step_<n>/`: DCP's shards of model, optimizer, averaged weights and RNG, `run.json` with the
rest, and checksums (common/step_folder.py). A save that fails is reported and training goes on; nothing is deleted
before its successor is complete.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import metrics
from build_model import facts, harmless_keys
from common import safe_reading
from common.changes import check_start, comparable, may_change, told
from common.distributed import TIMEOUT, Distributed, SharedError, unwrapped
from common.ema import EMA
from common.files import make_folder, moved_aside, short
from common.kept_steps import (
    best_step,
    check_metric,
    check_room,
    fingerprint,
    frozen_names,
    is_better,
    with_past,
)
from common.redaction import redacted
from common.run_end import Outcome
from common.safe_reading import pickled_scales_allowed, read_metadata
from common.step_folder import (
    StepWriter,
    complete_steps,
    copy_offsets,
    damage,
    has_own_offsets,
    lock,
    set_aside,
    steps_for_all,
    tidy_litter,
    unlock,
)
from export import export


# A change of these keys on resume, and of the recipe's own `harmless_keys`, moves the trajectory by rounding at most;
# others are refused unless allowed.
HARMLESS = (
    "checkpoint.", "logger.", "wandb_init_args.", "validation.", "num_train_steps", "use_torch_compile",
    "use_activation_checkpointing", "precision", "deterministic", "dataset.num_workers", "anomalies.", "ema_decay",
)  # fmt: skip


class Checkpointer:
    """Saves every `save_every_n_steps` and at the end, keeps the newest `max_to_keep`, and resumes from the newest.

    `shape` is the model's configuration, as build_model.py has it, `model` the model before it is split. With
    `trained_only` what is frozen is left out, and read from `init_from` again. Raises ValueError, before anything is
    built, for a folder that cannot serve.
    """

    def __init__(
        self,
        distributed: Distributed,
        config: DictConfig,
        shape,
        model: torch.nn.Module,
        *,
        ckpt_dir: str | None = None,
        save_every_n_steps: int | None = None,
        resume_from_checkpoint: bool = True,
        save_final_model: bool = False,
        async_save: bool = False,
        max_to_keep: int | None = 2,
        keep_best: str | None = None,
        trained_only: bool = False,
        allow_config_change: bool = False,
        allow_pickled_scales: bool = False,
    ):
        self.distributed, self.async_save = distributed, async_save
        self.every, self.keep, self.allow_pickled_scales = save_every_n_steps, max_to_keep, allow_pickled_scales
        self.config = redacted(OmegaConf.to_container(config, resolve=True))
        self.folder, self.save_final_model = Path(ckpt_dir) if ckpt_dir else None, save_final_model
        self.shape, self.last_step, self.resume_step, self.notes = shape, config.num_train_steps, None, []
        self.keep_best, self.best = keep_best, None
        self.left_out, self.base = frozen_names(model, config.get("init_from")) if trained_only else set(), None
        self.pending = self.group = self.failed_step = None
        self.damaged: dict[int, str] = {}
        for key, value in (("save_every_n_steps", save_every_n_steps), ("max_to_keep", max_to_keep)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1, or null.")
        check_metric(keep_best, metrics.BETTER, config.validation.load_dataset_kwargs)
        if self.folder is None:
            if save_final_model or save_every_n_steps:
                wants = "save_final_model=true" if save_final_model else f"save_every_n_steps={save_every_n_steps}"
                raise ValueError(f"checkpoint.{wants} needs checkpoint.ckpt_dir; give it a folder to write to.")
            return
        self.config = distributed.gather(self.config)[0]  # where files lie may differ, and no rank decides by that
        make_folder("checkpoint.ckpt_dir", self.folder, distributed.rank)
        if distributed.is_main:
            lock(self.folder.resolve())
            tidy_litter(self.folder)
        self._find_newest(resume_from_checkpoint)
        if distributed.is_main:
            check_room(self.folder, model, self.left_out, config, self.resume_step or 0)
        if self.resume_step is not None:
            if self.resume_step > config.num_train_steps:
                raise ValueError(
                    f"num_train_steps={config.num_train_steps}, but checkpoint.ckpt_dir={ckpt_dir} is at step "
                    f"{self.resume_step} already; give more steps or take another folder."
                )
            self._compare(self.saved["config"], allow_config_change)
            if self.resume_step == config.num_train_steps:
                self.notes.append(
                    "That is the last step: nothing is left to train. Give more num_train_steps to continue."
                )
        elif save_final_model and (self.folder / "final_model").exists():
            raise ValueError(
                f"checkpoint.ckpt_dir={ckpt_dir} holds a final_model already; move it away, take another folder, or "
                "set checkpoint.save_final_model=false."
            )

    def _find_newest(self, resume: bool) -> None:
        """Set `resume_step` to the newest checkpoint that is whole; note those that are not."""
        steps = steps_for_all(self.distributed, self.folder)
        if steps and not resume:
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} holds step_{steps[-1]} of an earlier run; set "
                "checkpoint.resume_from_checkpoint=true to resume from it, or take another folder."
            )
        for step in reversed(steps):
            reason = damage(self._path(step), self.distributed.rank, self.distributed.num_ranks)
            found = self.distributed.gather(reason)
            if not any(found):
                self.saved = json.loads((self._path(step) / "run.json").read_text())
                if self.saved["step"] == step:
                    self.resume_step, self.best = step, self._best()
                    return
                found = [f"it is step {self.saved['step']} under another name"]
            self.damaged[step] = next(filter(None, found))
        if steps:
            reasons = "; ".join(f"step_{step}: {reason}" for step, reason in self.damaged.items())
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} holds no whole checkpoint ({reasons}); put a whole one there, or "
                "take another folder to start again."
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _compare(self, before: dict, allowed: bool) -> None:
        before, now = comparable(before), comparable(self.config)
        check_start(before, now, self.folder)
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        fixed = ("model_",)
        if self.left_out or self.saved.get("base"):  # what one run trained may not be what another leaves out
            fixed += ("adamw_kwargs.groups", "checkpoint.trained_only", "init_from_partial")
        model = [k for k in changed if k.startswith(fixed)]
        serious = [k for k in changed if not may_change(k, before, now, HARMLESS + harmless_keys(now))]
        for step, reason in self.damaged.items():
            self.notes.append(f"step_{step} is damaged and set aside as step_{step}.damaged: {reason}.")
        self.notes.append(f"Resuming from {self._path(self.resume_step)}.")
        if changes := told((k for k in changed if not k.startswith("checkpoint.")), before, now, "{} {} -> {}"):
            self.notes.append(f"Changed since: {', '.join(changes)}.")
        if model or (serious and not allowed):
            changes = "; ".join(told(model or serious, before, now, "{} was {} and is {}"))
            way_out = "" if model else ", or set checkpoint.allow_config_change=true to resume anyway"
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} was written with another configuration: {changes}; give the old "
                f"values, take another folder{way_out}."
            )
        try:
            facts(self.shape, self.saved["model"])  # another model where model_tag is a folder that has changed
        except ValueError as error:
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} holds another model: {error}, or take another folder."
            ) from error

    def first_weights(self, read: Callable) -> Mapping[str, torch.Tensor] | None:
        """What `read` gives of `init_from`, unless a checkpoint has it all. Raises ValueError if it has changed."""
        saved = self.saved.get("base") if self.resume_step is not None else None
        if self.resume_step is not None and not saved:
            return None
        weights = read()
        if self.left_out or saved:
            self.base = fingerprint(weights, saved, f"init_from={self.config['init_from']}")
        return weights

    @property
    def validates_anew(self) -> bool:
        """Whether this is a finished run that is asked for another validation than it had."""
        is_finished = self.resume_step is not None and self.resume_step == self.last_step
        return is_finished and self.saved["config"].get("validation") != self.config["validation"]

    def is_due(self, step: int, last: bool, validation: dict) -> bool:
        """Whether to save after this step; `validation` is the last one's result."""
        if self.folder is None:
            return False
        value = validation.get(self.keep_best) if validation.get("step") == step else None
        if is_better(value, self.best, metrics.BETTER.get(self.keep_best)):
            self.best = (value, step)
            return True
        return last or (self.every is not None and step % self.every == 0)

    def _best(self) -> tuple[float, int] | None:
        return best_step(self.folder, self.keep_best, metrics.BETTER[self.keep_best]) if self.keep_best else None

    def save(self, step: int, model, optimizer, ema: EMA, parts: dict, wait: bool) -> None:
        """Write `step_<step>`; in the background if `async_save` and not `wait`. Older ones go when it is complete.

        `parts` are what has a `state_dict` of JSON, by the names under which `run.json` keeps them.
        """
        self.finish()
        run = {"step": step, **{name: part.state_dict() for name, part in parts.items()}, "ema": ema.state_dict()}
        run |= {"model": facts(self.shape), "config": self.config} | ({"base": self.base} if self.base else {})
        if self.best:
            run["best"] = {"metric": self.keep_best, "value": self.best[0], "step": self.best[1]}
        writer = StepWriter(self._path(step), json.dumps(run, indent=1), self._tidy)
        state = self._state(model, optimizer, ema)
        state["model"] = {k: v for k, v in state["model"].items() if k not in self.left_out}
        del state["optimizer"]["param_groups"]  # the configuration says what is in them
        self.step = step
        if self.async_save and not wait:
            if self.group is None:  # its own, so that its messages and the training's cannot cross
                self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.pending = dcp.async_save(state, storage_writer=writer, process_group=self.group).result
        else:
            self.pending = partial(dcp.save, state, storage_writer=writer)
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background. One that failed, failed on all ranks: reported, and its folder goes."""
        if self.pending is None:
            return
        pending, self.pending, self.failed_step = self.pending, None, None
        try:
            pending()
        except CheckpointException as failure:
            self.failed_step = self.step
            for _, (error, _) in sorted(failure.failures.items()):
                if not isinstance(error, OSError):  # no disk's fault: Ctrl-C, a bug
                    raise error from None
            rank, (error, _) = min(failure.failures.items())
            self.distributed.say(
                f"step_{self.step} could not be saved, on rank {rank}: {error.strerror or error}. {self._newest()} "
                "Training continues."
            )
            if self.distributed.is_main:
                tidy_litter(self.folder)
        if self.keep_best:
            self.best = self.distributed.gather(self._best() if self.distributed.is_main else None)[0]

    def _newest(self) -> str:
        steps = complete_steps(self.folder)
        return f"The newest checkpoint is step_{steps[-1]}." if steps else "There is no checkpoint."

    def _tidy(self) -> None:
        """Remove all but the newest checkpoints and the best, and what was cut short."""
        steps, best = complete_steps(self.folder), self._best()
        for step in {*steps[: -self.keep]} - {best and best[1]} if self.keep else ():
            with suppress(OSError):  # hidden first: half of it must not look like a checkpoint
                self._path(step).rename(self.folder / f".step_{step}.old")
        tidy_litter(self.folder)

    def _state(self, model, optimizer, ema: EMA) -> dict:
        model = unwrapped(model)
        weights, moments = get_state_dict(model, optimizer)
        # DCP takes a DTensor for split evenly by rows. A parameter that is not gives its offsets to copy and moments.
        for name, parameter in model.named_parameters():
            if has_own_offsets(parameter):
                for tensor in (weights[name], *moments["state"].get(name, {}).values()):
                    if tensor.shape == parameter.shape:
                        copy_offsets(tensor, parameter._local_tensor)
        state = {"model": weights, "optimizer": moments, "ema": ema.tensors()}
        state[f"rng.cpu.{self.distributed.rank}"] = torch.get_rng_state()
        if self.distributed.device.type == "cuda":
            state[f"rng.cuda.{self.distributed.rank}"] = torch.cuda.get_rng_state()
        return state

    def load(self, model, optimizer, ema: EMA, parts: dict) -> int:
        """Put everything back as it was and return the step; 0 where there is nothing to go on from."""
        if self.resume_step is None:
            return 0
        with self.distributed.fail_together():
            for name, part in parts.items():
                # Older files have the logger's and the anomalies' at the top.
                older = self.saved if name in ("logger", "anomalies") else {}
                part.load_state_dict(self.saved.get(name, older))
        if self.distributed.is_main:
            for step in self.damaged:
                set_aside(self._path(step))
            self._tidy()
            if self.resume_step < self.last_step and (self.folder / "final_model").exists():  # of a shorter run
                kept = moved_aside(self.folder / "final_model")
                self.notes.append(f"{self.folder / 'final_model'} had fewer steps, and is kept as {kept.name}.")
        path, state = self._path(self.resume_step), self._state(model, optimizer, ema)
        configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        with self.distributed.fail_together():
            known, weights = read_metadata(path).state_dict_metadata, state["model"]
            # Scales of delayed scaling, pickled by TransformerEngine. A layer that has not computed yet has none to
            # read into; the plain layers wrote none, and then they start anew.
            saved = {
                k: known[f"model.{k}"].size for k in weights if k.endswith("_extra_state") and f"model.{k}" in known
            }
            if any(map(any, saved.values())) and not self.allow_pickled_scales:
                raise ValueError(
                    f"{path} has scales of TransformerEngine's delayed scaling, which are pickles and could run code; "
                    "set checkpoint.allow_pickled_scales=true if you trust whoever wrote it."
                )
        scales = {name: torch.empty(size, dtype=torch.uint8) for name, size in saved.items()}
        moments, groups = state["optimizer"]["state"], state["optimizer"].pop("param_groups")
        state["optimizer"]["state"] = with_past(moments, known)
        state["ema"] = {name: tensor for name, tensor in ema.tensors().items() if f"ema.{name}" in known}
        state = {k: v for k, v in state.items() if not k.startswith("rng.") or k in known}  # fewer ranks wrote fewer
        kept = (k for k in weights if k not in self.left_out and not k.endswith("_extra_state"))
        state["model"] = {k: weights[k] for k in kept} | scales
        with self.distributed.fail_together():
            safe_reading.load(state, path)
        weights |= state["model"]
        moments |= state["optimizer"]["state"]
        with pickled_scales_allowed() if scales else nullcontext():
            past = {"state": moments, "param_groups": groups}
            set_state_dict(unwrapped(model), optimizer, model_state_dict=weights, optim_state_dict=past)
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)  # as the configuration is now; the schedule has set the learning rate already
        if (rng := state.get(f"rng.cpu.{self.distributed.rank}")) is not None:
            torch.set_rng_state(rng)
        if (rng := state.get(f"rng.cuda.{self.distributed.rank}")) is not None:
            torch.cuda.set_rng_state(rng)
        new = ema.tensors().keys() - state["ema"].keys()
        self.notes += ema.load_state_dict(self.saved.get("ema", {}), model, new)
        return self.resume_step

    def stop(self, step: int) -> Outcome | None:
        """The run ends early, as it was asked to; slurm_node.sh takes note too."""
        self.finish()
        if marker := os.environ.get("STOPPED_EARLY"):
            Path(marker).touch()
        what = "the same command resumes from there."
        if self.folder is None:
            what = "nothing was saved."
        elif self.failed_step is not None:
            what = "that could not be saved."
        self.distributed.say(f"Stopped after step {step} as asked; {what}")
        if self.folder is None:
            return Outcome(
                3, "checkpoint.ckpt_dir is not set, so nothing of this run is saved, and it was stopped early."
            )
        return self._failure()

    def complete(self, step: int) -> Outcome | None:
        """The run ends with its last step, which is exported to `final_model/` by rank 0 if that is asked for."""
        self.finish()
        if self.best:
            value, best = short(self.best[0]), self.best[1]
            self.distributed.say(f"The best by {self.keep_best} in the validation is {self._path(best)}: {value}.")
        if not self.save_final_model or self.failed_step is not None:
            return self._failure()
        target = self.folder / "final_model"
        try:
            with self.distributed.shared_errors():
                if self.distributed.is_main and not target.exists():
                    self._export(step, target)
        except SharedError as error:
            return Outcome(2, str(error))
        return None

    def _export(self, step: int, target: Path) -> None:
        try:
            export(self._path(step), target)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder}: final_model could not be written: {error}; make room and "
                f"run: python export.py {self._path(step)}"
            ) from error

    def _failure(self) -> Outcome | None:
        if self.failed_step is None:
            return None
        return Outcome(
            2,
            f"checkpoint.ckpt_dir={self.folder}: step_{self.failed_step}, the last, could not be saved. "
            f"{self._newest()} Make room, and the same command resumes from there.",
        )

    def unlock(self) -> None:
        """Let go of the folder."""
        unlock()
