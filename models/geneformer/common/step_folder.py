# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on disk: a folder `step_<n>` that is there as a whole or not at all, with a checksum of each file.

It is written as `.step_<n>.partial` and renamed when DCP has written `.metadata` and the checksums are there, so a
run that dies or a disk that fills up leaves nothing that looks like a checkpoint. `sha256sum -c SHA256SUMS` inside the
folder checks it without us.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.utils._pytree import tree_map

from common import safe_reading
from common.files import open_to_readers
from common.safe_reading import read_metadata


SUMS = "SHA256SUMS"
LOCKS: dict[Path, int] = {}


def numbered(folder: Path) -> list[int]:
    """The steps that have a folder, oldest first."""
    return sorted(
        int(found.name[5:]) for found in folder.glob("step_*") if re.fullmatch(r"0|[1-9][0-9]*", found.name[5:])
    )


def steps_for_all(distributed, folder: Path) -> list[int]:
    """As `numbered`. Raises ValueError where `checkpoint.ckpt_dir` is not the same folder for all ranks."""
    probe = folder / f".shared_{uuid.uuid4().hex}"
    if distributed.is_main:
        probe.touch()
    probe = distributed.gather(probe)[0]
    steps = numbered(folder)
    seen = distributed.gather((probe.exists(), steps))
    if distributed.is_main:
        probe.unlink()
    if any(other != (True, steps) for other in seen):
        raise ValueError(
            f"checkpoint.ckpt_dir={folder} is not the same folder for all ranks; it has to be one that all nodes "
            "share."
        )
    return steps


def complete_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints were written to the end, oldest first."""
    return [step for step in numbered(folder) if (folder / f"step_{step}" / ".metadata").exists()]


def lock(folder: Path, seconds: float = 60, name: str = "checkpoint.ckpt_dir=") -> None:
    """Hold a folder for this process's life. Raises ValueError if another still has it after some time.

    `name` is what a sentence has before the folder; the wait is said as it begins.

    The lock is on the folder itself, so it leaves no file; where a file system has none there is none.
    """
    if folder in LOCKS:
        return
    handle, began, is_said = os.open(folder, os.O_RDONLY), time.monotonic(), seconds == 0
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > began + seconds:
                os.close(handle)
                raise ValueError(
                    f"{name}{folder}: another run writes to it; stop that one, or take another folder."
                ) from None
            if not is_said:
                wait = f"{name}{folder}: another run writes to it; waiting for its end, {seconds:.0f} s at most."
                print(wait, file=sys.stderr, flush=True)
                is_said = True
            time.sleep(0.2)
        except OSError:
            os.close(handle)
            return
        else:
            LOCKS[folder] = handle
            return


def unlock() -> None:
    """Let go of what this process holds."""
    while LOCKS:
        os.close(LOCKS.popitem()[1])


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that it counts no more; nothing of it is deleted."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged_{number}")
    path.rename(target)


def tidy_litter(folder: Path) -> None:
    """Remove what killed runs have left half written or half deleted."""
    for pattern in (".step_*.old", ".step_*.partial", ".final_model.partial"):
        for litter in folder.glob(pattern):
            shutil.rmtree(litter, ignore_errors=True)
    for probe in folder.glob(".shared_*"):
        with suppress(OSError):
            probe.unlink()


def damage(path: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, None if nothing; ranks can share the files out.

    Raises ValueError for what may be whole but cannot be read.
    """
    try:
        if not path.is_dir():
            return "there is no such folder"
        if not (path / ".metadata").exists() and (inside := complete_steps(path)):
            return f"it holds step_{inside[-1]}, which is one"
        if not (path / ".metadata").exists():
            return "it has no .metadata: it was not written or copied to its end"
        sums = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
        if not sums or sums[-1][1:] != [".metadata"]:  # the last to be written
            return f"{SUMS} is cut short"
        with ThreadPoolExecutor() as pool:
            share_of_sums = sums[share::num_shares]
            found = pool.map(lambda item: sha256(path / item[1]), share_of_sums)
            wrong = [name for (digest, name), now in zip(share_of_sums, found, strict=True) if digest != now]
        return f"{wrong[0]} is not what was written: its checksum differs" if wrong else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except UnicodeDecodeError:
        return f"{SUMS} is no text"
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}; nothing was changed.") from error


def sha256(file: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_weights(step_folder: Path) -> dict[str, torch.Tensor]:
    """The model's full tensors on the CPU, from the shards of any strategy and number of ranks.

    The averaged weights (`ema_decay`), where there are any, take the place of the last ones. TransformerEngine's FP8
    state is left out: it is of use only to go on training.
    """
    metadata = read_metadata(step_folder).state_dict_metadata
    averaged = {f"model.{name.removeprefix('ema.')}" for name in metadata if name.startswith("ema.")}
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(("model.", "ema.")) and not name.endswith("._extra_state") and name not in averaged
    }
    safe_reading.load(state, step_folder, no_dist=True)
    return {name.partition(".")[2]: tensor for name, tensor in state.items()}


def write_through(file: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with open(file, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def has_own_offsets(tensor: torch.Tensor) -> bool:
    """Whether this is a shard of an uneven split that carries the offsets of what it holds."""
    return hasattr(getattr(tensor, "_local_tensor", None), "__create_chunk_list__")


def copy_offsets(tensor: DTensor, shard: torch.Tensor) -> None:
    """Let a tensor that is split like `shard` carry the same offsets."""
    tensor._local_tensor.__create_chunk_list__ = shard.__create_chunk_list__
    tensor._local_tensor.__create_write_items__ = shard.__create_write_items__


def staged(value):
    """A copy on the CPU of a tensor, which the optimizer would go on writing to; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().to("cpu", copy=True)
    if has_own_offsets(value):
        copy_offsets(copy, value._local_tensor)
    return copy


class StepWriter(dcp.FileSystemWriter):
    """DCP's writer for one step folder; `run` is the text of `run.json`. What fails on one rank, DCP raises on all.

    The first rank calls `then` when the folder is complete.
    """

    def __init__(self, target: Path, run: str, then: Callable[[], None] = lambda: None):
        super().__init__(target.with_name(f".{target.name}.partial"))
        self.target, self.run, self.then = target, run, then

    _synchronize_after_execute = False  # `stage` returns when all is copied

    def stage(self, state_dict: dict) -> dict:
        """What a save in the background writes."""
        return tree_map(staged, state_dict)

    def prepare_local_plan(self, plan):
        """On each rank; the folder is made by the first."""
        return plan

    def prepare_global_plan(self, plans):
        """On the first rank, between the plans of all and the first byte."""
        shutil.rmtree(self.path, ignore_errors=True)  # what a killed run left of this step
        self.path.mkdir(parents=True, exist_ok=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner) -> Future:
        """On each rank: its shards, and their checksums as read back."""
        try:
            written = super().write_data(plan, planner).wait()
        except RuntimeError as error:  # a full disk makes torch.save complain of a wrong position
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        names = sorted({result.storage_data.relative_path for result in written})
        done = Future()
        done.set_result((written, {name: sha256(self.path / name) for name in names}))
        return done

    def finish(self, metadata, results) -> None:
        """On the first rank, when all have written."""
        write_through(self.path / "run.json", self.run)
        super().finish(metadata, [written for written, _ in results])
        sums = {name: digest for _, digests in results for name, digest in digests.items()}
        if missing := next((name for name in sums if not (self.path / name).exists()), None):
            raise FileNotFoundError(
                errno.ENOENT, f"{missing} of another rank is not here; it has to be one folder that all nodes share"
            )
        sums |= {name: sha256(self.path / name) for name in ("run.json", ".metadata")}
        write_through(self.path / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        open_to_readers(self.path)
        self.path.rename(self.target)
        with suppress(OSError):  # not every file system can
            folder = os.open(self.target.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self.then()  # here, so that of saves in the background too the older ones go at once
