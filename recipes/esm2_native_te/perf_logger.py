# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: progress on the terminal, `metrics.jsonl`, `run.json`, `config.yaml`, and W&B if asked."""

import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from build_model import is_reference
from checkpoint import make_folder
from collator import Batch
from distributed import Distributed
from modeling_esm2 import Esm2Config, training_flops
from precision import Precision, measured_tflops


# Dense BF16 matrix products, TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "A100": 312, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
    "GB200": 2250, "B300": 2250,
}  # fmt: skip
PACKAGES = (
    "torch",
    "transformers",
    "transformer-engine",
    "megatron-fsdp",
    "torchao",
    "datasets",
    "torchdata",
    "hydra-core",
)


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or a processor that has no such line
        return platform.processor() or platform.machine()


def code_hash() -> str:
    """A hash of the recipe's Python files: it tells two runs' code apart without a repository."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of the folder the recipe is in, if it is in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def start_wandb(
    run: dict,
    *,
    mode: Literal["online", "offline", "disabled", "shared"] = "disabled",
    project: str | None = None,
    name: str | None = None,
    **passed_on,
):
    """`wandb.init` for a run with these facts; None where it is disabled. Raises ValueError where it fails."""
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb_init_args.mode={mode} needs the package wandb: pip install wandb, or set mode=disabled."
        ) from error
    try:
        return wandb.init(mode=mode, project=project, name=name, config=run, **passed_on)
    except (TypeError, ValueError, wandb.Error) as error:  # an unknown argument, a bad value, no account or connection
        raise ValueError(f"wandb_init_args: wandb does not start with mode={mode}: {error}") from error


def finite(value):
    """None for a NaN or an infinity, which JSON does not have, also inside of dicts; anything else as it is."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path: Path, line: str) -> str | None:
    """Add a line, all of it or nothing; what went wrong, if anything. A full disk is no reason to stop."""
    try:
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line + "\n")
        except OSError:
            os.truncate(path, size)
            raise
    except OSError as error:
        return error.strerror
    return None


class PerfLogger:
    """Counts what goes through the model and reports it every `frequency` steps, over the whole window between."""

    def __init__(
        self,
        distributed: Distributed,
        config: DictConfig,
        model_config: Esm2Config,
        num_parameters: int,
        precision: Precision,
        script: str,
        *,
        frequency: int = 10,
        log_dir: str | None = None,
        peak_tflops: float | None = None,
    ):
        if frequency < 1:
            raise ValueError(f"logger.frequency={frequency} must be at least 1.")
        self.distributed, self.model_config, self.frequency = distributed, model_config, frequency
        self.folder = Path(log_dir) if log_dir else None
        self.num_steps, self.num_tokens, self.validation = config.num_train_steps, 0, {}
        self.wandb = self.bar = None
        self.is_full = False
        device = distributed.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        source = "given" if peak_tflops else "data sheet" if device.type == "cuda" else "measured"
        if peak_tflops is None and device.type == "cuda":
            peak_tflops = next(
                (peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name.replace("-", " ").split()), None
            )
        if peak_tflops is None and device.type == "cpu":
            peak_tflops = measured_tflops(precision.dtype or torch.float32)
        source = source if peak_tflops else "unknown"
        self.peak_tflops, self.notes, self.quant_stats = peak_tflops, precision.notes, precision.stats
        self.run = {
            "model_tag": config.model_tag, "num_parameters": num_parameters,
            "strategy": Path(script).stem.removeprefix("train_"),
            "num_ranks": distributed.num_ranks, "cp_size": distributed.cp_size, "device": name,
            "threads_per_rank": torch.get_num_threads(),
            "layer_backend": "transformers" if is_reference(config.model_tag) else precision.backend,
            "precision": "bf16" if precision.dtype else "fp32", "low_precision": precision.layers,
            "peak_tflops_per_rank": peak_tflops, "peak_source": source, "code_sha256": code_hash(),
            "git": git_commit(), "versions": versions(), "command": sys.argv,
        }  # fmt: skip
        if not distributed.is_main:
            return
        if self.folder:
            make_folder("logger.log_dir", self.folder, distributed.rank)
        self.config = OmegaConf.to_container(config, resolve=True)
        self.wandb = start_wandb(self.run | {"config": self.config}, **self.config["wandb_init_args"])

    def start(self, progress: dict, notes: list[str | None]) -> None:
        """Begin at `progress["step"]`: what a killed run wrote past it is dropped, an earlier run's file is kept."""
        self.num_tokens = progress.get("num_tokens", 0)
        self.validation = progress.get("validation", {})
        self._reset_window()
        self.quant_stats.begin(progress["step"] + 1)
        if not self.distributed.is_main:
            return
        if self.folder:
            try:
                self._open_metrics(progress["step"])
                (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(self.config))
                (self.folder / "run.json").write_text(json.dumps(self.run, indent=1) + "\n")
            except OSError as error:
                self.distributed.say(f"{self.folder}: {error.strerror}. Training goes on without it.")
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.num_steps, initial=progress["step"], unit="step", disable=not interactive, dynamic_ncols=True
        )

        run = self.run
        self.distributed.say(
            f"{run['model_tag']} ({run['num_parameters'] / 1e6:,.1f}M parameters), {run['strategy']}, "
            f"{run['num_ranks']} x {run['device']}, {run['precision']}; {self.folder or 'no folder'} for metrics.jsonl"
        )
        for note in filter(None, (*self.notes, *notes)):
            self.distributed.say(note)

    def _open_metrics(self, step: int) -> None:
        path, kept = self.folder / "metrics.jsonl", []
        # torchrun has started this run again, before its first checkpoint: what is there is no earlier run's.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if path.exists() and step == 0 and not restarted:
            number = 1 + len(list(self.folder.glob("metrics.before_*.jsonl")))
            path.rename(self.folder / f"metrics.before_{number}.jsonl")
            if (anomalies := self.folder / "anomalies.jsonl").exists():
                anomalies.rename(self.folder / f"anomalies.before_{number}.jsonl")
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

    def _reset_window(self) -> None:
        self.start_time = time.perf_counter()
        self.window = {"steps": 0, "tokens": 0, "slots": 0, "flops": 0.0, "data_wait": 0.0}

    def count(self, batches: list[Batch], data_wait_s: float, num_tokens: float) -> None:
        """One step of this rank's batches; `num_tokens` is that of all ranks."""
        self.num_tokens += int(num_tokens)
        self.first_micro_batch = list(batches[0].name)  # of the step, on the first rank
        self.window["steps"] += 1
        self.window["data_wait"] += data_wait_s
        for batch in batches:
            self.window["tokens"] += batch.num_tokens
            self.window["slots"] += batch.num_slots
            self.window["flops"] += training_flops(
                self.model_config, batch.seq_lens, batch.num_labels, self.run["layer_backend"]
            )

    def log_step(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Report, if this step is one to report; all ranks call it, with the whole step's `loss` and `grad_norm`."""
        if self.bar is not None:
            self.bar.update()
        if rounding := self.quant_stats.take():
            self._write({"kind": "quantization", "step": step, "tensors": rounding})
        self.quant_stats.begin(step + 1)
        if step % self.frequency and step != self.num_steps:
            return
        seconds, window, num_ranks = time.perf_counter() - self.start_time, self.window, self.distributed.num_ranks
        # The loss is a number on the CPU already, so the device has done what these seconds are counted for.
        tokens, slots, flops, wait = self.distributed.sum(
            window["tokens"], window["slots"], window["flops"], window["data_wait"]
        )
        memory = self.distributed.max(peak_memory_gib(self.distributed))
        tflops = flops / seconds / 1e12
        self._write(
            {
                "kind": "train", "step": step, "first_micro_batch": self.first_micro_batch, "loss": loss,
                "grad_norm": grad_norm, "learning_rate": learning_rate,
                "tokens_per_second": tokens / seconds, "num_tokens": self.num_tokens, "fill": tokens / slots,
                "step_time_s": seconds / window["steps"], "data_wait_s": wait / num_ranks / window["steps"],
                "peak_memory_gib": memory, "model_tflops": tflops,
                "peak_share": tflops / num_ranks / self.peak_tflops if self.peak_tflops else None,
            }
        )  # fmt: skip
        if self.bar is not None:
            left = (self.num_steps - step) * seconds / window["steps"]
            self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")
            if self.bar.disable:
                self.distributed.say(
                    f"step {step}/{self.num_steps}  loss {loss:.4f}  grad norm {grad_norm:.3f}  "
                    f"lr {learning_rate:.2e}  {tokens / seconds:,.0f} tokens/s  {left / 60:.1f} min left"
                )
        self._reset_window()

    @contextmanager
    def paused(self):
        """The time spent in the block counts for no step, nor do its tensors."""
        started = time.perf_counter()
        with self.quant_stats.paused():
            yield
        self.start_time += time.perf_counter() - started

    def log_validation(self, step: int, result: dict) -> None:
        """Report a validation."""
        self.validation = {"step": step, **result}
        self._write({"kind": "validation", "step": step, **result})
        self.distributed.say(
            f"step {step}  validation loss {result['loss']:.4f}  perplexity {result['perplexity']:.3f}  "
            f"accuracy {result['accuracy']:.4f}"
        )

    def _write(self, line: dict) -> None:
        line = finite(line)
        if not self.distributed.is_main:
            return
        if self.folder:
            path = self.folder / "metrics.jsonl"
            error = append_line(path, json.dumps(line))
            if error and not self.is_full:
                self.distributed.say(f"{path} cannot be written: {error}. Training goes on without it.")
            self.is_full = error is not None
        if self.wandb is not None:
            values = {f"{line['kind']}/{k}": v for k, v in line.items() if k not in ("kind", "step")}
            self.wandb.log(values, step=line["step"])

    def progress(self) -> dict:
        """What a checkpoint keeps of the counts."""
        return {"num_tokens": self.num_tokens, "validation": self.validation}

    def close(self) -> None:
        """Finish the bar and the W&B run, and look into no more tensors."""
        self.quant_stats.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def peak_memory_gib(distributed: Distributed) -> float:
    """Most memory this process has held: on the GPU what torch allocated, on the CPU the resident set."""
    if distributed.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
