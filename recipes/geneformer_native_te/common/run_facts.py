# SPDX-License-Identifier: Apache-2.0
"""What a run is, for `run.json` and Weights & Biases: machine, versions, code."""

import hashlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from common import RECIPE


# Dense BF16 matrix products, TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "A100": 312, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
    "GB200": 2250, "B300": 2250,
}  # fmt: skip
PACKAGES = (
    "torch",
    "transformers",
    "transformer-engine",
    "megatron-fsdp",
    "torchao",
    "datasets",
    "torchdata",
    "hydra-core",
)


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or a processor that has no such line
        return platform.processor() or platform.machine()


def code_hash() -> str:
    """A hash of the code at the top of the recipe and in its rooms: it tells two runs' code apart without git."""
    digest = hashlib.sha256()
    rooms = [RECIPE, *(file.parent for file in RECIPE.glob("*/__init__.py"))]
    files = [file for room in rooms for kind in ("*.py", "*.cpp") for file in room.glob(kind)]
    for name, file in sorted((file.relative_to(RECIPE).as_posix(), file) for file in files):
        digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of the folder the recipe is in, if it is in a repository."""
    command = ["git", "-C", str(RECIPE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def start_wandb(
    run: dict,
    *,
    mode: Literal["online", "offline", "disabled", "shared"] = "disabled",
    project: str | None = None,
    name: str | None = None,
    **wandb_kwargs,
):
    """`wandb.init` for a run with these facts; None where it is disabled. Raises ValueError where it fails."""
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb_init_args.mode={mode} needs the package wandb: pip install wandb, or set mode=disabled."
        ) from error
    try:
        return wandb.init(mode=mode, project=project, name=name, config=run, **wandb_kwargs)
    except (TypeError, ValueError, wandb.Error) as error:  # an unknown argument, a bad value, no account or connection
        raise ValueError(f"wandb_init_args: wandb does not start with mode={mode}: {error}") from error


@cache
def measured_tflops(dtype: torch.dtype, product: Callable) -> float:
    """The CPU's rate in TFLOP/s in products of 1024 x 1024 matrices: the best of 18, about 0.3 s.

    Those of a layer: `product(x, weight)` of [rows, in] and [out, in], and the two of its backward pass.
    """
    x, weight, gradient = torch.randn(3, 1024, 1024, dtype=dtype)
    best = float("inf")
    for way in (partial(product, x, weight), partial(torch.mm, gradient, weight), partial(torch.mm, gradient.T, x)):
        way()  # the first one is slow: oneDNN compiles it
        begun = time.perf_counter()
        for _ in range(6):
            start = time.perf_counter()
            way()
            best = min(best, time.perf_counter() - start)
            if start > begun + 0.5:  # a processor without this format
                break
    return 2 * 1024**3 / best / 1e12


def peak_of(
    device: torch.device, dtype: torch.dtype, product: Callable, given: float | None
) -> tuple[float | None, str]:
    """The peak of one GPU or CPU in TFLOP/s, if it is known, and where that is from; `product` is what trains."""
    if given:
        return given, "given"
    if device.type == "cpu":
        return measured_tflops(dtype, product), "measured"
    words = device_name(device).replace("-", " ").split()
    peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in words), None)
    return peak, "data sheet" if peak else "unknown"


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on the GPU what torch allocated, on the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
