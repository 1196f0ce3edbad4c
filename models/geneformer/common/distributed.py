# SPDX-License-Identifier: Apache-2.0
"""The process group, what ranks must agree on, and the signals that ask a run to stop."""

import atexit
import os
import signal
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.batch import Batch
from common.cpu_memory import keep_fewer_products, keep_freed_memory


def stop_with(sentence: str, code: int = 2) -> NoReturn:
    """End this process with one sentence, which one of the ranks says; exit code 2 stands for a user's mistake."""
    sentence = " ".join(sentence.split())
    if dist.is_initialized():  # all ranks come here together
        speaks = os.environ.get("RANK", "0") == "0"
    elif not (speaks := is_first_with(sentence)):
        time.sleep(5)  # torchrun ends all ranks of a node as soon as one leaves: not before the other has spoken
    if speaks:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()
    sys.exit(code)


def is_first_with(sentence: str) -> bool:
    """Whether no other rank of this start has asked the same: it may be that of one rank, or of all."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return env.get("RANK", "0") == "0"
    try:
        store = dist.TCPStore(
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timedelta(minutes=1)
        )
        return store.add(f"said/{env.get('TORCHELASTIC_RESTART_COUNT')}/{sentence}", 1) == 1
    except (RuntimeError, ValueError):  # the store has gone with its node; better twice than never
        return True


@contextmanager
def end_of_process():
    """This process ends with the block, unless that ends with a traceback; Python is not taken down.

    That could abort it: a thread of gloo may only then let go of a tensor (pytorch #190489). Groups that are destroyed
    keep their threads, because DTensor's caches keep the groups.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Hours, because ranks wait while the first of them converts a large data set or exports a large model.
TIMEOUT = timedelta(hours=3)
# What GPUs wait for is a step: where one does not come, its job is not to hold the others for hours.
NCCL_TIMEOUT = timedelta(minutes=20)


class SharedError(ValueError):
    """A mistake that has been raised on all ranks."""


@dataclass(frozen=True)
class Distributed:
    """This process's place among the others; `device` is what it trains on.

    Ranks may share a micro-batch, for context parallelism: neighbours in a `group`, which then is one data rank.
    """

    rank: int
    local_rank: int
    num_ranks: int
    device: torch.device
    num_local_ranks: int = 1
    group: dist.ProcessGroup | None = None
    group_size: int = 1

    @property
    def group_rank(self) -> int:
        return self.rank % self.group_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.group_size

    @property
    def num_data_ranks(self) -> int:
        return self.num_ranks // self.group_size

    def in_groups(self, key: str, size: int) -> "Distributed":
        """The same in groups of `size` ranks, which the configuration's `key` asks for; all ranks call it.

        Raises ValueError if that does not divide them.
        """
        if self.num_ranks % size:
            works = [n for n in range(1, self.num_ranks + 1) if self.num_ranks % n == 0]
            raise ValueError(
                f"{key}={size} does not divide the {self.num_ranks} ranks; {', '.join(map(str, works))} would."
            )
        if size == 1:
            return self
        starts = range(0, self.num_ranks, size)
        groups = [dist.new_group(range(n, n + size), timeout=TIMEOUT) for n in starts]
        shorten_waits(groups[self.rank // size], self.device)
        return replace(self, group=groups[self.rank // size], group_size=size)

    def counted_once(self, batch: Batch) -> Batch:
        """Of the ranks that share a micro-batch, the first counts it."""
        return batch.uncounted() if self.group_rank else batch

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64 on the CPU: no GPU has to wait for it."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.numpy().tolist()

    def sum_counts(self, batches: list[Batch], stop: bool) -> tuple[dict[str, int], int, bool]:
        """By one all-reduce, what all ranks have to know of a step.

        Each count of its micro-batches summed up, the epoch of the first, and whether any rank was asked to `stop`.
        """
        names = list(batches[0].counts)
        epoch = batches[0].name[0] if self.is_main else 0
        *totals, epoch, stops = self.sum(*(sum(batch.counts[k] for batch in batches) for k in names), epoch, stop)
        return {name: int(total) for name, total in zip(names, totals, strict=True)}, int(epoch), stops > 0

    def max(self, value: float) -> float:
        """The largest of all ranks."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest.numpy())

    @contextmanager
    def fail_together(self):
        """Stop all ranks together, with one sentence, when the block raises a ValueError on any of them."""
        try:
            with self.shared_errors():
                yield
        except SharedError as error:
            stop_with(str(error))

    @contextmanager
    def main_first(self):
        """Run the block on rank 0 of each node, then on the others: for caches that must be written once.

        A ValueError on any rank (a file that one node lacks) is raised on all, so that they stay in step.
        """
        if self.local_rank != 0:
            self._exchange(None)
        with self.shared_errors():
            yield
        if self.local_rank == 0:
            self._exchange(None)

    def gather(self, value) -> list:
        """What each rank gives, by rank. Raises the ValueError that another rank has met instead of coming here."""
        return self._exchange(None, value)

    def from_rank(self, rank: int, value=None):
        """What that rank gives, on all."""
        found = [value]
        dist.broadcast_object_list(found, src=rank, device=torch.device("cpu"))
        return found[0]

    def say(self, text: str) -> None:
        """A line for the reader, once, beside the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def shared_errors(self):
        """Raise a ValueError of the block, on any rank, on all of them."""
        mistake = None
        try:
            yield
        except SharedError:
            raise
        except ValueError as error:
            mistake = error
        except RuntimeError as error:
            if "calculation overflowed" not in str(error):
                raise
            mistake = ValueError("the model's sizes make a tensor that no memory holds; give smaller ones.")
        self._exchange(mistake)

    def _exchange(self, mistake: ValueError | None, value=None) -> list:
        found: list = [None] * self.num_ranks
        dist.all_gather_object(found, (str(mistake) if mistake else None, value))
        if first := next(filter(None, (sentence for sentence, _ in found)), None):
            raise SharedError(first) from mistake
        return [value for _, value in found]


def store_of_this_start(rank: int, num_ranks: int) -> dist.Store:
    """A corner of torchrun's key-value store that no earlier start of this run has written to.

    After a restart the store still holds the addresses of ranks that are dead, and torch would connect to them
    (pytorch #135712). The restart count does not tell starts apart: each node has its own.
    """
    env, wait = os.environ, timedelta(minutes=30)
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=wait)
    mine = uuid.uuid4().hex
    if rank == 0:  # answers every greeting, old ones too, until each rank has its answer
        waiting, deadline = set(range(1, num_ranks)), time.monotonic() + wait.total_seconds()
        while waiting:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(waiting)} did not come within {wait}")
            waiting = {other for other in waiting if not store.check([f"start/{mine}/{other}"])}
            for other in waiting:
                if store.check([f"start/hello/{other}"]):
                    store.set(f"start/welcome/{store.get(f'start/hello/{other}').decode()}", mine)
            time.sleep(0.01)
        return dist.PrefixStore(mine, store)
    store.set(f"start/hello/{rank}", mine)
    name = store.get(f"start/welcome/{mine}").decode()
    store.set(f"start/{name}/{rank}", "")
    return dist.PrefixStore(name, store)


def shorten_waits(group: dist.ProcessGroup, device: torch.device) -> None:
    """Let a group wait for hours by gloo, on the CPU, and for minutes by NCCL."""
    if device.type == "cuda":
        group._get_backend(device)._set_default_timeout(NCCL_TIMEOUT)


@contextmanager
def process_group(seed: int, deterministic: bool = False):
    """Join the ranks that torchrun started (or be the only one), and leave cleanly."""
    env = os.environ
    rank, local_rank, num_ranks = (int(env.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        keep_fewer_products()
    # gloo serves the CPU tensors on GPU machines too: label counts, stop flags and checkpoint plans.
    options = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo", "timeout": TIMEOUT}
    if "RANK" not in env:  # plain `python`: a group of one that needs no port
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        options |= {"store": store_of_this_start(rank, num_ranks), "rank": rank, "world_size": num_ranks}
    dist.init_process_group(**options)
    shorten_waits(dist.group.WORLD, device)
    torch.manual_seed(seed)
    if deterministic:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        env.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # TransformerEngine's attention
        torch.use_deterministic_algorithms(True)
    try:
        yield Distributed(rank, local_rank, num_ranks, device, int(env.get("LOCAL_WORLD_SIZE", num_ranks)))
        dist.barrier()  # without it gloo can hang in the next call when a rank is already gone
    finally:
        dist.destroy_process_group()
        if deterministic:
            torch.use_deterministic_algorithms(False)


def passes_per_step(micro_batches_per_step: int | None, distributed: Distributed) -> int:
    """How many micro-batches each data rank takes a step; ValueError if the data ranks do not divide them."""
    num_ranks, size = distributed.num_data_ranks, distributed.group_size
    if micro_batches_per_step is None:
        return 1
    if micro_batches_per_step < 1 or micro_batches_per_step % num_ranks:
        below = micro_batches_per_step // num_ranks * num_ranks
        works = f"{below} or {below + num_ranks}" if below > 0 else str(num_ranks)
        whom = f"{num_ranks} ranks" if size == 1 else f"{num_ranks} groups of {size} ranks"
        raise ValueError(
            f"micro_batches_per_step={micro_batches_per_step} does not divide by the {whom}; {works} would."
        )
    return micro_batches_per_step // num_ranks


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore_signals() -> None:
    """From here on, this process goes on at a signal to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_ignored():
    """What is started in the block ignores the signals to stop."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignore_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 (Slurm's warning) or Ctrl-C, so that the run can save and leave after its step.

    A second Ctrl-C ends it at once. A closed terminal does not end it, unless torchrun ends with that.
    """

    def __init__(self):
        self.heard_at, self.parent = None, os.getppid()
        self.by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(signal.SIGHUP, self._remember if self.by_torchrun else signal.SIG_IGN)

    def _remember(self, number, frame):
        now = time.monotonic()
        if self.heard_at is None:
            self.heard_at = now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # not by Python's streams, which may be in the middle of a line
                    os.write(2, b"\nStopping after this step; Ctrl-C again ends at once.\n")
        elif number == signal.SIGINT and (not self.by_torchrun or now - self.heard_at > 2):
            # What the terminal sends to all, torchrun sends once more.
            os._exit(130)

    @property
    def requested(self) -> bool:
        """Also when torchrun has died: the ranks it leaves behind would go on for ever."""
        return self.heard_at is not None or (self.by_torchrun and os.getppid() != self.parent)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, where a strategy has wrapped it."""
    return getattr(model, "module", model)


def own_part(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What this rank holds of a tensor, which may be split over the ranks."""
    return getattr(tensor, "_local_tensor", tensor)
