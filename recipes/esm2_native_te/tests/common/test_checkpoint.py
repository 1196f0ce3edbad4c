# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped anywhere goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest

from common.contract.running import (
    EVERY,
    LAST,
    RECIPE,
    TINY,
    TRAINERS,
    assert_same_weights,
    curve,
    environment,
    meeting,
    run_here,
    run_ranks,
    said_by,
    saving_to,
    start_processes,
    torchrun,
)
from common.step_folder import SUMS, complete_steps, sha256


def save_to(path, *more):
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=3", *more]


def stopped_at(path, whole, step=LAST - EVERY):
    """As if a run that never stopped, `whole`, had been killed after this checkpoint."""
    shutil.copytree(whole / f"step_{step}", path / f"step_{step}")
    shutil.copy(whole / "metrics.jsonl", path)
    return path


@pytest.mark.parametrize(
    "trainer", [t if t == "train_fsdp2" else pytest.param(t, marks=pytest.mark.slow) for t in TRAINERS]
)
def test_what_was_saved_in_the_background_goes_on_to_the_bit(trainer, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(trainer, whole, *save_to(whole, "checkpoint.async_save=true"))
    run_here(trainer, stopped_at(parts, whole, 3), *save_to(parts, "checkpoint.async_save=true"))
    assert curve(parts) == curve(whole)
    assert_same_weights(whole / "step_6", parts / "step_6")


@pytest.mark.parametrize(
    ("first", "second"),
    [("train_fsdp2", "train_ddp"), ("train_mfsdp", "train_fsdp2"), ("train_ddp", "train_mfsdp")],
)
def test_strategies_read_each_others_checkpoints(first, second, straight, tmp_path):
    """DDP, FSDP2, Megatron-FSDP is the contract's order."""
    whole = straight("train_ddp")
    run_here(second, stopped_at(tmp_path, straight(first)), *saving_to(tmp_path, LAST))
    assert curve(tmp_path) == pytest.approx(curve(whole), rel=1e-5)
    assert_same_weights(whole / f"step_{LAST}", tmp_path / f"step_{LAST}", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_rank_then_more(num_ranks, straight, tmp_path):
    whole = straight("train_ddp")
    stopped_at(tmp_path, straight("train_fsdp2"))
    run_ranks("train_fsdp2", num_ranks, tmp_path, *saving_to(tmp_path, LAST), "dataset.num_workers=1")
    assert curve(tmp_path) == pytest.approx(curve(whole), rel=1e-5)
    assert_same_weights(whole / f"step_{LAST}", tmp_path / f"step_{LAST}", rtol=1e-4, atol=1e-6)


def chain(*trainers):
    return pytest.param(trainers, id="-".join(t[6:] for t in trainers))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainers",
    [
        *(chain(trainer, trainer, trainer) for trainer in TRAINERS),
        chain("train_ddp", "train_fsdp2", "train_mfsdp"),
        chain("train_fsdp2", "train_mfsdp", "train_ddp"),
        chain("train_mfsdp", "train_ddp", "train_fsdp2"),
    ],
)
def test_two_ranks_then_one_then_four(trainers, straight, tmp_path):
    whole = straight("train_ddp")
    saves = save_to(tmp_path)
    run_ranks(trainers[0], 2, tmp_path, *saves, "dataset.num_workers=2", "num_train_steps=3")
    run_here(trainers[1], tmp_path, *saves, "dataset.num_workers=0", "num_train_steps=6")
    run_ranks(trainers[2], 4, tmp_path, *saves, "dataset.num_workers=1", "num_train_steps=9")
    assert curve(tmp_path) == pytest.approx(curve(whole), rel=1e-5)
    assert_same_weights(whole / "step_9", tmp_path / "step_9", rtol=1e-4, atol=1e-6)


def test_old_checkpoints_go_and_what_was_cut_short_with_them(straight, tmp_path):
    stopped_at(tmp_path, straight("train_ddp"))
    for name in (".step_8.partial", ".step_3.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".shared_0").touch()
    run_here("train_ddp", tmp_path, *saving_to(tmp_path, LAST), "checkpoint.max_to_keep=1")
    kept = sorted(found.name for found in tmp_path.iterdir() if found.suffix not in (".jsonl", ".json", ".yaml"))
    assert kept == [f"step_{LAST}"]


def test_metrics_after_the_checkpoint_are_dropped_on_resume(straight, tmp_path):
    stopped_at(tmp_path, straight("train_ddp"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7, "loss": 99}\n{"kind": "tr')
    run_here("train_ddp", tmp_path, *saving_to(tmp_path, LAST))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed was 42 and is 1"),
        ("dataset.max_seq_length=64", "dataset.max_seq_length was 96 and is 64"),
        ("model_kwargs.hidden_size=64", "model_kwargs.hidden_size was 48 and is 64"),
        ("adamw_kwargs.lr=0.5", "adamw_kwargs.lr was 0.0004 and is 0.5"),
    ],
)
def test_a_resume_that_would_change_the_trajectory_is_refused(override, message, straight, tmp_path, capsys):
    stopped_at(tmp_path, straight("train_ddp"))
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *saving_to(tmp_path, LAST), override)
    assert message in capsys.readouterr().err
    assert complete_steps(tmp_path) == [LAST - EVERY]


def test_a_changed_config_is_told_and_can_be_allowed(straight, tmp_path, capsys):
    stopped_at(tmp_path, straight("train_ddp"))
    changed = ("adamw_kwargs.lr=0.001", "checkpoint.allow_config_change=true")
    run_here("train_ddp", tmp_path, *saving_to(tmp_path, LAST), *changed)
    assert "adamw_kwargs.lr 0.0004 -> 0.001" in capsys.readouterr().err
    assert complete_steps(tmp_path)[-1] == LAST


def test_a_finished_run_goes_on_and_its_final_model_is_kept(tmp_path, capsys):
    def train(num_steps):
        run_here("train_ddp", tmp_path, *save_to(tmp_path, "checkpoint.save_final_model=true"), num_steps)
        return (tmp_path / "final_model" / "README.md").read_text(), capsys.readouterr().err

    first, _ = train("num_train_steps=3")
    assert "3 steps" in first
    again, said = train("num_train_steps=3")
    assert again == first and "Give more num_train_steps" in said and not list(tmp_path.glob("*.before_*"))
    longer, said = train("num_train_steps=4")
    assert "4 steps" in longer and "kept as final_model.before_1" in said
    assert (tmp_path / "final_model.before_1" / "README.md").read_text() == first
    train("num_train_steps=5")
    assert (tmp_path / "final_model.before_2" / "README.md").read_text() == longer


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_saved_is_as_readable_as_other_new_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        final = "checkpoint.save_final_model=true"
        run_here("train_ddp", tmp_path, *save_to(tmp_path, final), "num_train_steps=1", "validation.max_rows=2")
    finally:
        os.umask(before)
    for path in [p for name in ("step_1", "final_model") for p in (tmp_path / name, *(tmp_path / name).rglob("*"))]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def start(trainer, num_ranks, path, *overrides):
    command = [*torchrun(num_ranks), f"{trainer}.py", *TINY, f"logger.log_dir={path}", *save_to(path), *overrides]
    return subprocess.Popen(
        command, cwd=RECIPE, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def start_ranks(path, *overrides):
    """Two of FSDP2 that save there, without torchrun."""
    return start_processes(meeting(2), path, "train_fsdp2", path, *save_to(path), *overrides)


def ended(processes):
    """Their exit codes."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "trainer", [t if t == "train_fsdp2" else pytest.param(t, marks=pytest.mark.slow) for t in TRAINERS]
)
def test_saves_in_the_background_on_two_ranks_are_whole(trainer, tmp_path):
    paths = {mode: tmp_path / mode for mode in ("false", "true")}
    for mode, path in paths.items():
        run_ranks(trainer, 2, path, *save_to(path, f"checkpoint.async_save={mode}"))
    for step in (3, 6):
        assert_same_weights(*(path / f"step_{step}" for path in paths.values()))


@pytest.fixture(scope="module")
def on_own_data(tmp_path_factory):
    """A run stopped after three steps, on a copy of the sample beside its checkpoint."""
    path = tmp_path_factory.mktemp("own")
    shutil.copy(RECIPE / "data" / "train.parquet", path / "data.parquet")
    data = f"dataset.load_dataset_kwargs.data_files={path / 'data.parquet'}"
    return run_here("train_ddp", path, *save_to(path, data), "num_train_steps=3"), data


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda rows: rows.slice(0, 50), "3,600 rows and the data now has 50"),
        (
            lambda rows: rows.take([*range(3599, -1, -1)]),
            "not what the checkpoint was made with (other sizes, content)",
        ),
    ],
    ids=["fewer rows", "as many rows"],
)
def test_other_data_under_the_same_name_is_refused(other, message, on_own_data, capsys):
    path, data = on_own_data
    pq.write_table(other(pq.read_table(RECIPE / "data" / "train.parquet")), path / "data.parquet")
    with pytest.raises(SystemExit):
        run_here("train_ddp", path, *save_to(path, data))
    assert message in capsys.readouterr().err
    assert complete_steps(path) == [3]


def test_the_same_data_in_another_place_is_the_same_data(straight, tmp_path):
    whole = straight("train_ddp")
    shutil.copy(RECIPE / "data" / "train.parquet", tmp_path / "moved.parquet")
    moved = f"dataset.load_dataset_kwargs.data_files={tmp_path / 'moved.parquet'}"
    sample = (
        f"validation.load_dataset_kwargs.data_files={RECIPE / 'data' / 'validation.parquet'}"  # else it is left out
    )
    run_here("train_ddp", stopped_at(tmp_path, whole), *saving_to(tmp_path, LAST), moved, sample,
             "checkpoint.allow_config_change=true")  # fmt: skip
    assert curve(tmp_path) == curve(whole)


def test_a_checkpoint_of_the_layout_before_goes_on(straight, tmp_path):
    """Progress beside the rest in run.json, the number of rows for what the data is, and no later key."""
    whole = straight("train_ddp")
    file = stopped_at(tmp_path, whole) / f"step_{LAST - EVERY}" / "run.json"
    run = json.loads(file.read_text())
    run |= run.pop("logger") | run.pop("anomalies")
    run["loader"] = {"position": run["loader"]["position"], "num_rows": run["loader"]["data"]["num_rows"]}
    del run["ema"], run["config"]["ema_decay"], run["config"]["model_kwargs"]["hidden_dropout_prob"]
    del run["model"]["hidden_dropout_prob"]
    sums = (file.parent / SUMS).read_text().replace(sha256(file), "changed")
    file.write_text(json.dumps(run))
    (file.parent / SUMS).write_text(sums.replace("changed", sha256(file)))
    assert curve(run_here("train_ddp", tmp_path, *saving_to(tmp_path, LAST))) == curve(whole)
    assert_same_weights(whole / f"step_{LAST}", tmp_path / f"step_{LAST}")


def test_torchrun_told_to_stop_saves_although_its_workers_hear_it_too(tmp_path):
    process = start("train_fsdp2", 2, tmp_path, "num_train_steps=2000", "dataset.num_workers=1")
    wait_for(
        lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n") > 4
    )
    os.kill(process.pid, signal.SIGTERM)
    assert "resumes from there" in process.communicate(timeout=120)[1]
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
    assert process.communicate(timeout=200)[1].count("Resuming from") == 1
    assert process.returncode == 0
    assert curve(parts) == pytest.approx(straight, rel=1e-5)


@pytest.fixture(scope="module")
def long_curve(tmp_path_factory):
    return curve(run_here("train_ddp", tmp_path_factory.mktemp("long"), "num_train_steps=30"))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_the_same_command_goes_on(number, long_curve, tmp_path):
    ranks = start_ranks(tmp_path, "num_train_steps=30", "checkpoint.save_every_n_steps=1000")
    file = tmp_path / "metrics.jsonl"
    wait_for(lambda: file.exists() and file.read_text().count("\n") > 4)
    os.kill(ranks[-1].pid, number)
    assert ended(ranks) == [0, 0]
    assert "resumes from there" in said_by(tmp_path)
    (stopped,) = complete_steps(tmp_path)
    assert stopped < 30
    again = run_here("train_ddp", tmp_path, *save_to(tmp_path), "num_train_steps=30")
    assert curve(again) == pytest.approx(long_curve, rel=1e-5)


def test_killed_while_saving(long_curve, tmp_path):
    ranks = start_ranks(tmp_path, "num_train_steps=30")
    wait_for(lambda: (tmp_path / "step_9").exists())
    for rank in ranks:
        rank.kill()
    assert ended(ranks) == [-signal.SIGKILL] * 2
    assert complete_steps(tmp_path)
    run_here("train_fsdp2", tmp_path, *save_to(tmp_path), "num_train_steps=30")
    assert curve(tmp_path) == pytest.approx(long_curve, rel=1e-5)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_27", "step_30"]


def test_stopped_with_nothing_saved_is_no_success(tmp_path):
    (process,) = start_processes([{}], tmp_path, "train_ddp", tmp_path, "num_train_steps=5000")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").stat().st_size)
    os.kill(process.pid, signal.SIGUSR1)
    assert ended([process]) == [3]
    assert "error: checkpoint.ckpt_dir is not set, so nothing" in said_by(tmp_path)
