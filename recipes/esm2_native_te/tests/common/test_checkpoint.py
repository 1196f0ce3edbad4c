# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped anywhere goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch

from common.contract.running import RECIPE, TINY, TRAINERS, curve, environment, run_here, run_ranks, torchrun
from common.step_folder import SUMS, complete_steps, read_weights, sha256


def save_to(path, *more):
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=3", *more]


def weights(path, step=6):
    return read_weights(path / f"step_{step}")


def names(path):
    return sorted(found.name for found in path.iterdir() if "step_" in found.name)


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.rotated
@pytest.mark.parametrize("mode", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_stop_and_go_equals_straight_through_to_the_bit(trainer, mode, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here(trainer, whole, *save_to(whole, mode)))
    run_here(trainer, parts, *save_to(parts, mode), "num_train_steps=3")
    # The validation at the end of the shorter run is at a step that the longer one validates too.
    assert curve(run_here(trainer, parts, *save_to(parts, mode))) == straight
    assert_same(weights(whole), weights(parts))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train_ddp", "train_fsdp2"),
        ("train_fsdp2", "train_ddp"),
        ("train_mfsdp", "train_fsdp2"),
        ("train_ddp", "train_mfsdp"),
    ],
)
def test_strategies_read_each_others_checkpoints(first, second, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here("train_ddp", whole, *save_to(whole)))
    run_here(first, parts, *save_to(parts), "num_train_steps=3")
    assert curve(run_here(second, parts, *save_to(parts))) == pytest.approx(straight, rel=1e-5)
    assert_same(weights(whole), weights(parts), rtol=1e-4, atol=1e-6)


def chain(*trainers, slow=False):
    return pytest.param(trainers, id="-".join(t[6:] for t in trainers), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    "trainers",
    [
        *(chain(trainer, trainer, trainer, slow=trainer != "train_fsdp2") for trainer in TRAINERS),
        chain("train_ddp", "train_fsdp2", "train_mfsdp", slow=True),
        chain("train_fsdp2", "train_mfsdp", "train_ddp", slow=True),
        chain("train_mfsdp", "train_ddp", "train_fsdp2", slow=True),
    ],
)
def test_two_ranks_then_one_then_four(trainers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here("train_ddp", whole, *save_to(whole), "num_train_steps=9"))
    saves = save_to(parts)
    run_ranks(trainers[0], 2, parts, *saves, "dataset.num_workers=2", "num_train_steps=3")
    run_here(trainers[1], parts, *saves, "dataset.num_workers=0", "num_train_steps=6")
    run_ranks(trainers[2], 4, parts, *saves, "dataset.num_workers=1", "num_train_steps=9")
    assert curve(parts) == pytest.approx(straight, rel=1e-5)
    assert_same(weights(whole, 9), weights(parts, 9), rtol=1e-4, atol=1e-6)


def test_old_checkpoints_go_and_what_was_cut_short_with_them(tmp_path):
    run_here("train_ddp", tmp_path, *save_to(tmp_path, "checkpoint.max_to_keep=1"))
    assert names(tmp_path) == ["step_6"]
    for name in (".step_8.partial", ".step_3.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".shared_0").touch()
    run_here("train_ddp", tmp_path, *save_to(tmp_path, "checkpoint.max_to_keep=1"), "num_train_steps=9")
    assert sorted(found.name for found in tmp_path.iterdir() if found.suffix not in (".jsonl", ".json", ".yaml")) == [
        "step_9"
    ]


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    run_here("train_ddp", tmp_path, *save_to(tmp_path), "num_train_steps=3")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "loss": 99}\n{"kind": "tr')
    run_here("train_ddp", tmp_path, *save_to(tmp_path))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed was 42 and is 1"),
        ("dataset.max_seq_length=64", "dataset.max_seq_length was 96 and is 64"),
        ("model_kwargs.hidden_size=64", "model_kwargs.hidden_size was 48 and is 64"),
        ("adamw_kwargs.lr=0.5", "adamw_kwargs.lr was 0.0004 and is 0.5"),
    ],
)
def test_a_resume_that_would_change_the_trajectory_is_refused(override, message, tmp_path, capsys):
    run_here("train_ddp", tmp_path, *save_to(tmp_path), "num_train_steps=3")
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *save_to(tmp_path), override)
    assert message in capsys.readouterr().err
    assert complete_steps(tmp_path) == [3]


def test_a_changed_config_is_told_and_can_be_allowed(tmp_path, capsys):
    run_here("train_ddp", tmp_path, *save_to(tmp_path), "num_train_steps=3")
    run_here("train_ddp", tmp_path, *save_to(tmp_path), "adamw_kwargs.lr=0.001", "checkpoint.allow_config_change=true")
    assert "adamw_kwargs.lr 0.0004 -> 0.001" in capsys.readouterr().err
    assert complete_steps(tmp_path)[-1] == 6


def start(trainer, num_ranks, path, *overrides):
    command = [*torchrun(num_ranks), f"{trainer}.py", *TINY, f"logger.log_dir={path}", *save_to(path), *overrides]
    return subprocess.Popen(
        command, cwd=RECIPE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_saves_in_the_background_on_two_ranks_are_whole(trainer, tmp_path):
    paths = {mode: tmp_path / mode for mode in ("false", "true")}
    for mode, path in paths.items():
        run_ranks(trainer, 2, path, *save_to(path, f"checkpoint.async_save={mode}"))
    for step in (3, 6):
        assert_same(*(weights(path, step) for path in paths.values()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda rows: rows.slice(0, 50), "3,600 rows and the data now has 50"),
        (
            lambda rows: rows.take([*range(3599, -1, -1)]),
            "not what the checkpoint was made with (sizes, content differ)",
        ),
    ],
    ids=["fewer rows", "as many rows"],
)
def test_other_data_under_the_same_name_is_refused(other, message, tmp_path, capsys):
    data = tmp_path / "data.parquet"
    rows = pq.read_table(RECIPE / "data" / "train.parquet")
    pq.write_table(rows, data)
    here = save_to(tmp_path, f"dataset.load_dataset_kwargs.data_files={data}")
    run_here("train_ddp", tmp_path, *here, "num_train_steps=3")
    pq.write_table(other(rows), data)
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *here)
    assert message in capsys.readouterr().err
    assert complete_steps(tmp_path) == [3]


def test_the_same_data_in_another_place_is_the_same_data(tmp_path):
    straight = curve(run_here("train_ddp", tmp_path / "whole", *save_to(tmp_path / "whole")))
    parts = tmp_path / "parts"
    run_here("train_ddp", parts, *save_to(parts), "num_train_steps=3")
    shutil.copy(RECIPE / "data" / "train.parquet", tmp_path / "moved.parquet")
    moved = f"dataset.load_dataset_kwargs.data_files={tmp_path / 'moved.parquet'}"
    allowed = "checkpoint.allow_config_change=true"
    assert curve(run_here("train_ddp", parts, *save_to(parts), moved, allowed)) == straight


def test_a_checkpoint_of_the_layout_before_goes_on(tmp_path):
    """Progress beside the rest in run.json, the number of rows for what the data is, and no later key."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here("train_ddp", whole, *save_to(whole)))
    run_here("train_ddp", parts, *save_to(parts), "num_train_steps=3")
    file = parts / "step_3" / "run.json"
    run = json.loads(file.read_text())
    run |= run.pop("logger") | run.pop("anomalies")
    run["loader"] = {"position": run["loader"]["position"], "num_rows": run["loader"]["data"]["num_rows"]}
    del run["ema"], run["config"]["ema_decay"], run["config"]["model_kwargs"]["hidden_dropout_prob"]
    del run["model"]["hidden_dropout_prob"]
    sums = (file.parent / SUMS).read_text().replace(sha256(file), "changed")
    file.write_text(json.dumps(run))
    (file.parent / SUMS).write_text(sums.replace("changed", sha256(file)))
    assert curve(run_here("train_ddp", parts, *save_to(parts))) == straight
    assert_same(weights(whole), weights(parts))


def test_torchrun_told_to_stop_saves_although_its_workers_hear_it_too(tmp_path):
    process = start("train_fsdp2", 2, tmp_path, "num_train_steps=2000", "dataset.num_workers=1")
    wait_for(
        lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n") > 4
    )
    os.kill(process.pid, signal.SIGTERM)
    assert "goes on from there" in process.communicate(timeout=120)[1]
    stopped = complete_steps(tmp_path)[-1]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert stopped == last


@pytest.mark.slow
def test_ranks_that_torchrun_leaves_behind_save_and_the_same_command_goes_on(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here("train_ddp", whole, *save_to(whole), "num_train_steps=150"))
    again = ("train_fsdp2", 2, parts, "num_train_steps=150", "checkpoint.save_every_n_steps=1000")
    process = start(*again)
    wait_for(lambda: (parts / "metrics.jsonl").exists() and (parts / "metrics.jsonl").read_text().count("\n") > 4)
    process.kill()
    process = start(*again)  # at once: it waits for the first to leave
    assert process.communicate(timeout=200)[1].count("Going on from") == 1
    assert process.returncode == 0
    assert curve(parts) == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_the_same_command_goes_on(number, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here("train_ddp", whole, *save_to(whole), "num_train_steps=60"))
    process = start("train_fsdp2", 2, parts, "num_train_steps=60", "checkpoint.save_every_n_steps=1000")
    wait_for(lambda: (parts / "metrics.jsonl").exists() and (parts / "metrics.jsonl").read_text().count("\n") > 4)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), number)
    message = process.communicate(timeout=120)[1]
    assert "goes on from there" in message
    assert process.returncode == 0
    (stopped,) = complete_steps(parts)
    assert stopped < 60
    again = save_to(parts)
    assert curve(run_here("train_ddp", parts, *again, "num_train_steps=60")) == pytest.approx(straight, rel=1e-5)


def test_killed_while_saving(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = curve(run_here("train_fsdp2", whole, *save_to(whole), "num_train_steps=30"))
    process = start("train_fsdp2", 2, parts, "num_train_steps=30")
    wait_for(lambda: (parts / "step_9").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert complete_steps(parts)
    run_here("train_fsdp2", parts, *save_to(parts), "num_train_steps=30")
    assert curve(parts) == pytest.approx(straight, rel=1e-5)
    assert sorted(p.name for p in parts.glob("step_*")) == ["step_27", "step_30"]


def test_stopped_with_nothing_saved_is_no_success(tmp_path):
    command = [sys.executable, "train_ddp.py", *TINY, f"logger.log_dir={tmp_path}", "num_train_steps=5000"]
    process = subprocess.Popen(command, cwd=RECIPE, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").stat().st_size)
    process.send_signal(signal.SIGUSR1)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 3 and "error: checkpoint.ckpt_dir is not set, so nothing" in message
