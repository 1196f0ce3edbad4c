# SPDX-License-Identifier: Apache-2.0
"""Save and resume a run under any strategy, on any number of ranks.

A checkpoint is a folder `step_<n>/`: DCP's shards of model, optimizer and RNG, `run.json` with the rest, and checksums
(step_folder.py). A save that fails is told and training goes on; nothing is deleted before its successor is complete.
"""

import json
import os
import shutil
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from distributed import TIMEOUT, Distributed, stop_with, unwrapped
from export import export
from modeling_esm2 import Esm2Config
from step_folder import (
    StepWriter,
    complete_steps,
    damage,
    knows_its_place,
    lock,
    numbered,
    set_aside,
    tell_its_place,
    unlock,
)


# A change of these keys on resume moves the trajectory by rounding at most; others are refused unless allowed.
HARMLESS = (
    "checkpoint.", "logger.", "wandb_init_args.", "validation.", "num_train_steps", "use_sequence_packing",
    "use_torch_compile", "use_activation_checkpointing", "layer_backend", "precision", "deterministic",
    "dataset.num_workers", "anomalies.", "cp_size",
)  # fmt: skip

SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


def make_folder(key: str, folder: Path, rank: int) -> None:
    """Make a folder and write to it. Raises ValueError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe_{rank}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be written: {error.strerror}; give another folder.") from error


def flat(config: dict, prefix: str = "") -> dict:
    """Nested keys as `section.key`."""
    items = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return items


class Checkpointer:
    """Saves every `save_every_n_steps` and at the end, keeps the newest `max_to_keep`, and resumes from the newest.

    Raises ValueError, before anything is built, for a folder that cannot serve.
    """

    def __init__(
        self,
        distributed: Distributed,
        config: DictConfig,
        num_parameters: int,
        model_config: Esm2Config,
        *,
        ckpt_dir: str | None = None,
        save_every_n_steps: int | None = None,
        resume_from_checkpoint: bool = True,
        save_final_model: bool = False,
        async_save: bool = False,
        max_to_keep: int | None = 2,
        allow_config_change: bool = False,
    ):
        self.distributed, self.async_save = distributed, async_save
        self.every, self.keep = save_every_n_steps, max_to_keep
        self.config = OmegaConf.to_container(config, resolve=True)
        self.folder, self.save_final_model = Path(ckpt_dir) if ckpt_dir else None, save_final_model
        self.model_config, self.resume_step, self.notes = model_config, None, []
        self.pending = self.group = self.failed_step = None
        self.lost = False
        self.damaged: dict[int, str] = {}
        for key, value in (("save_every_n_steps", save_every_n_steps), ("max_to_keep", max_to_keep)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1, or null.")
        if self.folder is None:
            if save_final_model or save_every_n_steps:
                wants = "save_final_model=true" if save_final_model else f"save_every_n_steps={save_every_n_steps}"
                raise ValueError(f"checkpoint.{wants} needs checkpoint.ckpt_dir; give it a folder to write to.")
            return
        make_folder("checkpoint.ckpt_dir", self.folder, distributed.rank)
        if distributed.is_main:
            lock(self.folder.resolve())
            self._tidy_litter()
            needed = 16 * num_parameters  # FP32 weights and two moments, and the final model
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise ValueError(
                    f"checkpoint.ckpt_dir={self.folder} has {free / 2**20:,.1f} MiB free, and a checkpoint and the "
                    f"final model take {needed / 2**20:,.1f} MiB; make room or take another folder."
                )
        self._find_newest(resume_from_checkpoint)
        if self.resume_step is not None:
            if self.resume_step > config.num_train_steps:
                raise ValueError(
                    f"num_train_steps={config.num_train_steps}, but checkpoint.ckpt_dir={ckpt_dir} is at step "
                    f"{self.resume_step} already; give more steps or take another folder."
                )
            self._compare(self.saved["config"], allow_config_change)
            if self.resume_step == config.num_train_steps:
                self.notes.append(
                    "That is the last step: nothing is left to train. Give more num_train_steps to go on."
                )
            model_config.rope_inv_freq_dtype = self.saved["model"]["rope_inv_freq_dtype"]
        # A run that is killed after its export, and started again, has nothing left to do.
        if save_final_model and (self.folder / "final_model").exists() and self.resume_step != config.num_train_steps:
            raise ValueError(
                f"checkpoint.ckpt_dir={ckpt_dir} holds a final_model already; move it away, take another folder, or "
                "set checkpoint.save_final_model=false."
            )

    def _find_newest(self, resume: bool) -> None:
        """Set `resume_step` to the newest checkpoint that is whole; note those that are not."""
        probe = self.folder / f".shared_{uuid.uuid4().hex}"
        if self.distributed.is_main:
            probe.touch()
        probe = self.distributed.gather(probe)[0]
        steps = numbered(self.folder)
        seen = self.distributed.gather((probe.exists(), steps))
        if self.distributed.is_main:
            probe.unlink()
        if any(other != (True, steps) for other in seen):
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} is not the same folder for all ranks; it has to be one that all "
                "nodes share."
            )
        if steps and not resume:
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} holds step_{steps[-1]} of an earlier run; set "
                "checkpoint.resume_from_checkpoint=true to go on from it, or take another folder."
            )
        for step in reversed(steps):
            reason = damage(self._path(step), self.distributed.rank, self.distributed.num_ranks)
            found = self.distributed.gather(reason)
            if not any(found):
                self.saved = json.loads((self._path(step) / "run.json").read_text())
                if self.saved["step"] == step:
                    self.resume_step = step
                    return
                found = [f"it is step {self.saved['step']} under another name"]
            self.damaged[step] = next(filter(None, found))
        if steps:
            told = "; ".join(f"step_{step}: {reason}" for step, reason in self.damaged.items())
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} holds no whole checkpoint ({told}); put a whole one there, or "
                "take another folder to start anew."
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _compare(self, before: dict, allowed: bool) -> None:
        before, now = flat(before), flat(self.config)
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        model = [k for k in changed if k.startswith("model_")]
        serious = [k for k in changed if not k.startswith(HARMLESS)]
        for step, reason in self.damaged.items():
            self.notes.append(f"step_{step} is damaged and set aside as step_{step}.damaged: {reason}.")
        self.notes.append(f"Going on from {self._path(self.resume_step)}.")
        if told := [f"{k} {before.get(k)} -> {now.get(k)}" for k in changed if not k.startswith("checkpoint.")]:
            self.notes.append(f"Changed since: {', '.join(told)}.")
        if model or (serious and not allowed):
            told = "; ".join(f"{k} was {before.get(k)} and is {now.get(k)}" for k in model or serious)
            way_out = "" if model else ", or set checkpoint.allow_config_change=true to go on all the same"
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} was written with another configuration: {told}; give the old "
                f"values, take another folder{way_out}."
            )
        shape, found = self.model_config.to_dict(), self.saved["model"]  # where model_tag is a folder that has changed
        if wrong := [k for k in SHAPE if shape[k] != found[k]]:
            told = ", ".join(f"{k} was {found[k]} and is {shape[k]}" for k in wrong)
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} holds another model: {told}; give model_tag or model_kwargs of "
                "that size, or take another folder."
            )

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to save after this step."""
        return self.folder is not None and (last or (self.every is not None and step % self.every == 0))

    def save(self, step: int, model, optimizer, scheduler, loader, progress: dict, wait: bool) -> None:
        """Write `step_<step>`; in the background if `async_save` and not `wait`. Older ones go when it is complete."""
        self.finish()
        run = {"step": step, "scheduler": scheduler.state_dict(), "loader": loader.state_dict(), **progress}
        run |= {"model": self.model_config.to_dict(), "config": self.config}
        writer, state = StepWriter(self._path(step), json.dumps(run, indent=1)), self._state(model, optimizer)
        self.step = step
        if self.async_save and not wait:
            if self.group is None:  # its own, so that its messages and the training's cannot cross
                self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.pending = dcp.async_save(state, storage_writer=writer, process_group=self.group).result
        else:
            self.pending = partial(dcp.save, state, storage_writer=writer)
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background. One that failed, failed on all ranks; it is told, and its folder goes."""
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
                "Training goes on."
            )
        if self.distributed.is_main:
            self._tidy()
        dist.barrier()

    def _newest(self) -> str:
        steps = complete_steps(self.folder)
        return f"The newest checkpoint is step_{steps[-1]}." if steps else "There is no checkpoint."

    def _tidy(self) -> None:
        """Remove all but the newest checkpoints, and what was cut short."""
        steps = complete_steps(self.folder)
        for step in steps[: -self.keep] if self.keep else []:
            with suppress(OSError):  # hidden first: half of it must not look like a checkpoint
                self._path(step).rename(self.folder / f".step_{step}.old")
        self._tidy_litter()

    def _tidy_litter(self) -> None:
        for pattern in (".step_*.old", ".step_*.partial", ".final_model.partial"):
            for litter in self.folder.glob(pattern):
                shutil.rmtree(litter, ignore_errors=True)
        for probe in self.folder.glob(".shared_*"):
            with suppress(OSError):
                probe.unlink()

    def _state(self, model, optimizer) -> dict:
        model = unwrapped(model)
        weights, moments = get_state_dict(model, optimizer)
        # DCP takes a DTensor for split evenly by rows. A parameter that knows better tells its copy and its moments.
        for name, parameter in model.named_parameters():
            if knows_its_place(parameter):
                for tensor in (weights[name], *moments["state"].get(name, {}).values()):
                    if tensor.shape == parameter.shape:
                        tell_its_place(tensor, parameter._local_tensor)
        state = {"model": weights, "optimizer": moments, f"rng.cpu.{self.distributed.rank}": torch.get_rng_state()}
        if self.distributed.device.type == "cuda":
            state[f"rng.cuda.{self.distributed.rank}"] = torch.cuda.get_rng_state()
        return state

    def load(self, model, optimizer, scheduler, loader) -> dict:
        """Put everything back as it was and return the progress, with `step`; {"step": 0} where there is nothing."""
        if self.resume_step is None:
            return {"step": 0}
        with self.distributed.one_voice():
            loader.load_state_dict(self.saved["loader"])
        if self.distributed.is_main:
            for step in self.damaged:
                set_aside(self._path(step))
            self._tidy()
        path, state = self._path(self.resume_step), self._state(model, optimizer)
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        weights = state["model"]
        state = {k: v for k, v in state.items() if not k.startswith("rng.") or k in known}  # fewer ranks wrote fewer
        # Scales of delayed scaling, pickled by TransformerEngine. A layer that has not computed yet has none to read
        # into; the plain layers wrote none, and then they start anew.
        saved = (k for k in weights if k.endswith("_extra_state") and f"model.{k}" in known)
        scales = {k: torch.empty(known[f"model.{k}"].size, dtype=torch.uint8) for k in saved}
        state["model"] = {k: v for k, v in weights.items() if not k.endswith("_extra_state")} | scales
        if scales:  # as much to be trusted as .metadata, which is a pickle too
            os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            unwrapped(model),
            optimizer,
            model_state_dict=weights | state["model"],
            optim_state_dict=state["optimizer"],
        )
        if (rng := state.get(f"rng.cpu.{self.distributed.rank}")) is not None:
            torch.set_rng_state(rng)
        if (rng := state.get(f"rng.cuda.{self.distributed.rank}")) is not None:
            torch.cuda.set_rng_state(rng)
        scheduler.load_state_dict(self.saved["scheduler"])
        return {k: v for k, v in self.saved.items() if k not in ("scheduler", "loader", "model", "config")}

    def stopped(self) -> str:
        """Take note that the run was stopped early, for slurm_node.sh too; what to tell who did it."""
        if marker := os.environ.get("STOPPED_EARLY"):
            Path(marker).touch()
        self.lost = self.folder is None
        if self.lost:
            return "nothing was saved."
        if self.failed_step is not None:
            return "that could not be saved."
        return "the same command goes on from there."

    def save_final(self, step: int) -> None:
        """Export the last checkpoint to `final_model/` on rank 0, if that is asked for and not done."""
        self.finish()
        wanted = self.save_final_model and self.failed_step is None
        target = self.folder / "final_model" if wanted else None
        with self.distributed.one_voice():
            if target and self.distributed.is_main and not target.exists():
                try:
                    export(self._path(step), target)
                except (OSError, SafetensorError) as error:
                    raise ValueError(
                        f"checkpoint.ckpt_dir={self.folder}: final_model could not be written: {error}; make room and "
                        f"run: python export.py {self._path(step)}"
                    ) from error

    def close(self) -> None:
        """Let go of the folder. If what the run did is lost, it ends with that sentence."""
        unlock()
        if self.lost:
            stop_with("checkpoint.ckpt_dir is not set, so nothing of this run is saved, and it was stopped early.", 3)
        if self.failed_step is not None:
            stop_with(
                f"checkpoint.ckpt_dir={self.folder}: step_{self.failed_step}, the last, could not be saved. "
                f"{self._newest()} Make room, and the same command goes on from there."
            )
