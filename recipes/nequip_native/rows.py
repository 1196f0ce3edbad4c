# SPDX-License-Identifier: Apache-2.0
"""Which rows of the data a step, or a micro-batch, was made of: to look at what made a loss jump.

    python rows.py outputs --step 117
    python rows.py outputs --micro-batch 0.3.17

`outputs` is the run's `logger.log_dir`; run it from where the run was started, if its data was given by a relative
path. A micro-batch is named by epoch, window and number in the window, as in `anomalies.jsonl` and `metrics.jsonl`.
"""

import argparse
from contextlib import suppress
from itertools import islice
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
from omegaconf import DictConfig, OmegaConf

import dataset
from common.command import command
from common.distributed import process_group
from common.epoch_plan import EpochPlan
from common.files import flat
from common.redaction import refuse_hidden, without_hidden
from plot_metrics import read_metrics


def first_micro_batch(folder: Path, step: int) -> tuple[int, tuple[int, ...]]:
    """The nearest step up to this one whose first micro-batch was noted, and that one's name."""
    best = (1, (0, 0, 0))
    with suppress(ValueError):  # no step was logged
        for line in read_metrics(folder / "metrics.jsonl")["train"]:
            if line["step"] <= step:
                best = (line["step"], tuple(line["first_micro_batch"]))
    return best


def run_in(folder: Path) -> tuple[DictConfig, EpochPlan]:
    """The configuration and the plan of the run that wrote to this folder."""
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} has no config.yaml; give the folder that logger.log_dir named.")
    settings = OmegaConf.load(folder / "config.yaml")
    settings.dataset.num_workers = 0
    source = settings.dataset.get("load_dataset_kwargs") or {}
    if source.get("streaming"):
        raise ValueError("dataset.load_dataset_kwargs.streaming=true: the rows of a stream have no numbers.")
    data = without_hidden(OmegaConf.to_container(settings.dataset), is_read=True)
    refuse_hidden(flat(data, "dataset."), f"write it into {folder / 'config.yaml'}")
    settings.dataset = data
    with process_group(settings.seed) as distributed:
        return settings, dataset.open_plan(settings, distributed)


def main(folder: Path, step: int | None, micro_batch: str | None) -> None:
    """Print a line for each row. Raises ValueError for a step or name that cannot be."""
    settings, plan = run_in(folder)
    if micro_batch is not None:
        try:
            epoch, window, index = (int(part) if part.isdigit() else -1 for part in micro_batch.split("."))
            if min(epoch, window, index) < 0:
                raise IndexError
            chosen = [plan.window(epoch, window)[index]]
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"--micro-batch {micro_batch}: there is none of that name; it is EPOCH.WINDOW.NUMBER, as in 0.3.17."
            ) from error
    else:
        if not 1 <= step <= settings.num_train_steps:
            raise ValueError(f"--step {step} must lie between 1 and num_train_steps={settings.num_train_steps}.")
        known, name = first_micro_batch(folder, step)
        skipped = (step - known) * settings.micro_batches_per_step
        chosen = islice(plan.starting_at(*name), skipped, skipped + settings.micro_batches_per_step)
    print(f"{'micro-batch':>12} {'row':>12} {'size':>7}  what it is")
    for batch in chosen:
        name = ".".join(map(str, batch[:3]))
        sizes, lines = plan.source.sizes(batch.rows, batch.epoch), plan.source.describe(batch.rows, batch.epoch)
        for row, size, line in zip(batch.rows, sizes, lines, strict=True):
            print(f"{name:>12} {row:>12} {size:>7}  {line}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the run's logger.log_dir")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int)
    which.add_argument("--micro-batch", metavar="EPOCH.WINDOW.NUMBER")
    arguments = parser.parse_args()
    with command():
        main(arguments.folder, arguments.step, arguments.micro_batch)
