# SPDX-License-Identifier: Apache-2.0
"""Small things about files and what is written to them, for trainers and for commands that need no torch."""

import errno
import math
import os
import shutil
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any


# What the system says of a folder that cannot be written, or of one without locks.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST,
              errno.ENOLCK, errno.ENOSYS)  # fmt: skip


def flat(config: dict, prefix: str = "", keep_empty: bool = True) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; an empty section is a value, or left out unless `keep_empty`."""
    items = {}
    for key, value in config.items():
        if isinstance(value, dict) and (value or not keep_empty):
            items |= flat(value, f"{prefix}{key}.", keep_empty)
        else:
            items[f"{prefix}{key}"] = value
    return items


def names(value: Any) -> Any:
    """Of a file or folder, or of each in a list, the name without what is above it; anything else as it is."""
    if isinstance(value, list | tuple):
        return [names(item) for item in value]
    if isinstance(value, dict):
        return {key: names(item) for key, item in value.items()}
    is_path = isinstance(value, str) and value.startswith(("/", ".", "~")) and "://" not in value
    return Path(value).name if is_path else value


def finite(value: Any) -> Any:
    """None for a NaN or an infinity, which JSON does not have, also inside dicts and lists; anything else as it is."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: float, places: int = 4) -> str:
    """A number with so many places, as 2.3456, or with as many digits where it would lose them, as 0.0001234."""
    return f"{value:.{places}f}" if value == 0 or abs(value) >= 0.1 else f"{value:.{places}g}"


def append_line(path: Path, line: str) -> str | None:
    """Add a line, all of it or nothing; what went wrong, if anything. A full disk is no reason to stop."""
    try:
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line + "\n")
        except OSError:
            with suppress(OSError):  # the first error says what is wrong
                os.truncate(path, size)
            raise
    except OSError as error:
        return error.strerror
    return None


def make_folder(key: str, folder: Path, rank: int) -> None:
    """Make a folder and write to it. Raises ValueError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe_{rank}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be written: {error.strerror}; give another folder.") from error


def open_to_readers(folder: Path) -> None:
    """Give all in a folder the modes that new files have here (umask): safetensors writes for its owner alone."""
    probe = folder / ".probe"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        with suppress(OSError):  # not every file system has modes
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


@contextmanager
def whole_folder(target: Path):
    """Gives a folder to write to, which takes the name `target` once the block has ended well, and goes otherwise."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        open_to_readers(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def moved_aside(path: Path) -> Path:
    """Rename a file or folder to the first free `<name>.before_<n>`, and return that."""
    target = next(t for n in count(1) if not (t := path.with_name(f"{path.name}.before_{n}")).exists())
    path.rename(target)
    return target
