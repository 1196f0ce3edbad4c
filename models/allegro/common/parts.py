# SPDX-License-Identifier: Apache-2.0
"""What a long command writes, in parts that ranks share out; the same command resumes an interrupted one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.command import writing
from common.distributed import Distributed
from common.step_folder import lock, unlock


class Parts:
    """Tables in `<target>.parts`, which become `target` when all are there; all ranks make it and call its methods.

    `job` is what they depend on. Raises ValueError for a target that exists, for parts of another job, and where
    another process writes them.
    """

    def __init__(self, distributed: Distributed, target: Path, job: dict):
        self.distributed, self.target = distributed, target
        self.folder = target.with_name(f"{target.name}.parts")
        if target.exists():
            raise ValueError(f"{target} exists; move it away or give another name.")
        with writing(target):
            if distributed.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock(self.folder.resolve(), 0, "")
                if not (self.folder / "job.json").exists():
                    (self.folder / ".job.json.partial").write_text(json.dumps(job))
                    (self.folder / ".job.json.partial").rename(self.folder / "job.json")
            distributed.gather(None)
            if json.loads((self.folder / "job.json").read_text()) != job:
                raise ValueError(
                    f"{self.folder} was begun with another file, model or option; remove it to start again."
                )

    def file(self, number: int) -> Path:
        """Where a part is, or will be."""
        return self.folder / f"part_{number:06d}.parquet"

    def mine(self, count: int) -> Iterator[tuple[int, bool]]:
        """Of so many parts those of this rank, and whether they are there."""
        for number in range(self.distributed.rank, count, self.distributed.num_ranks):
            yield number, self.file(number).exists()

    def save(self, number: int, table: pa.Table) -> None:
        """Write a part, whole or not at all. Raises ValueError where there is no room."""
        file = self.file(number)
        with writing(self.target):
            pq.write_table(table, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)

    def join(self, count: int, write: Callable[[list[Path], Path], None] | None = None) -> None:
        """Let `write` make one file of all parts, as Parquet unless it is given; it appears when it is complete."""
        with self.distributed.fail_together():
            self.distributed.gather(None)  # all parts are there
            if self.distributed.is_main:
                with writing(self.target):
                    (write or joined)([self.file(number) for number in range(count)], self.folder / "all.partial")
                    (self.folder / "all.partial").rename(self.target)
                    shutil.rmtree(self.folder)
        unlock()


def joined(files: list[Path], target: Path) -> None:
    """Tables in their order as one Parquet file."""
    with pq.ParquetWriter(target, pq.read_schema(files[0])) as writer:
        for file in files:
            writer.write_table(pq.read_table(file))
