# SPDX-License-Identifier: Apache-2.0
"""C++ files compiled when they are first needed, and kept for later runs."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths


# Two parts of -ffast-math are safe. All of it would switch the whole process to flushing denormal numbers to zero.
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip


def folder() -> Path:
    """Where torch keeps extensions: `$TORCH_EXTENSIONS_DIR`, or below the user's cache."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home / "torch_extensions")


def compiled(source: Path, *definitions: str) -> ctypes.CDLL:
    """A C++ file as a library; compiled once for each torch and kind of processor, in about 4 s.

    Raises RuntimeError with the reason where that does not work.
    """
    compiler, options = get_cxx_compiler(), [*FLAGS, *definitions]
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration) as error:
        raise RuntimeError("only Linux on x86 processors is supported") from error
    key = hashlib.sha256(repr((source.read_bytes(), options, compiler, torch.__version__, cpu)).encode())
    path = folder() / f"{source.stem}_{key.hexdigest()[:16]}.so"
    if not path.exists():
        if not shutil.which(shlex.split(compiler)[0]):
            raise RuntimeError(f"there is no C++ compiler ({compiler})")
        options += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # ranks may compile side by side
                made = Path(scratch) / path.name
                command = [*shlex.split(compiler), *options, str(source), "-o", str(made), "-ltorch_cpu", "-lc10"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    lines = done.stderr.strip().splitlines() or ["no reason"]
                    raise RuntimeError(f"{compiler} fails: {next((x for x in lines if 'error' in x), lines[-1])}")
                made.replace(path)
        except OSError as error:
            raise RuntimeError(f"{path.parent}: {error.strerror}") from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded: {error}") from error
