# SPDX-License-Identifier: Apache-2.0
"""What a run of Geneformer counts and reports, by its task."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from common.batch import Batch
from common.command import writing
from common.distributed import Distributed
from tokens import masked_lm
from tokens.masked_lm import UNIT, batch_sums, summary


__all__ = ["BETTER", "LOSS_NAME", "UNIT", "Classes", "Lengths", "batch_sums", "summary"]
LOSS_NAME = "Loss, nats"
BETTER = {**masked_lm.BETTER, "macro_f1": max, "length_mae": min}  # by which a best checkpoint can be kept


class Classes:
    """Of cells or genes, what is told apart rightly; `names` are the classes."""

    def __init__(self, names: list[str]):
        self.names = names

    @torch.no_grad()
    def batch_sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of one batch: loss (nats), and how often each class [true, told] was told of each."""
        output, number = model(**batch.inputs, counts={"labels": 1}), len(self.names)
        known = output.labels >= 0
        pairs = output.labels[known] * number + output.logits[known].argmax(-1)
        return {"loss": output.loss, "confusion": torch.bincount(pairs, minlength=number**2).view(number, number)}

    def summary(self, sums: dict) -> dict:
        """`loss` (nats a label), `accuracy`, `macro_f1` over the classes that occur, `f1/<class>`, `confusion`."""
        confusion = np.asarray(sums["confusion"])
        right, there, told = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        occurs = there + told > 0
        f1 = 2 * right / np.maximum(there + told, 1)
        number = max(1, int(confusion.sum()))
        return {
            "loss": sums["loss"] / number,
            "accuracy": float(right.sum() / number),
            "macro_f1": float(f1[occurs].mean()) if occurs.any() else 0.0,
            "num_labels": number,
            **{f"f1/{name}": float(value) for name, value in zip(self.names, f1, strict=True)},
            "confusion": confusion.astype(int).tolist(),
        }

    def report(self, distributed: Distributed, found: dict, source: str, folder: Path) -> None:
        """`confusion.png`, for `evaluate.py`."""
        if not distributed.is_main:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            draw_confusion(np.array(found["confusion"]), self.names, folder / "confusion.png")
        distributed.say(f"written: {folder}/confusion.png")


class Lengths:
    """Masked genes, and how many tokens cells have."""

    @torch.no_grad()
    def batch_sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of one batch: as in masked-language modelling, and errors of lengths."""
        output = model(**batch.inputs, counts={"labels": 1, "cells": 1})
        errors = output.found_lengths - batch.inputs["lengths"]
        return {
            "loss": output.parts["masked_lm"],
            "num_correct": (output.logits.argmax(-1) == output.labels).sum(),
            "num_labels": (output.labels >= 0).sum(),
            "absolute": errors.abs().sum(),
            "squared": errors.square().sum(),
            "num_cells": torch.ones_like(errors).sum(),
        }

    def summary(self, sums: dict) -> dict:
        """`loss`, what is trained: both; those of masked genes, `length_mae` and `length_rmse` in tokens."""
        genes, number = summary(sums), max(sums["num_cells"], 1)
        mean_square = sums["squared"] / number
        return {
            **genes, "masked_lm_loss": genes["loss"], "loss": genes["loss"] + mean_square,
            "length_mae": sums["absolute"] / number, "length_rmse": mean_square**0.5,
        }  # fmt: skip


def metrics_for(task: str, classes: list[str] | None):
    """What validation measures for a task."""
    if task in ("cells", "genes"):
        return Classes(list(classes))
    if task == "length":
        return Lengths()
    return SimpleNamespace(batch_sums=batch_sums, summary=summary)


def draw_confusion(confusion: np.ndarray, names: list[str], path: Path) -> None:
    """Rows are what is true, in shares; numbers stand in them where there is room."""
    from matplotlib.figure import Figure  # trainers do not draw

    size = min(20, 2 + 0.5 * len(names))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of what is true")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("told")
    axes.set_ylabel("true")
    if len(names) <= 20:
        for (row, column), number in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=color)
    figure.savefig(path, dpi=120)
