# SPDX-License-Identifier: Apache-2.0
"""Memory on CPUs: what tensors free is kept for the next ones, by an allocator in `cpu_memory.cpp`; oneDNN keeps less.

glibc gives large blocks back, and the kernel then has to clear each page of the next one, up to a tenth of a step.
Told to keep them, it fills up with holes. Here a block is used again for what is as large or up to an eighth smaller,
and no more is held than the most that was ever in use and an eighth.
"""

import os
from pathlib import Path

from common.compile_cpp import compiled


SOURCE = Path(__file__).with_suffix(".cpp")
_library = None


def keep_freed_memory() -> None:
    """For all tensors that this process makes from now on. Without a C++ compiler nothing changes."""
    global _library
    if _library is None:
        try:
            _library = compiled(SOURCE)
        except RuntimeError:  # the run says so where the layers' kernels are missed
            return
        _library.keep_freed_memory()


def keep_fewer_products() -> None:
    """For a process that has not multiplied yet: how many of its compiled matrix products oneDNN keeps.

    There is one for each shape, so 12 for each new number of rows and 15 for each of selected ones (rounded);
    each takes half a MiB. PyTorch and oneDNN would keep 1,024 each; 256 are those of some fifteen batches. What the
    environment says is left alone.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "256")  # PyTorch's, which crashes with 0
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # oneDNN's former name for it
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def trim() -> None:
    """Give back what lies idle, for other processes."""
    if _library is not None:
        _library.trim()
