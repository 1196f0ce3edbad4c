# SPDX-License-Identifier: Apache-2.0
"""Delayed scaling's state, kept by modules as TransformerEngine keeps it: stop-and-go equals straight-through."""

import importlib
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from common.contract.ranks import call_on_ranks
from common.contract.running import TRAINERS, curve, train_on
from common.contract.running import run_here as run


run_here = partial(run, apart=False)  # the trainers are changed in this process


class Scales(torch.nn.Module):
    """A history of the largest inputs: none before the first step, then pickled bytes, and it moves the outputs."""

    def __init__(self):
        super().__init__()
        self.history: list[float] = []

    def forward(self, x):
        """`x`, a little larger by what has been seen."""
        grown = x * (1 + 1e-3 * sum(self.history))
        if torch.is_grad_enabled():
            self.history = [*self.history[-3:], x.detach().abs().max().item()]
        return grown

    def get_extra_state(self):
        """As TransformerEngine's."""
        if not self.history:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.history)), dtype=torch.uint8)

    def set_extra_state(self, state):
        """As TransformerEngine's, which refuses pickles that nobody allowed."""
        if len(state):
            assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
            self.history = pickle.loads(state.numpy().tobytes())


def with_scales(build_model, layers):
    def build(*args):
        model = build_model(*args)
        for i in layers:
            layer = model.esm.encoder.layer[i]
            layer.scales = Scales()
            layer.register_forward_pre_hook(lambda layer, args: (layer.scales(args[0]), *args[1:]))
        return model

    return build


def train(trainer, layers, run, *arguments):
    if trainer == "train_mfsdp" and multiprocessing.parent_process() is None:  # as in running.run_here
        with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as apart:
            return apart.submit(train, trainer, layers, run, *arguments).result()
    module = importlib.import_module(trainer)
    with patch.object(module, "build_model", with_scales(module.build_model, layers)):
        return run(*arguments)


ALLOWED = "checkpoint.allow_pickled_scales=true"


def saves(path, *more):
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=3", ALLOWED, *more]


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "0")


@pytest.mark.rotated
@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["all", "some"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_stop_and_go_equals_straight_through(trainer, layers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(train(trainer, layers, run_here, trainer, whole, *saves(whole)))
    assert straight != curve(run(trainer, tmp_path / "without"))
    train(trainer, layers, run_here, trainer, parts, *saves(parts, "num_train_steps=3"))
    last = saves(parts, "checkpoint.save_final_model=true")
    assert curve(train(trainer, layers, run_here, trainer, parts, *last)) == straight
    assert not any("scales" in name for name in load_file(parts / "final_model" / "model.safetensors"))


def test_nothing_is_unpickled_unless_that_is_allowed(tmp_path, capsys):
    train("train_ddp", (0, 1), run_here, "train_ddp", tmp_path, *saves(tmp_path, "num_train_steps=3"))
    refusing = [word for word in saves(tmp_path) if word != ALLOWED]
    with pytest.raises(SystemExit) as end:
        train("train_ddp", (0, 1), run_here, "train_ddp", tmp_path, *refusing)
    assert end.value.code == 2 and "set checkpoint.allow_pickled_scales=true" in capsys.readouterr().err
    train("train_ddp", (0, 1), run_here, "train_ddp", tmp_path, *saves(tmp_path))
    assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "0"  # the permission has ended


def on_one_rank(distributed, trainer, path, *more):
    folder = f"logger.log_dir={path}"
    train(trainer, (0, 1), train_on, distributed, trainer, folder, *saves(path, *more))


def test_strategies_read_each_others(tmp_path):
    straight = curve(train("train_ddp", (0, 1), run_here, "train_ddp", tmp_path / "whole", "micro_batches_per_step=2"))
    parts = tmp_path / "parts"
    same = ("micro_batches_per_step=2",)
    call_on_ranks(tmp_path / "ranks", on_one_rank, 1, "train_fsdp2", str(parts), "num_train_steps=3", *same)
    call_on_ranks(tmp_path / "ranks", on_one_rank, 1, "train_ddp", str(parts), *same)
    assert curve(parts) == pytest.approx(straight, rel=1e-5)


def test_without_such_layers_it_is_left_out_and_with_new_ones_it_begins_anew(tmp_path):
    with_them, without = tmp_path / "with", tmp_path / "without"
    train("train_ddp", (0, 1), run_here, "train_ddp", with_them, *saves(with_them, "num_train_steps=3"))
    run_here("train_ddp", with_them, *(word for word in saves(with_them) if word != ALLOWED))
    run_here("train_ddp", without, *saves(without, "num_train_steps=3"))
    train("train_ddp", (0, 1), run_here, "train_ddp", without, *saves(without))
    assert all(len(curve(path)) == 28 for path in (with_them, without))
