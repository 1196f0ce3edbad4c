# SPDX-License-Identifier: Apache-2.0
"""Steps that go wrong: a loss or gradient that is no number, and a loss that jumps.

The ranks judge by numbers that they have summed up, so all come to the same verdict. Where a step is no number, it is
computed once more with a look at every module, to name the first one that went wrong.
"""

import json
import math
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveFloat, PositiveInt
from torch.utils._pytree import tree_leaves

from common.batch import Batch
from common.distributed import Distributed, own_part, unwrapped
from common.files import append_line, finite, short


class Step(NamedTuple):
    """A step that is judged; `shares` are what this rank's micro-batches contribute to the loss."""

    number: int
    losses: dict[str, float]
    grad_norm: float
    is_sound: bool
    batches: list[Batch]
    shares: list[float]


MIN_STEPS = 20  # before this many there is no telling what is usual


class Anomalies:
    """Judges each step before the weights are updated, and writes what is wrong to `log_dir/anomalies.jsonl`."""

    def __init__(
        self,
        distributed: Distributed,
        log_dir: str | None,
        *,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: PositiveInt = 10,
        spike_deviations: PositiveFloat | None = 10.0,
        spike_window: PositiveInt = 100,
    ):
        if spike_window < MIN_STEPS:
            raise ValueError(f"anomalies.spike_window={spike_window} must be at least {MIN_STEPS}.")
        self.distributed, self.folder = distributed, Path(log_dir) if log_dir else None
        self.skip, self.max_skipped = on_nonfinite == "skip", max_skipped
        self.deviations, self.spike_window = spike_deviations, spike_window
        self.num_skipped, self.recent = 0, []
        self.fatal: str | None = None

    def judge(
        self, step: int, batches: list[Batch], losses: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor
    ) -> Step:
        """The step's `losses` (the whole loss and its parts, over all ranks), `grad_norm`, and whether it `is_sound`.

        `losses` are what this rank's `batches` contribute. All ranks call it. This is where the host waits for the
        device: once a step. If the step is not sound, compute the gradients once more inside `explain`.
        """
        names = list(losses[0])
        assert all(list(one) == names for one in losses), "a model gives the same parts of its loss for every batch"
        scalars = [grad_norm, *(one[name] for one in losses for name in names)]
        norm, *flat = torch.stack([scalar.detach().double() for scalar in scalars]).cpu().numpy().tolist()
        rows = [flat[i : i + len(names)] for i in range(0, len(flat), len(names))]
        *sums, bad = self.distributed.sum(*map(sum, zip(*rows, strict=True)), not math.isfinite(norm))
        totals = dict(zip(names, sums, strict=True))
        is_sound = not bad and math.isfinite(totals["loss"])
        self.this = Step(step, totals, norm, is_sound, batches, [row[names.index("loss")] for row in rows])
        if is_sound:
            self._note(step, totals["loss"])
        return self.this

    def _note(self, step: int, loss: float) -> None:
        """Hold a sound step's loss against those before it."""
        self.num_skipped = 0
        if self._is_spike(loss):
            usual = median(self.recent)
            self._report("spike", median_loss=usual)
            self.distributed.say(
                f"step {step}  the loss jumped to {short(loss)} from about {short(usual)}.{self._look_up(step)}"
            )
        self.recent = [*self.recent, loss][-self.spike_window :]

    @contextmanager
    def explain(self, model: torch.nn.Module):
        """Watch the gradients of a step that was no number computed once more, and report where it began.

        `fatal` is then a sentence if the run has to end.
        """
        with torch.compiler.set_stance("force_eager"), watched(model) as found:
            yield
        self.num_skipped += 1
        stops = not self.skip or self.num_skipped >= self.max_skipped
        culprit = self._culprit(model, found)
        self._report("nonfinite", action="stopped" if stops else "skipped", **culprit)
        step, loss, grad_norm = self.this.number, self.this.losses["loss"], self.this.grad_norm
        what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
        sentence = f"step {step}: {what}; {describe(culprit)}. The weights stay as they are.{self._look_up(step)}"
        if not stops:
            self.distributed.say(sentence)
        elif self.skip:
            self.fatal = (
                f"{sentence} This is no. {self.num_skipped} in a row; anomalies.max_skipped={self.max_skipped}."
            )
        else:
            self.fatal = f"{sentence} To leave such steps out, set anomalies.on_nonfinite=skip."

    def _is_spike(self, loss: float) -> bool:
        """Far above the median of the recent steps, by their median deviation: single jumps move neither."""
        if self.deviations is None or len(self.recent) < MIN_STEPS:
            return False
        usual = median(self.recent)
        deviation = 1.4826 * median(abs(x - usual) for x in self.recent)  # a normal distribution's sigma
        return loss - usual > self.deviations * max(deviation, 1e-3 * abs(usual))

    def _culprit(self, model: torch.nn.Module, found: list[dict]) -> dict:
        """The first module, in order of computation, that gave no number, on the first rank that found one."""
        mine = None
        if found:
            mine = {"rank": self.distributed.rank, **found[0]}
            mine["micro_batch"] = list(self.this.batches[mine.pop("number")].name)
        parameters = reversed(list(unwrapped(model).named_parameters()))
        weight = next((name for name, p in parameters if not is_finite(p.grad)), None)
        seen = self.distributed.gather((mine, weight, sum_of_squares(model)))
        if first := next((one for one, _, _ in seen if one), None):
            return first
        if weight := next((name for _, name, _ in seen if name), None):
            return {"module": weight.rpartition(".")[0], "what": f"gradient of {weight}"}
        overflows = max(squares for _, _, squares in seen) > torch.finfo(torch.float32).max
        return {"module": None, "what": "norm of all gradients, too large for FP32" if overflows else None}

    def _report(self, kind: str, **more) -> None:
        this = self.this
        own = [(batch.name, batch.counts, share) for batch, share in zip(this.batches, this.shares, strict=True)]
        # Data rank r has numbers r, r + R, ... of the step; ranks that share one have a part of its loss each.
        by_number, size = [], self.distributed.group_size
        for row in zip(*self.distributed.gather(own), strict=True):
            for rank in range(0, len(row), size):
                name, counts, _ = row[rank]
                by_number.append((rank, name, counts, sum(share for _, _, share in row[rank : rank + size])))
        unit = next(iter(this.batches[0].counts))
        in_all = sum(counts[unit] for _, _, counts, _ in by_number)
        micro_batches = [
            {"name": list(name), "rank": rank, **{f"num_{key}": n for key, n in counts.items()},
             "loss": finite(share * in_all / counts[unit]) if counts[unit] else None}
            for rank, name, counts, share in by_number
        ]  # fmt: skip
        line = {"kind": kind, "step": this.number, **finite(this.losses), "grad_norm": finite(this.grad_norm), **more}
        line |= {"micro_batches": micro_batches, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if self.distributed.is_main and self.folder:
            append_line(self.folder / "anomalies.jsonl", json.dumps(line))

    def _look_up(self, step: int) -> str:
        return f" Its rows: python rows.py {self.folder} --step {step}." if self.folder else ""

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"recent_losses": self.recent, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        self.recent, self.num_skipped = state.get("recent_losses", []), state.get("num_skipped", 0)


def is_finite(tensor: torch.Tensor | None) -> bool:
    """Whether all numbers of a tensor, or of this rank's part of it, are finite."""
    tensor = own_part(tensor)
    return tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def sum_of_squares(model: torch.nn.Module) -> float:
    """Of the gradients that this rank holds, in float64."""
    gradients = (own_part(p.grad) for p in model.parameters() if p.grad is not None)
    return sum(g.double().square().sum().item() for g in gradients)


def describe(culprit: dict) -> str:
    """Where it began, in words."""
    if culprit["what"] is None:
        return "computed once more, all was finite, so memory or a processor may be failing"
    if "rank" not in culprit:
        return f"first in the {culprit['what']}"
    name = ".".join(map(str, culprit["micro_batch"]))
    return f"first in the {culprit['what']} of {culprit['module']}, on rank {culprit['rank']}, micro-batch {name}"


@contextmanager
def watched(model: torch.nn.Module):
    """Yields a list that gets an entry for each output, and each gradient of one, that is no number."""
    found: list[dict] = []
    number = -1  # of the pass through the model: which micro-batch

    def note(what: str, module: str, number: int, tensor: torch.Tensor) -> None:
        if not is_finite(tensor):
            found.append({"module": module, "what": what, "number": number})

    def count(module, args):
        nonlocal number
        number += 1

    def look(name: str, module, args, output):
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                note("output", name, number, tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(partial(note, "gradient of the output", name, number))

    hooks = [model.register_forward_pre_hook(count)]
    for name, module in unwrapped(model).named_modules():
        named = name or "the model"
        hooks.append(module.register_forward_hook(lambda *call, named=named: look(named, *call)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
