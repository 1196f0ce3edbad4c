# SPDX-License-Identifier: Apache-2.0
"""The end of a run: everything is finished and closed, and the process has one outcome."""

from typing import NamedTuple

from common.anomalies import Anomalies
from common.distributed import stop_with
from common.perf_logger import PerfLogger


class Outcome(NamedTuple):
    """An exit code other than 0, and the sentence that says why."""

    code: int
    sentence: str


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
    checkpointer.unlock()
    if outcome:
        stop_with(outcome.sentence, outcome.code)
