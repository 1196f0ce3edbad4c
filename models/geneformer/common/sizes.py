# SPDX-License-Identifier: Apache-2.0
"""An index of a data set: the size of each row, measured once, and kept beside the data's cache for later runs.

Without it every worker of every rank would have to read all rows of a window to plan it.
"""

import errno
import shutil
import sys
import uuid
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm

from common.distributed import Distributed


CHUNK = 100_000  # rows that are measured, and saved, at once
OFFSETS = "offsets"

Measure = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


class SizeIndex:
    """The sizes of `num_rows` rows, one number each, or several where a row has several members to draw from.

    `sizes` is int32; the members of row r are at `offsets[r]` to `offsets[r + 1]` (None: one a row). Both are mapped
    into memory from files where there are any, so that ranks and workers share them.
    """

    def __init__(self, arrays: dict[str, np.ndarray] | None = None, files: dict[str, Path] | None = None):
        self.arrays, self.files = arrays, files

    def __getstate__(self) -> dict:  # a worker maps the files again
        return {"files": self.files, "arrays": None if self.files else self.arrays}

    def _array(self, name: str) -> np.ndarray | None:
        if self.arrays is None:
            self.arrays = {key: np.load(path, mmap_mode="r") for key, path in self.files.items()}
        return self.arrays.get(name)

    @property
    def sizes(self) -> np.ndarray:
        return self._array("sizes")

    @property
    def offsets(self) -> np.ndarray | None:
        return self._array(OFFSETS)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all sizes, wherever the data lies."""
        digest = sha256(np.ascontiguousarray(self.sizes))
        if self.offsets is not None:
            digest.update(np.ascontiguousarray(self.offsets))
        return digest.hexdigest()[:16]


def measured(sizes: list[np.ndarray], members: list[np.ndarray | None]) -> dict[str, np.ndarray]:
    """The arrays of an index from those of its chunks."""
    arrays = {"sizes": np.concatenate(sizes).astype(np.int32, copy=False)}
    if members[0] is not None:
        arrays[OFFSETS] = np.concatenate(([0], np.cumsum(np.concatenate(members), dtype=np.int64)))
    return arrays


def size_index(distributed: Distributed, section: str, key: str | None, num_rows: int, measure: Measure,
               cache: Path | None = None) -> SizeIndex:  # fmt: skip
    """The index of a data set that `key` tells from all others; all ranks call it.

    `measure(rows)` gives the sizes of these rows' members, and how many members each row has (None: one). The ranks
    of a node share out what is not in the cache yet; a run that is killed meanwhile goes on where it was. Without a
    `key`, as for rows that are held in memory, nothing is kept. `cache` is where `datasets` keeps this data, if not
    in its usual place. Raises ValueError as `measure` does.
    """
    firsts = range(0, num_rows, CHUNK)
    chunks = (np.arange(first, min(first + CHUNK, num_rows)) for first in firsts)
    if key is None:
        return SizeIndex(measured(*map(list, zip(*map(measure, chunks), strict=True))))
    folder = (cache or Path(datasets.config.HF_DATASETS_CACHE)) / "row_sizes"
    target, parts = folder / key, folder / f".{key}.by_{CHUNK}"
    if all(distributed.gather(target.is_dir())):
        return open_index(target)
    if num_rows > CHUNK:
        distributed.say(f"{section}: the sizes of {num_rows:,} rows are measured once, and kept in {folder}.")
    with distributed.shared_errors():
        mine = list(range(distributed.local_rank, len(firsts), distributed.num_local_ranks))
        # Each node begins at another place: where they share a cache, none measures what another has.
        first = len(mine) * (distributed.rank - distributed.local_rank) // distributed.num_ranks
        mine = mine[first:] + mine[:first]
        if target.is_dir():  # another node has a cache of its own, without it
            mine = []
        else:
            with writable(section, target):
                parts.mkdir(parents=True, exist_ok=True)
        quiet = not distributed.is_main or not sys.stderr.isatty()
        for number in tqdm(mine, unit=f" x {CHUNK:,} rows", desc=section, disable=quiet, leave=False):
            if target.is_dir():  # another run was faster
                break
            if not (path := parts / f"{number}.npz").exists():
                first = firsts[number]
                sizes, members = measure(np.arange(first, min(first + CHUNK, num_rows)))
                arrays = {"sizes": sizes} if members is None else {"sizes": sizes, "members": members}
                with writable(section, target):
                    save(path, lambda file, arrays=arrays: np.savez(file, **arrays))
    with distributed.shared_errors():
        if distributed.local_rank == 0 and not target.is_dir():
            with writable(section, target):
                join(parts, len(firsts), target)
    if distributed.local_rank == 0:  # now that no node needs them any more
        shutil.rmtree(parts, ignore_errors=True)
    return open_index(target)


def cache_of(rows: datasets.Dataset) -> Path | None:
    """The folder in which `datasets` keeps what it has converted, as its `cache_dir` says; None if it is the usual."""
    for file in rows.cache_files[:1]:  # below it: data set, configuration, version, fingerprint
        above = Path(file["filename"]).absolute().parents
        if len(above) > 4 and above[1].name == str(rows.info.version):
            return above[4]
    return None


def save(path: Path, write: Callable) -> None:
    """Write a file that is there as a whole or not at all, also where two nodes write the same one."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(partial, "wb") as file:
        write(file)
    partial.replace(path)


def join(parts: Path, num_parts: int, target: Path) -> None:
    """Make the index of its chunks; another node with the same folder may do so at the same time.

    Raises ValueError for a chunk that a power failure has cut short.
    """
    made, paths = parts / f"whole_{uuid.uuid4().hex}", [parts / f"{number}.npz" for number in range(num_parts)]
    made.mkdir()
    lengths = [{name: len(array) for name, array in read_chunk(path).items()} for path in paths]
    with new_array(made / "sizes.npy", np.int32, sum(one["sizes"] for one in lengths)) as write:
        for path in paths:  # one in memory
            write(read_chunk(path)["sizes"])
    if "members" in lengths[0]:
        with new_array(made / f"{OFFSETS}.npy", np.int64, sum(one["members"] for one in lengths) + 1) as write:
            write(last := np.zeros(1, np.int64))
            for path in paths:
                write(found := last[-1] + np.cumsum(read_chunk(path)["members"], dtype=np.int64))
                last = found
    try:
        made.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else the other was faster
            raise


@contextmanager
def new_array(path: Path, dtype: type, length: int):
    """What appends to a new .npy file of so many numbers."""
    with open(path, "wb") as file:
        form = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, form)
        yield lambda array: file.write(array.astype(dtype, copy=False).tobytes())


def read_chunk(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a chunk. Removes one that is damaged, and raises ValueError."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{path} was damaged and is removed; start again, and it will be measured again.") from error


def open_index(folder: Path) -> SizeIndex:
    """An index that is in the cache."""
    return SizeIndex(files={path.stem: path for path in folder.glob("*.npy")})


@contextmanager
def writable(section: str, target: Path):
    """A cache that cannot be written becomes one sentence that says what to do.

    Another run with the same data may finish the index first, and remove the chunks of both: then all is well.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and target.is_dir():
            return
        raise ValueError(
            f"{section}: the cache {target.parent} cannot be written ({error.strerror}); set HF_HOME or "
            "HF_DATASETS_CACHE to a folder that can."
        ) from error
