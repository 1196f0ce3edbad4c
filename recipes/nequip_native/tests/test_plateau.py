# SPDX-License-Identifier: Apache-2.0
"""The learning rate falls where the validation stands still, and a resumed run knows what was seen."""

import pytest
import torch
from structure_files import labelled, write

from common.contract.running import metrics, run_here
from common.scheduler import Plateau


PLATEAU = [
    "lr_scheduler_kwargs.kind=plateau", "lr_scheduler_kwargs.patience=2", "validation.every_n_steps=1",
    "adamw_kwargs.lr=1e-30",  # nothing moves, so nothing gets better
]  # fmt: skip


def schedule(least: float = 0.0) -> Plateau:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return Plateau(optimizer, 0, "mae", 0.5, 2, least)


def rates(found: Plateau, values: list[float]) -> list[float]:
    seen = []
    for value in values:
        found.optimizer.step()
        found.step()
        found.see({"step": found.last_epoch, "mae": value})
        found.see({"step": found.last_epoch - 1, "mae": 9.0})  # one that is over
        seen.append(found.optimizer.param_groups[0]["lr"])
    return seen


def test_it_waits_as_long_as_it_is_told_and_goes_on_after_a_stop():
    values = [1.0, 0.9, 0.95, 0.89999, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9]
    whole = rates(schedule(0.2), values)
    assert whole == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    for stop in range(1, len(values)):
        first, second = schedule(0.2), schedule(0.2)
        before = rates(first, values[:stop])
        second.load_state_dict(first.state_dict())
        assert before + rates(second, values[stop:]) == whole
    assert rates(schedule(), [float("nan"), 1.0, 0.5, float("nan"), 0.4, 0.4, 0.4])[-3:] == [1.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="is not in the validation's results"):
        schedule().see({"step": 0})


def test_a_stopped_run_has_the_rates_of_one_that_was_not(tmp_path):
    whole = metrics(run_here("train_ddp", tmp_path / "whole", *PLATEAU, "num_train_steps=7"), "train", "learning_rate")
    # After the first, which is the best, two that are not better; two steps of warm-up.
    assert whole == pytest.approx([5e-31, 1e-30, 1e-30, 5e-31, 5e-31, 2.5e-31, 2.5e-31])
    kept = f"checkpoint.ckpt_dir={tmp_path / 'run'}"
    run_here("train_ddp", tmp_path / "part", *PLATEAU, kept, "num_train_steps=4")
    run_here("train_ddp", tmp_path / "part", *PLATEAU, kept, "num_train_steps=7")
    assert metrics(tmp_path / "part", "train", "learning_rate") == whole


@pytest.mark.parametrize("asked", [["lr_scheduler_kwargs.kind=plateau"], ["checkpoint.keep_best=forces_rmse"]])
def test_a_metric_without_labels_is_refused(asked, tmp_path, capfd):
    frames = labelled(8)
    for atoms in frames:
        del atoms.calc.results["forces"]
    data = [f"{name}.load_dataset_kwargs.data_files={write(frames, tmp_path / 'mine.extxyz')}"
            for name in ("dataset", "validation")]  # fmt: skip
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *data, "dataset.load_dataset_kwargs.split=train", *asked,
                 f"checkpoint.ckpt_dir={tmp_path}")  # fmt: skip
    said = capfd.readouterr().err
    assert f"{asked[0].partition('=')[0].replace('.kind', '.metric')}=forces_" in said
    assert "no structure of the validation has forces; take another metric" in said


def test_without_validations_it_is_refused(tmp_path, capfd):
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, "lr_scheduler_kwargs.kind=plateau", "validation.every_n_steps=null")
    assert "lr_scheduler_kwargs.kind=plateau goes by validations: give validation" in capfd.readouterr().err
