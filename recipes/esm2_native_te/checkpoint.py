# SPDX-License-Identifier: Apache-2.0
"""Save and resume a run under any strategy, on any number of ranks.

A checkpoint is a folder `step_<n>/`: DCP's shards of model, optimizer and RNG, and `run.json` with the rest. DCP
writes `.metadata` last, and only a folder that has it counts.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from distributed import Distributed
from export import export
from modeling_esm2 import Esm2Config


# A change of these keys on resume moves the trajectory by rounding at most; others are refused unless allowed.
HARMLESS = (
    "checkpoint.", "logger.", "wandb_init_args.", "validation.", "num_train_steps", "use_sequence_packing",
    "use_torch_compile", "use_activation_checkpointing", "layer_backend", "precision", "deterministic",
    "dataset.num_workers",
)  # fmt: skip


def complete_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints were written to the end, oldest first."""
    return sorted(
        int(found.parent.name[5:]) for found in folder.glob("step_*/.metadata") if found.parent.name[5:].isdigit()
    )


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


def knows_its_place(tensor: torch.Tensor) -> bool:
    """Whether this is a shard of an uneven split that can say which rows it holds."""
    return hasattr(getattr(tensor, "_local_tensor", None), "__create_chunk_list__")


def tell_its_place(tensor: DTensor, shard: torch.Tensor) -> None:
    """Let a tensor that is split like `shard` say so."""
    tensor._local_tensor.__create_chunk_list__ = shard.__create_chunk_list__
    tensor._local_tensor.__create_write_items__ = shard.__create_write_items__


def copied(value):
    """A copy of a CPU tensor, which the optimizer would go on writing to while it is saved; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    copy = value.clone()
    if knows_its_place(value):
        tell_its_place(copy, value._local_tensor)
    return copy


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
        self.pending = self.group = None
        for key, value in (("save_every_n_steps", save_every_n_steps), ("max_to_keep", max_to_keep)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key}={value} must be at least 1, or null.")
        if self.folder is None:
            if save_final_model or save_every_n_steps:
                wants = "save_final_model=true" if save_final_model else f"save_every_n_steps={save_every_n_steps}"
                raise ValueError(f"checkpoint.{wants} needs checkpoint.ckpt_dir; give it a folder to write to.")
            return
        make_folder("checkpoint.ckpt_dir", self.folder, distributed.rank)
        needed = 16 * num_parameters  # FP32 weights and two moments, and the final model
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise ValueError(
                f"checkpoint.ckpt_dir={self.folder} has {free / 2**20:,.1f} MiB free, and a checkpoint and the final "
                f"model take {needed / 2**20:,.1f} MiB; make room or take another folder."
            )
        if save_final_model and (self.folder / "final_model").exists():
            raise ValueError(
                f"checkpoint.ckpt_dir={ckpt_dir} has a final_model already; move it away, take another folder, or set "
                "checkpoint.save_final_model=false."
            )
        if steps := complete_steps(self.folder):
            if not resume_from_checkpoint:
                raise ValueError(
                    f"checkpoint.ckpt_dir={ckpt_dir} holds step_{steps[-1]} of an earlier run; set "
                    "checkpoint.resume_from_checkpoint=true to go on from it, or take another folder."
                )
            self.resume_step = steps[-1]
            if self.resume_step > config.num_train_steps:
                raise ValueError(
                    f"num_train_steps={config.num_train_steps}, but checkpoint.ckpt_dir={ckpt_dir} is at step "
                    f"{self.resume_step} already; give more steps or take another folder."
                )
            self.saved = json.loads((self._path(self.resume_step) / "run.json").read_text())
            self._compare(self.saved["config"], allow_config_change)
            if self.resume_step == config.num_train_steps:
                self.notes.append(
                    "That is the last step: nothing is left to train. Give more num_train_steps to go on."
                )
            model_config.rope_inv_freq_dtype = self.saved["model"]["rope_inv_freq_dtype"]

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _compare(self, before: dict, allowed: bool) -> None:
        before, now = flat(before), flat(self.config)
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        model = [k for k in changed if k.startswith("model_")]
        serious = [k for k in changed if not k.startswith(HARMLESS)]
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

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to save after this step."""
        return self.folder is not None and (last or (self.every is not None and step % self.every == 0))

    def save(self, step: int, model, optimizer, scheduler, loader, progress: dict, wait: bool) -> None:
        """Write `step_<step>`; in the background if `async_save` and not `wait`. Older ones go when it is complete."""
        self.finish()
        path, state = self._path(step), self._state(model, optimizer)
        rest = {"step": step, "scheduler": scheduler.state_dict(), "loader": loader.state_dict(), **progress}
        if self.distributed.is_main:
            shutil.rmtree(path, ignore_errors=True)  # what a killed run left of this step
            path.mkdir(parents=True)
            (path / "run.json").write_text(
                json.dumps(rest | {"model": self.model_config.to_dict(), "config": self.config}, indent=1)
            )
        dist.barrier()
        # On a GPU, DCP's own copy of an uneven shard would not know its place any more.
        uneven = any(map(knows_its_place, state["model"].values())) and self.distributed.device.type == "cuda"
        if self.async_save and not wait and not uneven:
            if self.group is None:  # its own, so that its messages and the training's cannot cross
                self.group = dist.new_group(backend="gloo")
            self.pending = dcp.async_save(tree_map(copied, state), checkpoint_id=path, process_group=self.group)
        else:
            dcp.save(state, checkpoint_id=path)
            self._prune()

    def finish(self) -> None:
        """Wait for a save in the background."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
            dist.barrier()
            self._prune()

    def _prune(self) -> None:
        if not self.distributed.is_main:
            return
        steps = complete_steps(self.folder)
        keep = set(steps[-self.keep :] if self.keep else steps)
        for found in self.folder.glob("step_*"):
            if found.name[5:].isdigit() and int(found.name[5:]) not in keep and int(found.name[5:]) < steps[-1]:
                (found / ".metadata").unlink(missing_ok=True)  # first, so that a half-deleted one does not count
                shutil.rmtree(found, ignore_errors=True)

    def _state(self, model, optimizer) -> dict:
        model = getattr(model, "module", model)  # what is inside a wrapper
        weights, moments = get_state_dict(model, optimizer)
        # DCP takes a DTensor for split evenly by rows. A parameter that knows better tells its copy and its moments.
        for name, parameter in model.named_parameters():
            if knows_its_place(parameter):
                weights[name] = weights[name].clone()  # a view into a larger buffer cannot be staged for an async save
                for tensor in (weights[name], *moments["state"].get(name, {}).values()):
                    if tensor.shape == parameter.shape:
                        tell_its_place(tensor, parameter._local_tensor)
        state = {"model": weights, "optimizer": moments, f"rng.cpu.{self.distributed.rank}": torch.get_rng_state()}
        if self.distributed.device.type == "cuda":
            state[f"rng.cuda.{self.distributed.rank}"] = torch.cuda.get_rng_state()
        return state

    def load(self, model, optimizer, scheduler, loader) -> dict:
        """Put everything back as it was and return the progress, with `step`; {"step": 0} where there is nothing."""
        found: list[int | None] = [None] * self.distributed.num_ranks
        dist.all_gather_object(found, self.resume_step)
        with self.distributed.one_voice():
            if len(set(found)) > 1:
                raise ValueError(
                    f"checkpoint.ckpt_dir={self.folder}: the ranks see different newest steps, {found}; it has to be "
                    "one folder that all nodes share."
                )
            if self.resume_step is not None:
                loader.load_state_dict(self.saved["loader"])
        if self.resume_step is None:
            return {"step": 0}
        path, state = self._path(self.resume_step), self._state(model, optimizer)
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        weights = state["model"]
        state = {k: v for k, v in state.items() if not k.startswith("rng.") or k in known}  # fewer ranks wrote fewer
        # FP8 state is TransformerEngine's: the plain layers wrote none, and then it starts anew.
        state["model"] = {k: v for k, v in weights.items() if not k.endswith("_extra_state") or f"model.{k}" in known}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            getattr(model, "module", model),
            optimizer,
            model_state_dict=weights | state["model"],
            optim_state_dict=state["optimizer"],
        )
        if (rng := state.get(f"rng.cpu.{self.distributed.rank}")) is not None:
            torch.set_rng_state(rng)
        if (rng := state.get(f"rng.cuda.{self.distributed.rank}")) is not None:
            torch.cuda.set_rng_state(rng)
        scheduler.load_state_dict(self.saved["scheduler"])
        return {k: v for k, v in self.saved.items() if k in ("step", "num_tokens", "validation")}

    def advice(self) -> str:
        """What to tell who stopped the run."""
        if self.folder is None:
            return "nothing was saved, because checkpoint.ckpt_dir is not set."
        return "the same command goes on from there."

    def save_final(self, step: int) -> Path | None:
        """Export the last checkpoint to `final_model/` on rank 0, if that is asked for."""
        self.finish()
        if not self.save_final_model:
            return None
        if self.distributed.is_main:
            export(self._path(step), self.folder / "final_model")
        dist.barrier()
        return self.folder / "final_model"
