# SPDX-License-Identifier: Apache-2.0
"""How every command ends: with one sentence and exit code 2 at a user's mistake, never with a traceback."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.files import whole_folder


def one_line(error: BaseException) -> str:
    """What an error says, in one line; of the system's with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if isinstance(error.filename, str) else None
        return f"{where}: {error.strerror}" if where else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def command():
    """Around what a command does: its ValueErrors and the system's errors are a user's mistakes.

    Whoever reads the output may stop before its end, as `| head` does: then the command ends too, and all is well.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        from common.distributed import stop_with  # commands of one process need no torch

        stop_with(one_line(error))
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def writing(target: Path):
    """Around what writes a folder or file: raises ValueError where the system or a full disk does not let it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target} cannot be written ({one_line(error)}); make room or give another name.") from error


@contextmanager
def new_folder(target: Path):
    """`whole_folder` of a command's `target`.

    Raises ValueError for a target that has something in it, and where it cannot be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists; move it away or give another name.")
    with writing(target), whole_folder(target) as folder:
        yield folder
