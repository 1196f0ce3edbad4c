# SPDX-License-Identifier: Apache-2.0
"""Import this first: it turns off what third parties say that no user can act on, and output ends no run."""

import logging
import os
import sys
import warnings
from contextlib import suppress


class Lasting:
    """A stream that outlives whoever reads it: what a closed pipe or terminal does not take is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def keep_streams() -> None:
    """From here on, a closed pipe or terminal does not end this process."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)


for number, name in ((1, "stdout"), (2, "stderr")):
    if getattr(sys, name) is None:  # closed, as by 2>&-: the next file that is opened would get its messages
        with suppress(OSError):
            if (null := os.open(os.devnull, os.O_WRONLY)) != number:
                os.dup2(null, number)
                os.close(null)
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 (for the process's life)


# transformers imports torchao, and torchao looks for GPU kernels that training does not use.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
# datasets logs each error that it raises as well.
os.environ.setdefault("DATASETS_VERBOSITY", "critical")
# The hub's library tells of each attempt, and raises when it gives up.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")  # megatron-fsdp
warnings.filterwarnings(
    "ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning
)  # megatron-fsdp
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as an offline export wants it
# megatron-fsdp: what is frozen stays gathered; the contract holds the curves equal.
warnings.filterwarnings("ignore", message="There are still pending all-gather tasks")
logging.getLogger("megatron_fsdp").setLevel(logging.WARNING)  # it lists every parameter
if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
