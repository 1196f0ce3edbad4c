# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: progress on the terminal, `metrics.jsonl`, `run.json`, `config.yaml`, and W&B if asked."""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common.batch import Batch
from common.distributed import Distributed
from common.files import append_line, finite, make_folder, short
from common.own_data import data_names, no_validation
from common.precision import Precision
from common.redaction import redacted, redacted_command
from common.run_facts import (
    code_hash,
    device_name,
    git_commit,
    peak_memory_gib,
    peak_of,
    start_wandb,
    versions,
)
from common.step_folder import lock


def before(file: Path, number: int) -> Path:
    """Where the file of an earlier run is kept."""
    return file.with_name(f"{file.stem}.before_{number}{file.suffix}")


class PerfLogger:
    """Counts what goes through the model and reports it every `frequency` steps, over the whole window between.

    `metrics` is the recipe's metrics.py: `UNIT` names the count that throughput goes by, `LOSS_NAME` the loss in
    plots. `flops(batch)` are the operations of one training step on a batch.
    """

    def __init__(
        self,
        distributed: Distributed,
        config: DictConfig,
        model: torch.nn.Module,
        flops: Callable[[Batch], float],
        precision: Precision,
        metrics,
        script: str,
        *,
        frequency: int = 10,
        log_dir: str | None = None,
        peak_tflops: float | None = None,
    ):
        if frequency < 1:
            raise ValueError(f"logger.frequency={frequency} must be at least 1.")
        self.distributed, self.flops, self.frequency, self.unit = distributed, flops, frequency, metrics.UNIT
        self.folder = Path(log_dir) if log_dir else None
        self.curves = getattr(metrics, "CURVES", {})  # what is shown of a validation, by title; else all of it
        self.num_steps, self.num_units, self.validation = config.num_train_steps, 0, {}
        # What figures of a validation are of, for whoever reads them elsewhere.
        kwargs = OmegaConf.to_container(config, resolve=True).get("validation", {}).get("load_dataset_kwargs")
        self.validated_on, self.weights = data_names(redacted(kwargs)), "averaged" if config.get("ema_decay") else None
        self.best: dict = {}  # the lowest loss of a validation, its step, and training's loss before it
        self.losses = (0.0, 0)  # of training since the last validation: their sum, and how many
        self.wandb = self.bar = None
        self.is_full, self.going_on_from = False, None
        self.notes, self.stats = [*precision.notes, no_validation(config)], precision.stats
        num_parameters = sum(p.numel() for p in model.parameters())
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.peak, source = peak_of(
            distributed.device, precision.dtype or torch.float32, precision.product, peak_tflops
        )
        self.run = {
            "run_id": uuid.uuid4().hex[:12],  # kept when the run goes on: whose lines metrics.jsonl has
            "model_tag": config.model_tag, "num_parameters": num_parameters, "num_trained": num_trained,
            "unit": metrics.UNIT, "loss_name": metrics.LOSS_NAME, "curves": self.curves,
            "strategy": Path(script).stem.removeprefix("train_"),
            "num_ranks": distributed.num_ranks, "ranks_per_micro_batch": distributed.group_size,
            "device": device_name(distributed.device), "threads_per_rank": torch.get_num_threads(),
            "layer_backend": precision.backend, "precision": precision.name,
            "low_precision": precision.layers, "peak_tflops_per_rank": self.peak, "peak_source": source,
            "code_sha256": code_hash(), "git": git_commit(), "versions": versions(),
            "command": redacted_command(sys.argv),
        }  # fmt: skip
        if not distributed.is_main:
            return
        if self.folder:
            make_folder("logger.log_dir", self.folder, distributed.rank)
            lock(self.folder.resolve(), name="logger.log_dir=")
        self.config = redacted(OmegaConf.to_container(config, resolve=True))
        arguments = OmegaConf.to_container(config.wandb_init_args, resolve=True)
        self.wandb = start_wandb(self.run | {"config": self.config}, **arguments)

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the counts."""
        state = {"run_id": self.run["run_id"], f"num_{self.unit}": self.num_units, "validation": self.validation}
        return state | ({"best": self.best} if self.best else {})

    def load_state_dict(self, state: dict) -> None:
        """Go on counting from there."""
        self.num_units, self.validation = state.get(f"num_{self.unit}", 0), state.get("validation", {})
        self.run["run_id"] = state.get("run_id", self.run["run_id"])
        self.going_on_from = state.get("run_id")
        self.best = state.get("best", {})

    def start(self, step: int, notes: list[str | None]) -> None:
        """Begin after `step`: what a killed run wrote past it is dropped, an earlier run's file is kept."""
        self._reset_window()
        if self.stats:
            self.stats.begin(step + 1)
        if not self.distributed.is_main:
            return
        if self.folder:
            try:
                self._open_metrics(step)
                (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(self.config))
                (self.folder / "run.json").write_text(json.dumps(self.run, indent=1) + "\n")
            except OSError as error:
                self.distributed.say(f"{self.folder}: {error.strerror}. Training continues without it.")
        interactive = sys.stderr.isatty()
        self.bar = tqdm(total=self.num_steps, initial=step, unit="step", disable=not interactive, dynamic_ncols=True)
        run = self.run
        number = run["num_parameters"]
        size = f"{number:,}" if number < 1e6 else f"{number / 1e6:,.1f}M"
        trained = "" if run["num_trained"] == run["num_parameters"] else f", {run['num_trained']:,} trained"
        self.distributed.say(
            f"{run['model_tag']} ({size} parameters{trained}), {run['strategy']}, "
            f"{run['num_ranks']} x {run['device']}, {run['precision']}; {self.folder or 'no folder'} for metrics.jsonl"
        )
        for note in filter(None, (*self.notes, *notes)):
            self.distributed.say(note)

    def _open_metrics(self, step: int) -> None:
        path, kept = self.folder / "metrics.jsonl", []
        # torchrun has started this run again, before its first checkpoint: what is there is no earlier run's.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        is_anothers = self.going_on_from is not None and self._written_by() not in (None, self.going_on_from)
        if path.exists() and ((step == 0 and not restarted) or is_anothers):
            files = [self.folder / name for name in ("metrics.jsonl", "anomalies.jsonl", "run.json", "config.yaml")]
            number = next(n for n in count(1) if not any(before(file, n).exists() for file in files))
            for file in files:
                if file.exists():
                    file.rename(before(file, number))
        elif path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:  # cut off by the kill
                    continue
        new = path.with_name(".metrics.jsonl")
        new.write_text("".join(kept))
        new.replace(path)  # killed here, the old lines are still there

    def _written_by(self) -> str | None:
        """Which run wrote to the folder before."""
        try:
            return json.loads((self.folder / "run.json").read_text()).get("run_id")
        except (OSError, ValueError):
            return None

    def _reset_window(self) -> None:
        self.start_time = time.perf_counter()
        self.window = {"steps": 0, "units": 0, "slots": 0, "flops": 0.0, "data_wait": 0.0}

    def count(self, batches: list[Batch], counts: dict[str, int], epoch: int, data_wait_s: float) -> None:
        """One step of this rank's batches, begun in this epoch; `counts` are those of all ranks."""
        self.epoch = epoch
        self.num_units += counts[self.unit]
        self.first_micro_batch = list(batches[0].name)  # of the step, on the first rank
        self.window["steps"] += 1
        self.window["data_wait"] += data_wait_s
        for batch in batches:
            self.window["units"] += batch.counts[self.unit]
            self.window["slots"] += batch.num_slots
            self.window["flops"] += self.flops(batch)

    def log_step(self, step: int, losses: dict[str, float], grad_norm: float, learning_rate: float) -> None:
        """Report, if this step is one to report; all ranks call it, with the whole step's `loss` and its parts."""
        self.losses = (self.losses[0] + losses["loss"], self.losses[1] + 1)
        if self.bar is not None:
            self.bar.update()
        if self.stats:
            if rounding := self.stats.take():
                self._write({"kind": "quantization", "step": step, "tensors": rounding})
            self.stats.begin(step + 1)
        if step % self.frequency and step != self.num_steps:
            return
        seconds, window, num_ranks = time.perf_counter() - self.start_time, self.window, self.distributed.num_ranks
        # The loss is a number on the CPU already, so the device has done what these seconds are counted for.
        units, slots, flops, wait = self.distributed.sum(
            window["units"], window["slots"], window["flops"], window["data_wait"]
        )
        memory = self.distributed.max(peak_memory_gib(self.distributed.device))
        tflops, speed = flops / seconds / 1e12, units / seconds
        self._write(
            {
                "kind": "train", "step": step, "epoch": self.epoch, "first_micro_batch": self.first_micro_batch,
                **losses, "grad_norm": grad_norm, "learning_rate": learning_rate,
                f"{self.unit}_per_second": speed, f"num_{self.unit}": self.num_units, "fill": units / slots,
                "step_time_s": seconds / window["steps"], "data_wait_s": wait / num_ranks / window["steps"],
                "peak_memory_gib": memory, "model_tflops": tflops,
                "peak_share": tflops / num_ranks / self.peak if self.peak else None,
            }
        )  # fmt: skip
        if self.bar is not None:
            left = (self.num_steps - step) * seconds / window["steps"]
            self.bar.set_postfix_str(f"epoch {self.epoch}, loss {short(losses['loss'])}, {speed:,.0f} {self.unit}/s")
            if self.bar.disable:
                terms = [(k.removesuffix("_loss"), v) for k, v in losses.items() if k != "loss" and v]  # 0: no labels
                of_terms = f" ({', '.join(f'{name} {short(value)}' for name, value in terms)})" if terms else ""
                self.distributed.say(
                    f"step {step}/{self.num_steps}  epoch {self.epoch}  loss {short(losses['loss'])}{of_terms}  "
                    f"grad norm {short(grad_norm, 3)}  lr {learning_rate:.2e}  {speed:,.0f} {self.unit}/s  "
                    f"{left / 60:.1f} min left"
                )
        self._reset_window()

    @contextmanager
    def paused(self):
        """The time spent in the block counts for no step, nor do its tensors."""
        started = time.perf_counter()
        with self.stats.paused() if self.stats else nullcontext():
            yield
        self.start_time += time.perf_counter() - started

    def log_validation(self, step: int, result: dict) -> None:
        """Report a validation."""
        self.validation = {"step": step, "data": self.validated_on, **result}
        whose = {"weights": self.weights} if self.weights else {}
        self._write({"kind": "validation", "step": step, **whose, **result})
        shown = {name: value for name, value in result.items() if isinstance(value, float) and "/" not in name}
        if wanted := [name for keys in self.curves.values() for name in keys.values()]:  # the rest: metrics.jsonl
            shown = {name: shown[name] for name in wanted if name in shown}
        numbers = "  ".join(f"{name} {short(value)}" for name, value in shown.items())
        self.distributed.say(f"step {step}  validation{' of the averaged weights' if whose else ''} {numbers}")
        total, number = self.losses
        if "loss" in result and number:
            self._compare_with_best(step, result["loss"], total / number)
        self.losses = (0.0, 0)

    def _compare_with_best(self, step: int, loss: float, train_loss: float) -> None:
        best = self.best
        if not best or loss < best["loss"]:
            self.best = {"step": step, "loss": loss, "train_loss": train_loss, "is_said": False}
        elif loss > 1.01 * best["loss"] and train_loss < best["train_loss"] and not best["is_said"]:
            best["is_said"] = True
            self.distributed.say(
                f"The validation loss has risen since step {best['step']} ({short(best['loss'])} -> {short(loss)}), "
                f"while the training loss has fallen ({short(best['train_loss'])} -> {short(train_loss)}): the model "
                "is overfitting. Give fewer steps, more data or a smaller model."
            )

    def _write(self, line: dict) -> None:
        line = finite(line)
        if not self.distributed.is_main:
            return
        if self.folder:
            path = self.folder / "metrics.jsonl"
            error = append_line(path, json.dumps(line))
            if error and not self.is_full:
                self.distributed.say(f"{path} cannot be written: {error}. Training continues without it.")
            self.is_full = error is not None
        if self.wandb is not None:
            values = {f"{line['kind']}/{k}": v for k, v in line.items() if k not in ("kind", "step")}
            self.wandb.log(values, step=line["step"])

    def close(self) -> None:
        """Finish the bar and the W&B run, and look into no more tensors."""
        if self.stats:
            self.stats.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
