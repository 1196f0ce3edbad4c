# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay: the newest, and the best by a metric; and the room that they take."""

import math
import shutil

import pytest

from checkpoint import Checkpointer
from common import kept_steps
from common.contract.running import metrics, run_here
from common.safe_reading import read_metadata
from common.step_folder import complete_steps


def kept(path, *more):
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.max_to_keep=1", "validation.every_n_steps=1", *more]


@pytest.mark.parametrize(
    ("metric", "better", "mode"),
    [
        ("loss", min, "true"),
        ("accuracy", max, "false"),
        pytest.param("loss", min, "false", marks=pytest.mark.slow),
        pytest.param("accuracy", max, "true", marks=pytest.mark.slow),
    ],
)
def test_the_best_by_a_metric_stays_beside_the_newest(metric, better, mode, tmp_path, capsys):
    """A high rate makes the model worse again; a resume remembers what was best."""
    more = [f"checkpoint.keep_best={metric}", "adamw_kwargs.lr=0.3", f"checkpoint.async_save={mode}"]
    run_here("train_ddp", tmp_path, *kept(tmp_path, *more), "num_train_steps=4")
    more.append("checkpoint.save_final_model=true")
    run_here("train_ddp", tmp_path, *kept(tmp_path, *more), "num_train_steps=7")
    values = metrics(tmp_path, "validation", metric)
    best = values.index(better(values)) + 1
    assert len(values) == 7 and complete_steps(tmp_path) == sorted({best, 7})
    said, card = capsys.readouterr().err, (tmp_path / "final_model" / "README.md").read_text()
    assert f"The best by {metric} in the validation is {tmp_path / f'step_{best}'}: " in said
    command = f"python export.py {tmp_path / f'step_{best}'} {tmp_path / 'best_model'}"
    theirs = f"; those after {best} steps were better by {metric} in the validation, {values[best - 1]:.4f}"
    assert (f"It is of the last step; the best one is exported by: {command}" in said) == (best != 7)
    assert (theirs if best != 7 else f", the best by {metric} in the validation") in card


def test_between_saves_in_the_background_no_more_are_kept(tmp_path, monkeypatch):
    """An older one goes when the newer one is complete, not when the next is due."""
    seen, is_due = [], Checkpointer.is_due

    def waits(self, *arguments):
        if self.pending:
            self.pending()  # the save is over, and nobody has asked for it yet
            seen.append(len(complete_steps(tmp_path)))
        return is_due(self, *arguments)

    monkeypatch.setattr(Checkpointer, "is_due", waits)
    more = ["checkpoint.async_save=true", "checkpoint.save_every_n_steps=2"]
    run_here("train_ddp", tmp_path, *kept(tmp_path, *more), "validation.every_n_steps=null")
    assert set(seen) == {1} and complete_steps(tmp_path) == [6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.keep_best=los"], "checkpoint.keep_best=los must be one of loss, perplexity, accuracy"),
        (["checkpoint.keep_best=loss", "validation.load_dataset_kwargs=null"], "keep_best=loss needs a validation"),
        (["checkpoint.trained_only=true"], "trained_only=true needs adamw_kwargs.groups of which some are frozen"),
    ],
)
def test_what_cannot_be_is_refused(overrides, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *kept(tmp_path, *overrides))
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_the_best(tmp_path):
    for step, text in ((1, ""), (2, '{"logger": {"validation": {"step": 2, "loss": 3.0}}}')):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / ".metadata").touch()
        (tmp_path / f"step_{step}" / "run.json").write_text(text)
    assert kept_steps.best_step(tmp_path, "loss", min) == (3.0, 2)


def test_a_number_that_is_none_is_never_the_best():
    assert kept_steps.is_better(1.0, None, min) and kept_steps.is_better(0.5, (1.0, 1), min)
    assert not kept_steps.is_better(1.0, (1.0, 1), min) and not kept_steps.is_better(2.0, (1.0, 1), min)
    assert not kept_steps.is_better(math.nan, None, min) and not kept_steps.is_better(None, None, min)


FROZEN = "adamw_kwargs.groups=[{names: 'esm.*', frozen: true}]"


@pytest.mark.parametrize(
    "more",
    [
        ["checkpoint.save_final_model=true"],
        ["checkpoint.save_every_n_steps=2", "checkpoint.max_to_keep=1", "ema_decay=0.9"],
        ["checkpoint.save_every_n_steps=1", "checkpoint.max_to_keep=null", FROZEN],
        ["checkpoint.save_every_n_steps=1", "checkpoint.max_to_keep=2", FROZEN, "checkpoint.trained_only=true"],
    ],
    ids=["once", "averaged", "all", "trained only"],
)
def test_the_room_asked_for_is_what_is_written(more, tmp_path, monkeypatch, capsys):
    if "checkpoint.trained_only=true" in more:
        first = run_here(
            "train_ddp", tmp_path / "first", *kept(tmp_path / "first"), "checkpoint.save_final_model=true"
        )
        more = [*more, f"init_from={first / 'final_model'}"]
    usage, tidy, most = shutil.disk_usage, Checkpointer._tidy, 0

    def train(path, free=2**40):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(folder)._replace(free=free))
        run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", "num_train_steps=4", *more)

    def measured(self):
        nonlocal most
        most = max(most, sum(num_bytes(step) for step in self.folder.glob("step_*")))
        tidy(self)

    monkeypatch.setattr(Checkpointer, "_tidy", measured)
    train(tmp_path / "run")
    final = tmp_path / "run" / "final_model" / "model.safetensors"
    written = most + (final.stat().st_size if final.exists() else 0)
    with pytest.raises(SystemExit):
        train(tmp_path / "less", int(0.95 * written))
    assert "MiB; make room" in capsys.readouterr().err
    train(tmp_path / "enough", int(1.05 * written))


def num_bytes(step_folder):
    """Of the tensors of a checkpoint, but for random-number states of some kB."""
    entries = read_metadata(step_folder).state_dict_metadata.items()
    return sum(e.size.numel() * e.properties.dtype.itemsize for name, e in entries if not name.startswith("rng."))
