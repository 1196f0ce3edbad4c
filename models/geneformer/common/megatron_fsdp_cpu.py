# SPDX-License-Identifier: Apache-2.0
"""Let Megatron-FSDP, which is written against `torch.cuda`, train on CPUs over gloo."""

import contextlib
import importlib
import types

import torch


class _Stream:
    """A stream that is its own event, with nothing to wait for: CPU work is done when a call returns."""

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return self

    def wait(self):
        pass


def _tensor(*args, **kwargs):
    tensor = torch.tensor(*args, **kwargs)
    tensor.cuda = lambda: tensor
    return tensor


class _DistributedOnCPU(types.ModuleType):
    """`torch.distributed`, whose collectives are done when a call returns.

    With gloo's coalesced ones, which Megatron-FSDP would take, a run in a hundred crashed: docs/log.md.
    """

    @staticmethod
    def all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False):
        torch.distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group)
        return _Stream()

    def __getattr__(self, name):
        return getattr(torch.distributed, name)


@contextlib.contextmanager
def _one_by_one(group=None, device=None, async_ops=False):
    yield _Stream()


class _TorchOnCPU(types.ModuleType):
    """`torch`, except for what Megatron-FSDP 0.6.1 takes from CUDA in FP32 and BF16."""

    cuda = types.SimpleNamespace(
        Stream=_Stream,
        current_stream=_Stream,
        stream=contextlib.nullcontext,
        current_device=lambda: 0,
        empty_cache=lambda: None,
        is_available=lambda: False,
    )
    distributed = _DistributedOnCPU("torch.distributed")
    device = staticmethod(lambda name: torch.device("cpu"))
    tensor = staticmethod(_tensor)

    def __getattr__(self, name):
        return getattr(torch, name)


def stand_in_for_cuda() -> str | None:
    """Without CUDA, give Megatron-FSDP, and nobody else, a `torch.cuda` that does nothing; call it before wrapping.

    Returns the sentence that tells the user so, None where CUDA is there.
    """
    if torch.cuda.is_available():
        return None
    # Its own name for `torch` is replaced in its own files: `torch.cuda` stays what it is for the rest of the process.
    for name in ("megatron_fsdp", "param_and_grad_buffer", "uneven_dtensor"):
        module = importlib.import_module(f"megatron_fsdp.{name}")
        module.torch = _TorchOnCPU("torch")
        if hasattr(module, "_coalescing_manager"):
            module._coalescing_manager = _one_by_one
    return "Megatron-FSDP on the CPU: a stand-in that does nothing takes the place of its CUDA streams and events."
