# SPDX-License-Identifier: Apache-2.0
"""Start trainers the way users do, at a size that takes a second."""

import fcntl
import functools
import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from torch.distributed.tensor import _redistribute, debug

from common import RECIPE
from common.config import launch, register_resolvers
from common.step_folder import read_weights, unlock


def _this_recipe() -> ModuleType:
    """`tests/this_recipe.py`: its smallest run, and what else these tests have to know of it."""
    spec = spec_from_file_location("this_recipe", RECIPE / "tests" / "this_recipe.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


THIS_RECIPE = _this_recipe()
TINY = THIS_RECIPE.TINY
TRAINERS = getattr(THIS_RECIPE, "TRAINERS", ("train_ddp", "train_fsdp2", "train_mfsdp"))

# Of the run that is never stopped: checkpoints and validations, which no stop adds to, and a hop for each trainer.
EVERY = 3
LAST = EVERY * max(2, len(TRAINERS))


def recipe_module(name: str) -> ModuleType:
    """A file at the recipe's top, by the name that it has in every recipe."""
    return importlib.import_module(name)


def run_here(trainer: str, log_dir: Path, *overrides: str, apart: bool | None = None) -> Path:
    """One rank in this process, through Hydra's command line; returns the folder with the metrics.

    Megatron-FSDP gets a process of its own, as users give it one, unless `apart` is False: its model, with hooks and
    the threads of its group, outlives the run.
    """
    if apart if apart is not None else trainer == "train_mfsdp":
        return _run_apart(trainer, log_dir, *overrides)
    GlobalHydra.instance().clear()
    arguments = [f"{trainer}.py", *TINY, f"logger.log_dir={log_dir}", *overrides]
    main = recipe_module(trainer).main
    keep_imported()
    try:
        # Hydra composes once to see whether it is a sweep, and once more: a quarter of a second, as long as six steps.
        with patch.object(sys, "argv", arguments), patch.object(Hydra, "get_mode", return_value=None):
            launch(main)
    finally:  # as the end of a process does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        unlock()
        forget_groups()
    return log_dir


def command_here(script: str, *words: object) -> int:
    """A command at the recipe's top, in this process; its exit code."""
    with patch.object(sys, "argv", [script, *map(str, words)]):
        try:
            runpy.run_path(str(RECIPE / script), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def _run_apart(trainer: str, log_dir: Path, *overrides: str) -> Path:
    output, code = _processes([{}], 600, trainer, log_dir, *overrides)
    sys.stderr.write(output)
    if code in (2, 3):  # a user's mistake
        raise SystemExit(code)
    assert code == 0, output[-4000:]
    return log_dir


def _processes(variables: list[dict], timeout: int, *job) -> tuple[str, int]:
    """A process for each, forked from a server that has imported much already; what they wrote, the first bad code.

    As with torchrun, the others are ended when one fails.
    """
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        going = start_processes(variables, Path(scratch), *job)
        deadline = time.monotonic() + timeout
        while going:
            multiprocessing.connection.wait([p.sentinel for p in going], max(0, deadline - time.monotonic()))
            ended = [p for p in going if p.exitcode is not None]
            going = [p for p in going if p.exitcode is None]
            code = code or next((p.exitcode for p in ended if p.exitcode), 0 if ended else "it took too long")
            if code:
                for process in going:
                    process.terminate()
                for process in going:
                    process.join(2)
                    process.kill()
                    process.join()
                going = []
        return said_by(Path(scratch)), code


def start_processes(variables: list[dict], scratch: Path, *job) -> list[multiprocessing.Process]:
    """`run_here(*job)` with each of these variables, in a process of its own that writes what it says to `scratch`."""
    context = multiprocessing.get_context("forkserver")
    going = [
        context.Process(target=_apart, args=(environment() | mine, str(Path.cwd()), str(scratch / f"{i}.said"), *job))
        for i, mine in enumerate(variables)
    ]
    for process in going:
        process.start()
    return going


def said_by(scratch: Path) -> str:
    """What processes have written there."""
    return "".join(file.read_text() for file in sorted(scratch.glob("*.said")))


def _apart(variables: dict, folder: str, output: str, *job) -> None:
    os.environ.clear()
    os.environ |= variables
    os.chdir(folder)
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_here(*job, apart=False)


def has_groups() -> bool:
    """Whether a thread of gloo is alive, where the system tells."""
    for thread in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            if "gloo" in thread.read_text():
                return True
    return False


def forget_groups() -> None:
    """End what DTensor's caches keep of a run: process groups with their threads, which the next one would meet."""
    if clear := getattr(debug, "_clear_sharding_prop_cache", None):  # torch 2.12 and newer
        clear()
    if clear := getattr(_redistribute, "clear_redistribute_planner_cache", None):
        clear()
    for cache in (*IMPORTED_CACHES, *_caches()):
        cache.cache_clear()
    gc.collect()


IMPORTED_CACHES: list = []  # those of torch.distributed that no collection looks at any more


def _caches() -> list:
    # Not isinstance, which asks the object, and some answer with a warning.
    found = [kept for kept in gc.get_objects() if type(kept) is functools._lru_cache_wrapper]
    return [cache for cache in found if (cache.__module__ or "").startswith("torch.distributed")]


def keep_imported() -> None:
    """Once, before any group: what is imported is left out of collections, which else take 0.3 s after each run."""
    if not IMPORTED_CACHES and not torch.distributed.is_initialized():
        IMPORTED_CACHES.extend(_caches())
        gc.freeze()


def torchrun(num_ranks: int) -> list[str]:
    """The words before the script and, if there are any, further options."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]


def meeting(num_ranks: int) -> list[dict]:
    """What torchrun would tell each rank by its environment, at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def run_ranks(
    trainer: str, num_ranks: int, log_dir: Path, *overrides: str, timeout: int = 300, with_torchrun: bool = False
) -> Path:
    """Ranks under torchrun, as users start them, or as torchrun does but without the time that imports take."""
    if with_torchrun:
        command = [*torchrun(num_ranks), f"{trainer}.py", *TINY, f"logger.log_dir={log_dir}", *overrides]
        done = subprocess.run(command, cwd=RECIPE, env=environment(), capture_output=True, text=True, timeout=timeout)
        output, code = done.stderr, done.returncode
    else:
        output, code = _processes(meeting(num_ranks), timeout, trainer, log_dir, *overrides)
    assert code == 0, output[-4000:]
    return log_dir


def train_on(distributed, trainer: str, *overrides: str) -> None:
    """The run itself, on ranks that are up already."""
    register_resolvers()
    with initialize_config_dir(str(RECIPE / "hydra_config"), version_base=None):
        config = compose("L0_sanity", [*TINY, *overrides])
    recipe_module(trainer).train(config, distributed)


def environment() -> dict:
    """This process's, without what a test before left of a process group."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def metrics(log_dir: Path, kind: str, key: str) -> list[float]:
    """One column of `metrics.jsonl`."""
    lines = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["kind"] == kind]


def straight_run(shared: Path, trainer: str) -> Path:
    """`LAST` steps on one rank, with checkpoints and the final model; the process that asks first makes it for all."""
    folder = shared / f"straight_{trainer}"
    with open(shared / f".{folder.name}", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (folder / "final_model").exists():
            run_here(trainer, folder, *saving_to(folder, LAST), "checkpoint.save_final_model=true")
    return folder


def saving_to(folder: Path, last: int) -> tuple[str, ...]:
    """The overrides of a run of so many steps with checkpoints there."""
    return f"num_train_steps={last}", f"checkpoint.ckpt_dir={folder}", f"checkpoint.save_every_n_steps={EVERY}"


def assert_same_weights(ours: Path, theirs: Path, **tolerance: float) -> None:
    """Of two step folders; to the bit unless there are tolerances."""
    ours, theirs = read_weights(ours), read_weights(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def curve(log_dir: Path) -> list[float]:
    """Every number that the trajectory decides."""
    return [x for kind, keys in THIS_RECIPE.CURVE.items() for key in keys for x in metrics(log_dir, kind, key)]


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
