# SPDX-License-Identifier: Apache-2.0
"""Where the time of training steps goes, by kind of work."""

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tokens import layers


# The first kind with a word that is part of an operation's name has it.
KINDS = {
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("scaled_dot_product", "softmax", "bmm", "flash", "varlen", "fmha", "attention"),
    "matrix products": ("addmm", "::mm", "mmbackward", "linear", "scaled_mm", "gemm"),
    "layer norm": ("layer_norm",),
    "GELU": ("gelu", "erf", "mlp"),
    "elementwise and copies": (
        "add", "mul", "sub", "div", "copy", "cat", "neg", "sum", "fill", "zero", "empty", "index", "where", "clone",
        "_to_", "::to", "cos", "sin", "split", "stack", "triton", "cpp_fused", "graph_", "arange", "embedding",
        "transpose", "view", "chunk", "narrow", "slice", "select", "expand", "contiguous", "cumsum", "bucketize",
    ),
}  # fmt: skip
MARK = "kind: "  # names a range of the forward pass whose work, backward too, is one kind
KERNELS = ("tokens::attention", "tokens::layer_norm", "tokens::add_layer_norm")  # operators of one kind
OPTIMIZER = ("Optimizer.step", "Optimizer.zero_grad", "clip_grad")
IN_SCOPES = {"attention": "attention", "rotate": "rotary positions"}  # functions of layers.py


class Profile:
    """A profile from here until `stop`."""

    def __init__(self, device: str):
        self.on_gpu, self.functions = device == "cuda", {}
        for name, kind in IN_SCOPES.items():
            function = self.functions[name] = getattr(layers, name, None)
            # A compiled layer would be compiled anew.
            if function is not None and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
                setattr(layers, name, marked(function, kind))
        self.clip = torch.nn.utils.clip_grad_norm_
        torch.nn.utils.clip_grad_norm_ = marked(self.clip, "optimizer")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        self.profiler = profile(activities=activities, acc_events=True)
        self.profiler.__enter__()

    def stop(self, seconds: float, data_wait_s: float) -> dict[str, float]:
        """Seconds by kind; what is no operation is `other`."""
        self.profiler.__exit__(None, None, None)
        torch.nn.utils.clip_grad_norm_ = self.clip
        for name, function in self.functions.items():
            if function is not None:
                setattr(layers, name, function)
        spent = by_kind(self.profiler.events(), self.on_gpu)
        spent["data"] = data_wait_s
        spent["other"] += seconds - sum(spent.values())
        return dict(spent.most_common())


def marked(function, kind: str):
    """The function, with its name in the profile."""

    def inner(*args, **kwargs):
        with record_function(MARK + kind):
            return function(*args, **kwargs)

    return inner


def by_kind(events: list, on_gpu: bool) -> Counter:
    """Each operation's own seconds, given to the range it is in, or else to a kind by its name.

    A backward operation belongs where the forward operation of the same sequence number was.
    """
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    ranges, of_sequence = {}, {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        parent = event.cpu_parent
        if event.name.startswith(MARK):
            ranges[event.id] = event.name.removeprefix(MARK)
        elif event.name.startswith(OPTIMIZER):
            ranges[event.id] = "optimizer"
        elif event.name.startswith(KERNELS):
            ranges[event.id] = kind_of(event.name)
        elif parent is not None and parent.id in ranges:
            ranges[event.id] = ranges[parent.id]
        elif event.fwd_thread and of_sequence.get(event.sequence_nr):
            ranges[event.id] = of_sequence[event.sequence_nr]
        if event.sequence_nr >= 0 and not event.fwd_thread:
            # What needs no gradient has the number of the next that does: the last one counts.
            of_sequence[event.sequence_nr] = ranges.get(event.id)
    spent = Counter({"other": 0.0})
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[ranges.get(event.id) or kind_of(event.name)] += own / 1e6
    return spent


def kind_of(name: str) -> str:
    """The kind of an operation that is in no range."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
