# SPDX-License-Identifier: Apache-2.0
"""FP32, or BF16 compute over FP32 masters."""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import torch

from common.distributed import Distributed


def bf16_is_faster(device: torch.device, bf16_pays: bool) -> bool:
    """Whether BF16 is faster than FP32 here, for a model that is large enough for it on CPUs (`bf16_pays`)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # By what the CPU is, so that all ranks and every restart come to the same (docs/log.md).
    # What has AMX has AVX-512 BF16.
    return bf16_pays and torch.cpu._is_avx512_bf16_supported()


def agreed_precision(distributed: Distributed, asked: str, bf16_pays: bool) -> tuple[str, str | None]:
    """`bf16` or `fp32` for all ranks, and a sentence for the log where auto is not the same on all of them."""
    if asked != "auto":
        return asked, None
    found = distributed.gather(bf16_is_faster(distributed.device, bf16_pays))
    if len(set(found)) == 1:
        return "bf16" if found[0] else "fp32", None
    return "fp32", f"precision: auto is FP32 on all ranks, because BF16 is not faster on rank {found.index(False)}."


class Precision:
    """How a run computes: `dtype` in the model's layers (None: FP32), with FP32 weights always.

    `precision` is auto, bf16 or fp32; auto takes BF16 where it is faster. `notes` are sentences for the reader of the
    log, `backend` is whose implementation of the layers computes, where there are several. For subclasses with fewer
    bits: `multiple` is what the number of rows of a rank's matrices must divide by, `layers` are those of each format,
    as text, `stats` measures what rounding does, and `product` is the layers' x [rows, in] by weight [out, in].
    """

    def __init__(self, device: torch.device, precision: str, bf16_pays: bool):
        self.device = device
        takes_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_faster(device, bf16_pays))
        self.dtype = torch.bfloat16 if takes_bf16 else None
        self.name = "bf16" if takes_bf16 else "fp32"
        self.reduce_dtype = torch.float32 if takes_bf16 else None  # of gradients that are summed; None: as they are
        self.multiple = 1
        self.notes: list[str] = []
        self.backend: str | None = None
        self.layers: dict[str, str] = {}
        self.stats = None
        self.product = torch.nn.functional.linear

    def prepare(self, layers: Sequence[torch.nn.Module]) -> None:
        """Change how a new model's layers compute; FP32 and BF16 need nothing."""

    @contextmanager
    def forward(self, autocast: bool = False):
        """Around a forward pass; `autocast` where no strategy casts the parameters."""
        cast = autocast and self.dtype is not None
        with torch.autocast(self.device.type, self.dtype) if cast else nullcontext():
            yield
