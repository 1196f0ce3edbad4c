# SPDX-License-Identifier: Apache-2.0
"""The end of a run: everything is finished and closed, and the process has one outcome."""

from pathlib import Path
from shlex import quote
from typing import NamedTuple

from common.anomalies import Anomalies
from common.distributed import stop_with
from common.perf_logger import PerfLogger


class Outcome(NamedTuple):
    """An exit code other than 0, and the sentence that says why."""

    code: int
    sentence: str


def left_behind(step: int, checkpointer, log_dir: Path | None) -> str:
    """Where the weights of a complete run are, and the commands that come next."""
    folder = checkpointer.folder
    if folder is None:
        sentence = "The weights are not kept, since checkpoint.ckpt_dir is not set."
    elif checkpointer.save_final_model:
        sentence = f"The model is in {folder / 'final_model'}; its README.md says how to open it."
        if checkpointer.best and checkpointer.best[1] != step:
            best = quote(str(folder / f"step_{checkpointer.best[1]}"))
            sentence += f"\nIt is of the last step; the best one is exported by: python export.py {best} "
            sentence += quote(str(folder / "best_model"))
    else:
        sentence = f"To make a model of it: python export.py {quote(str(folder / f'step_{step}'))}"
    return sentence + (f"\nTo draw the curves: python plot_metrics.py {quote(str(log_dir))}" if log_dir else "")


def end_run(step: int, last_step: int, checkpointer, logger: PerfLogger, anomalies: Anomalies) -> None:
    """Finish what is being saved, export the final model of a complete run, and close all; every rank calls it.

    Returns where all went well, also if the run was stopped early and saved. Else the process ends: with code 1 at a
    step that was no number, 2 if the last checkpoint or the final model could not be written, 3 if the run was
    stopped early and had nowhere to save.
    """
    if anomalies.fatal:
        checkpointer.finish()
        outcome = Outcome(1, anomalies.fatal)
    elif step < last_step:
        outcome = checkpointer.stop(step)
    else:
        outcome = checkpointer.complete(step)
    logger.close()
    if outcome is None and step == last_step:
        logger.distributed.say(left_behind(step, checkpointer, logger.folder))
    checkpointer.unlock()
    if outcome:
        stop_with(outcome.sentence, outcome.code)
