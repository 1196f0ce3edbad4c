# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the transformer layer this machine has: TransformerEngine's, the CPU's kernels or PyTorch's.

None is imported before it is asked for.
"""

from functools import partial

import torch


def te_available() -> tuple[bool, str]:
    """Whether TransformerEngine's layer can be used here and, if not, why."""
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    try:
        layer_class("te")
    except (ImportError, OSError, RuntimeError) as error:  # missing package, missing libraries, wrong build
        return False, f"TransformerEngine cannot be imported ({error})"
    return True, ""


def cpp_available(head_dim: int) -> tuple[bool, str]:
    """Whether the CPU's kernels for heads of so many channels can be compiled here and, if not, why."""
    from tokens import layers_cpp

    try:
        layers_cpp.library(head_dim)
    except RuntimeError as error:
        return False, str(error)
    return True, ""


def resolve_layer_backend(asked: str, head_dim: int) -> str:
    """`te`, `cpp` or `torch` for `asked`, which may be `auto`: what is fastest of that which works.

    Raises ValueError where a backend is asked for and does not work.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return "te" if te_available()[0] else "torch"
        return "cpp" if cpp_available(head_dim)[0] else "torch"
    available, reason = {"te": te_available, "cpp": partial(cpp_available, head_dim)}.get(asked, lambda: (True, ""))()
    if not available:
        raise ValueError(f"layer_backend: {asked} is impossible because {reason}; use layer_backend: torch or auto.")
    return asked


def agreed_layer_backend(distributed, asked: str, head_dim: int) -> tuple[str, str | None]:
    """As `resolve_layer_backend`, but PyTorch's layers on all ranks where one has no others; and the log's note."""
    mine = resolve_layer_backend(asked, head_dim)
    found = distributed.gather((mine, slower_backend_note(asked, mine, distributed.device, head_dim)))
    if len({backend for backend, _ in found}) == 1:
        return found[0]
    rank, (_, note) = next(item for item in enumerate(found) if item[1][0] == "torch" or item[0] == len(found) - 1)
    return "torch", f"layer_backend: auto is PyTorch's on all ranks, because of rank {rank}. {note or ''}".strip()


def layer_class(backend: str, post_norm: bool = False) -> type[torch.nn.Module]:
    """The transformer layer of `te`, `cpp` or `torch`, all with the same parameters and arguments."""
    if backend == "te":
        from tokens import layers_te as layers
    elif backend == "cpp":
        from tokens import layers_cpp as layers
    else:
        from tokens import layers
    return layers.PostNormLayer if post_norm else layers.TransformerLayer


def slower_backend_note(asked: str, backend: str, device: torch.device, head_dim: int) -> str | None:
    """Why `auto` came to PyTorch's layers, for the log; None where it did not, or they were asked for."""
    if asked != "auto" or backend != "torch":
        return None
    reason = cpp_available(head_dim)[1] if device.type == "cpu" else te_available()[1]
    which = "kernels for CPUs cannot be compiled" if device.type == "cpu" else "faster form cannot be had"
    return f"The layers' {which} ({reason}); PyTorch's are slower."
