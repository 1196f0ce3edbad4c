# SPDX-License-Identifier: Apache-2.0
"""One checkpoint on disk: a folder `step_<n>` that is there as a whole or not at all, with a checksum of each file.

It is written as `.step_<n>.partial` and renamed when DCP has written `.metadata` and the checksums are there, so a
run that dies or a disk that fills up leaves nothing that looks like a checkpoint. `sha256sum -c SHA256SUMS` inside the
folder checks it without us.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.utils._pytree import tree_map


SUMS = "SHA256SUMS"


def numbered(folder: Path) -> list[int]:
    """The steps that have a folder, oldest first."""
    return sorted(int(found.name[5:]) for found in folder.glob("step_*") if found.name[5:].isdigit())


def complete_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints were written to the end, oldest first."""
    return [step for step in numbered(folder) if (folder / f"step_{step}" / ".metadata").exists()]


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that it counts no more; nothing of it is deleted."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged_{number}")
    path.rename(target)


def damage(path: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, None if nothing; ranks can share the files out."""
    try:
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
    except (OSError, ValueError) as error:  # a missing file, a bad sector, bytes that are no text
        name = Path(error.filename).name if isinstance(error, OSError) and error.filename else SUMS
        return f"{name}: {error.strerror if isinstance(error, OSError) else 'is no text'}"


def sha256(file: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_through(file: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with open(file, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def knows_its_place(tensor: torch.Tensor) -> bool:
    """Whether this is a shard of an uneven split that can say which rows it holds."""
    return hasattr(getattr(tensor, "_local_tensor", None), "__create_chunk_list__")


def tell_its_place(tensor: DTensor, shard: torch.Tensor) -> None:
    """Let a tensor that is split like `shard` say so."""
    tensor._local_tensor.__create_chunk_list__ = shard.__create_chunk_list__
    tensor._local_tensor.__create_write_items__ = shard.__create_write_items__


def staged(value):
    """A copy on the CPU of a tensor, which the optimizer would go on writing to; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().to("cpu", copy=True)
    if knows_its_place(value):
        tell_its_place(copy, value._local_tensor)
    return copy


class StepWriter(dcp.FileSystemWriter):
    """DCP's writer for one step folder; `run` is the text of `run.json`. What fails on one rank, DCP raises on all."""

    def __init__(self, target: Path, run: str):
        super().__init__(target.with_name(f".{target.name}.partial"))
        self.target, self.run = target, run

    _synchronize_after_execute = False  # `stage` returns when all is copied

    def stage(self, state_dict: dict) -> dict:
        """What a save in the background writes."""
        return tree_map(staged, state_dict)

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
        sums |= {name: sha256(self.path / name) for name in ("run.json", ".metadata")}
        write_through(self.path / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        self.path.rename(self.target)
