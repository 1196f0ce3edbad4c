# SPDX-License-Identifier: Apache-2.0
"""The host waits for the device once a step: what else it needs to know, it knows from the batch.

Run on the CPU, with the code paths of a GPU: everything that would wait there is counted.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.anomalies import Anomalies
from common.contract.running import TRAINERS, run_here


PYTHON = ("item", "tolist", "nonzero", "cpu", "to", "__int__", "__float__", "__bool__", "__index__")
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index")


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would wait for; `calls` says what that was."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in OPERATORS or by_mask:
            self.calls.append(name)
        return function(*args, **kwargs or {})


@pytest.fixture
def waits(monkeypatch):
    """By step, those since the step before; the mode is on from the first step to the last."""
    mode, judge = Waits(), Anomalies.judge
    mode.by_step = []

    def counting(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            # By its name, which is how code brings something back; a run's device is an object, here too.
            if name == "to" and not any(isinstance(x, str) and x == "cpu" for x in (*args, *kwargs.values())):
                return original(self, *args, **kwargs)
            inside, before = getattr(mode, "inside", False), len(mode.calls)
            mode.inside = True
            try:
                return original(self, *args, **kwargs)
            finally:
                mode.inside = inside
                del mode.calls[before:]  # the operators below it are the same wait
                mode.calls.append(name)

        return method

    for name in PYTHON:
        monkeypatch.setattr(torch.Tensor, name, counting(name))

    def judged(self, step, *rest):
        found = judge(self, step, *rest)
        if step > 1:
            mode.by_step.append(list(mode.calls))
        else:
            mode.__enter__()
        mode.calls.clear()
        return found

    monkeypatch.setattr(Anomalies, "judge", judged)
    yield mode
    if mode.by_step:
        mode.__exit__(None, None, None)


@pytest.mark.rotated
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_once_a_step(trainer, layout, waits, tmp_path):
    packing = f"use_sequence_packing={str(layout == 'packed').lower()}"
    options = ("validation.load_dataset_kwargs=null", "layer_backend=torch", "model_kwargs.hidden_dropout_prob=0.1")
    run_here(trainer, tmp_path, *options, "ema_decay=0.9", packing, apart=False)
    assert waits.by_step == [["cpu"]] * 5


def test_the_count_sees_what_waits(waits):
    waits.by_step.append([])
    x = torch.arange(3.0)
    with waits:
        x[x > 0], x.sum().item(), x.tolist(), (x > 0).nonzero(), bool(x.sum()), torch.masked_select(x, x > 1)
        x.cpu(), x.to("cpu"), x.to(device="cpu", dtype=torch.float64), x.to(torch.float64)
        x[x > 1] = 0.0
    waits.by_step.clear()
    python = ["item", "tolist", "nonzero", "__bool__", "masked_select", "cpu", "to", "to"]
    assert waits.calls == ["index", *python, "index_put_"]
