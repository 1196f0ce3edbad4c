# SPDX-License-Identifier: Apache-2.0
"""From a source of rows to batches: torchdata's loader over this rank's share of the plan, or over a stream.

A source has `len`, `sizes(rows, epoch)` from an index (common/sizes.py), `read(rows, epoch)`, which gives what the
collator takes of each row, `describe(rows)`, a line a row for a person, and `identity`, which a resume compares.
"""

import atexit
import multiprocessing.connection
import multiprocessing.util
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import active_children, forkserver, parent_process, set_forkserver_preload

import datasets
import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from common.batch import Batch
from common.distributed import Distributed, ignore_signals, signals_ignored
from common.epoch_plan import EpochPlan, Grouping, MicroBatch, RankSampler, permuted


MOST_WORKERS = 512


def read(source, micro_batch: MicroBatch) -> dict:
    """What a collator takes: the micro-batch's name, and an item for each of its rows."""
    return {"name": tuple(micro_batch[:3]), "items": source.read(micro_batch.rows, micro_batch.epoch)}


class PlannedMicroBatches(IterableDataset):
    """A rank's share of the plan; its workers take the micro-batches in turn.

    They plan for themselves, each every window, so that the trainer never waits for a plan; a row is read by the
    worker whose micro-batch it is in, and by no other.
    """

    def __init__(self, sampler: RankSampler):
        self.sampler = sampler

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        source = self.sampler.plan.source
        return (read(source, micro_batch) for micro_batch in islice(self.sampler, worker, None, num_workers))


class StreamedMicroBatches(IterableDataset):
    """Windows of a stream: each rank and worker groups its own share, shuffled inside the window.

    `prepare(rows, numbers, *key)` gives items, as a source's `read` does, and their sizes. The state is where the
    stream stood before the window and the place in it, so that a resume repeats no row.
    """

    def __init__(self, stream: datasets.IterableDataset, prepare: Callable, grouping: Grouping, window_rows: int,
                 seed: int, rank: int, identity: str | None = None):  # fmt: skip
        self.stream, self.prepare, self.grouping = stream, prepare, grouping
        self.identity = identity  # a fingerprint of its first rows, which a resume compares
        self.window_rows, self.seed, self.rank = window_rows, seed, rank
        self.state = {"epoch": 0, "window": 0, "index": 0, "stream": None}

    def state_dict(self) -> dict:
        return dict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker = info.id if info else 0
        while True:
            epoch = self.state["epoch"]
            # No set_epoch: workers share its number, and one that is an epoch ahead makes others lose their place.
            self.stream.load_state_dict(self.state["stream"])  # None: from the start
            rows, found = iter(self.stream), self.state["window"] > 0
            while window := list(islice(rows, self.window_rows)):
                name = (epoch, self.rank, worker, self.state["window"])
                order = permuted(np.arange(len(window)), len(window), self.seed, *name)
                items, sizes = self.prepare([window[i] for i in order], order, self.seed, *name)
                groups = self.grouping(sizes, (self.seed, *name))
                found = found or bool(groups)
                for index in range(self.state["index"], len(groups)):
                    self.state["index"] = index + 1
                    yield {"name": (*name, index), "items": [items[i] for i in groups[index]]}
                self.state |= {"window": self.state["window"] + 1, "index": 0, "stream": self.stream.state_dict()}
            if not found:
                raise ValueError(f"The stream has no rows for rank {self.rank}, worker {worker}: use fewer.")
            self.state = {"epoch": epoch + 1, "window": 0, "index": 0, "stream": None}


def start_worker_server() -> None:
    """Start the process that workers are forked from; it imports what they need while this one opens the data."""
    atexit.register(end_workers)
    set_forkserver_preload(["datasets", "torch.distributed.tensor", "torchdata.stateful_dataloader"])
    _keep_sockets_short()
    os.environ["PYTHONSAFEPATH"] = "1"  # not a `datasets` that lies in the working folder
    # torchrun and Slurm signal whole process groups; that the rank is to save and leave is no news for its workers.
    # They inherit what is ignored when the server starts.
    with signals_ignored():
        forkserver.ensure_running()
    del os.environ["PYTHONSAFEPATH"]  # the scripts that this process starts do import from their folder


def _keep_sockets_short() -> None:
    """Let `multiprocessing` have its sockets elsewhere where TMPDIR is too long for them: 107 bytes in all.

    Raises ValueError where there is no other place.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= 70:  # it adds 36
        return
    place = next((path for path in ("/tmp", "/var/tmp", "/dev/shm") if os.access(path, os.W_OK | os.X_OK)), None)
    if place is None:
        raise ValueError(f"dataset.num_workers: TMPDIR={usual} is too long for sockets; set a shorter one.")
    try:
        tempfile.tempdir = place
        multiprocessing.util.get_temp_dir()  # made once, and kept
    finally:
        tempfile.tempdir = usual


@contextmanager
def script_unseen() -> Iterator[None]:
    """Workers started in the block do not import the running script: it takes seconds, and they need nothing of it."""
    script = vars(sys.modules["__main__"])
    file = script.pop("__file__", None)
    try:
        yield
    finally:
        script |= {"__file__": file} if file else {}


def start_worker(worker: int) -> None:
    """A worker goes on at a signal, which is for its rank to obey, and ends with its rank however that ends."""
    ignore_signals()
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def end_workers() -> None:
    """Before `multiprocessing` asks them to, with a signal that they ignore, and waits for them: after an error."""
    for process in active_children():
        if process.daemon:
            process.kill()


def watch_workers(batches: Iterator, section: str) -> None:
    """End the run soon when a worker is killed: the rest of a message that it was sending would be awaited forever."""
    workers, alive = getattr(batches, "_workers", []), weakref.ref(batches)

    def watch() -> None:
        multiprocessing.connection.wait([worker.sentinel for worker in workers])
        found = alive()
        if found is None or found._shutdown or not threading.main_thread().is_alive():  # all has come to its end
            return
        print(f"{section}: a data worker was killed, perhaps for lack of memory.", file=sys.stderr, flush=True)
        for worker in workers:  # they may wait for a lock that it held
            worker.kill()
        found._worker_result_queue._writer.close()  # of which no one else has an end now: reading ends, too

    if workers:
        threading.Thread(target=watch, daemon=True).start()


class Loader:
    """This rank's micro-batches without end, with a state to resume from.

    Over a plan, the state is one place in it, good for any number of ranks and workers. Over a stream, it is every
    rank's own, good for the same number of both. `section` is the configuration's, for what is said of mistakes.
    """

    def __init__(
        self,
        distributed: Distributed,
        section: str,
        data: EpochPlan | StreamedMicroBatches,
        collate: Callable[[dict], Batch],
        num_workers: int,
    ):
        if num_workers > MOST_WORKERS:
            raise ValueError(f"{section}.num_workers={num_workers} must be at most {MOST_WORKERS}: processes a rank.")
        self.distributed, self.section, self.num_workers = distributed, section, num_workers
        self.notes: list[str] = []  # for the log
        self.sources: list[str] = []  # what is read, and from where
        self.plan = data if isinstance(data, EpochPlan) else None
        if self.plan:
            self.sampler = RankSampler(self.plan, distributed.data_rank, distributed.num_data_ranks)
            data = PlannedMicroBatches(self.sampler)
        self.identity = getattr(data, "identity", None)
        self.loader = StatefulDataLoader(
            data,
            batch_size=None,
            collate_fn=collate,
            num_workers=num_workers,
            # A fork after the process group or CUDA is up can crash or hang.
            multiprocessing_context="forkserver" if num_workers else None,
            worker_init_fn=start_worker if num_workers else None,
            pin_memory=distributed.device.type == "cuda",
        )
        self.last_name: tuple | None = None

    def __iter__(self) -> Iterator[Batch]:
        with script_unseen():
            batches = iter(self.loader)
        watch_workers(batches, self.section)
        for batch in batches:
            self.last_name = batch.name
            yield self.distributed.counted_once(batch)

    def facts(self, config: DictConfig) -> list[str]:
        """What is read, from where and how often: the first lines of a run."""
        if not self.plan or not self.distributed.is_main:
            return self.sources
        epochs = config.num_train_steps * config.micro_batches_per_step / max(1, self.plan.num_micro_batches)
        number = config.micro_batches_per_step
        steps = f"{config.num_train_steps:,} steps of {number} micro-batch{'es' if number > 1 else ''}"
        shown = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2g}"
        return [*self.sources, f"{self.section}: {steps} are {shown} epochs"]

    def state_dict(self) -> dict:
        """What is left to read, the same on every rank; JSON."""
        if self.plan:
            position = self.sampler.position_after(self.last_name) if self.last_name else self.sampler.position
            return {"position": list(position), "rules": self.plan.rules, "data": self.plan.source.identity}
        states = [None] * self.distributed.num_ranks
        torch.distributed.all_gather_object(states, self.loader.state_dict())
        states = {"layout": self._layout(), "ranks": states[:: self.distributed.group_size]}
        return states | {"data": self.identity}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state. Raises ValueError for other data, or a stream that was saved on another layout."""
        self.last_name = None
        was_streamed, is_streamed, kwargs = "layout" in state, self.plan is None, f"{self.section}.load_dataset_kwargs"
        if was_streamed != is_streamed:
            raise ValueError(
                f"{kwargs}.streaming={str(is_streamed).lower()}, but the checkpoint was made with "
                f"{str(was_streamed).lower()}; give that, or start again in another folder."
            )
        if self.plan:
            # Before there was an identity, checkpoints had the number of rows alone.
            saved, found = state.get("data", {"num_rows": state.get("num_rows")}), self.plan.source.identity
            if saved["num_rows"] != found["num_rows"]:
                raise ValueError(
                    f"{kwargs}: the checkpoint was made with {saved['num_rows']:,} rows and the data now has "
                    f"{found['num_rows']:,}; give the old data, or start again in another folder."
                )
            if wrong := [key for key in saved if saved[key] != found.get(key)]:
                raise ValueError(
                    f"{kwargs}: the data is not what the checkpoint was made with (other {', '.join(wrong)}), though "
                    "it has as many rows; give the old data, or start again in another folder."
                )
            rules = state.get("rules", self.plan.rules)
            self.sampler.position, note = self.plan.place_under(rules, tuple(state["position"]))
            self.notes += [note] if note else []
        elif state.get("data", self.identity) != self.identity:
            raise ValueError(
                f"{kwargs}: the stream is not what the checkpoint was made with, its first rows differ; give the old "
                "data, or start again in another folder."
            )
        elif state["layout"] != self._layout():
            raise ValueError(
                f"A streamed data set resumes only on the layout it was saved on, {state['layout']}; this run has "
                f"{self._layout()}; use that layout, or start again in another folder, with {kwargs}.streaming=false "
                "if it is to resume on any."
            )
        else:
            self.loader.load_state_dict(state["ranks"][self.distributed.data_rank])

    def _layout(self) -> dict:
        return {"num_ranks": self.distributed.num_data_ranks, "num_workers": self.num_workers}
