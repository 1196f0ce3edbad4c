# SPDX-License-Identifier: Apache-2.0
"""Start trainers the way users do, at a size that takes a second."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra


RECIPE = Path(__file__).parents[1]
TRAINERS = ("train_ddp", "train_fsdp2", "train_mfsdp")
# Odd widths and a bias of 33, so that shards are uneven.
TINY = [
    "model_kwargs.hidden_size=48", "model_kwargs.num_hidden_layers=2", "model_kwargs.num_attention_heads=4",
    "model_kwargs.intermediate_size=80", "dataset.max_seq_length=96", "dataset.micro_batch_size=2",
    "micro_batches_per_step=4", "num_train_steps=6", "logger.frequency=1", "validation.max_rows=11",
    "validation.every_n_steps=3", "precision=fp32", "lr_scheduler_kwargs.num_warmup_steps=2", "adamw_kwargs.lr=4e-4",
    "use_sequence_packing=false",
]  # fmt: skip


def run_here(trainer: str, log_dir: Path, *overrides: str) -> Path:
    """One rank in this process, through Hydra's command line; returns the folder with the metrics."""
    GlobalHydra.instance().clear()
    arguments = [f"{trainer}.py", *TINY, f"logger.log_dir={log_dir}", *overrides]
    from config import launch
    from step_folder import unlock

    try:
        with patch.object(sys, "argv", arguments):
            launch(importlib.import_module(trainer).main)
    finally:
        unlock()  # as the end of a process does
    return log_dir


def torchrun(num_ranks: int) -> list[str]:
    """The words before the script and, if there are any, further options."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]


def run_ranks(trainer: str, num_ranks: int, log_dir: Path, *overrides: str, timeout: int = 300) -> Path:
    """Ranks under torchrun."""
    command = [*torchrun(num_ranks), f"{trainer}.py", *TINY, f"logger.log_dir={log_dir}", *overrides]
    done = subprocess.run(command, cwd=RECIPE, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return log_dir


def train_on(distributed, trainer: str, *overrides: str) -> None:
    """The run itself, on ranks that are up already."""
    with initialize_config_dir(str(RECIPE / "hydra_config"), version_base=None):
        config = compose("L0_sanity", [*TINY, *overrides])
    importlib.import_module(trainer).train(config, distributed)


def environment() -> dict:
    """This process's, without what a test before left of a process group."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def metrics(log_dir: Path, kind: str, key: str) -> list[float]:
    """One column of `metrics.jsonl`."""
    lines = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["kind"] == kind]


def curve(log_dir: Path) -> list[float]:
    """Every number that the trajectory decides."""
    train = [metrics(log_dir, "train", key) for key in ("loss", "grad_norm", "learning_rate", "num_tokens")]
    return sum(train, []) + metrics(log_dir, "validation", "loss") + metrics(log_dir, "validation", "accuracy")


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which a command writes its table."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def with_table(text: str, name: str, new: str) -> str:
    """`text` with the table between its two marks replaced. Raises ValueError where it has no marks."""
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"there is no one pair of the lines {begin} and {end}.")
    return text.partition(begin)[0] + f"{begin}\n{new}\n{end}" + text.partition(end)[2]


def write_table(page: Path, name: str, new: str) -> None:
    """Put the table into the page, a new one if there is none."""
    text = page.read_text() if page.exists() else "\n".join(marks(name)) + "\n"
    page.write_text(with_table(text, name, new))
