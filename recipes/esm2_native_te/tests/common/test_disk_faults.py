# SPDX-License-Identifier: Apache-2.0
"""A disk that fails: the run goes on or stops with one sentence, and the checkpoint before still loads."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint import Metadata

import checkpoint
from common import step_folder
from common.contract import ranks
from common.contract.running import (
    TRAINERS,
    curve,
    metrics,
    run_here,
    run_ranks,
    said_by,
    start_processes,
    train_on,
)
from common.step_folder import SUMS, StepWriter, complete_steps, damage, read_weights
from export import export


def save_to(path, *more):
    return [f"checkpoint.ckpt_dir={path}", "checkpoint.save_every_n_steps=2", "checkpoint.max_to_keep=null", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run with checkpoints at steps 2, 4 and 6."""
    path = tmp_path_factory.mktemp("whole")
    run_here("train_fsdp2", path, *save_to(path))
    return path


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run as it was after step 4."""
    for step in (2, 4):
        shutil.copytree(whole / f"step_{step}", tmp_path / f"step_{step}")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def size(whole):
    """Bytes of one checkpoint on a disk."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in (whole / "step_6").iterdir())


@pytest.fixture
def small_disk(tmp_path, size):
    """A file system of its own that takes two checkpoints and a half."""
    options = f"size={int(2.5 * size)}"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def remount(path, option):
    deadline = time.monotonic() + 20
    while subprocess.run(["mount", "-o", f"remount,{option}", str(path)], capture_output=True).returncode:
        assert time.monotonic() < deadline  # busy while a file is open
        time.sleep(0.01)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated shard": lambda step: cut(step / "__0_0.distcp"),
    "one bit of a shard": lambda step: flip(step / "__0_0.distcp"),
    "missing shard": lambda step: (step / "__0_0.distcp").unlink(),
    "empty shard": lambda step: (step / "__0_0.distcp").write_bytes(b""),
    "truncated metadata": lambda step: cut(step / ".metadata"),
    "one bit of the metadata": lambda step: flip(step / ".metadata"),
    "missing metadata": lambda step: (step / ".metadata").unlink(),
    "truncated run.json": lambda step: cut(step / "run.json"),
    "missing run.json": lambda step: (step / "run.json").unlink(),
    "truncated sums": lambda step: cut(step / SUMS),
    "missing sums": lambda step: (step / SUMS).unlink(),
    "bytes for sums": lambda step: (step / SUMS).write_bytes(b"\xff\xfe\x00"),
    "half a copy": lambda step: [file.unlink() for file in step.iterdir() if file.name != "__0_0.distcp"],
    "an empty folder": lambda step: [file.unlink() for file in step.iterdir()],
    "a file for a folder": lambda step: [shutil.rmtree(step), step.write_text("")],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_seen(name, stopped):
    assert damage(stopped / "step_4") is None
    DAMAGES[name](stopped / "step_4")
    assert damage(stopped / "step_4")


# What a run does about it does not depend on the kind.
QUICK = ("one bit of a shard", "missing metadata", "a file for a folder")
KINDS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_goes_on(name, whole, stopped, capsys):
    DAMAGES[name](stopped / "step_4")
    run_here("train_fsdp2", stopped, *save_to(stopped))
    message = capsys.readouterr().err
    assert "step_4 is damaged and set aside as step_4.damaged" in message
    assert f"Resuming from {stopped / 'step_2'}" in message
    assert curve(stopped) == curve(whole)
    assert complete_steps(stopped) == [2, 4, 6]
    assert (stopped / "step_4.damaged").exists()
    theirs, ours = read_weights(whole / "step_6"), read_weights(stopped / "step_6")
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("name", KINDS)
def test_with_nothing_whole_left_it_stops_and_touches_nothing(name, stopped, capsys):
    for step in (2, 4):
        DAMAGES[name](stopped / f"step_{step}")
    before = sorted(str(path) for path in stopped.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_here("train_fsdp2", stopped, *save_to(stopped))
    assert stop.value.code == 2
    assert "holds no whole checkpoint (step_4: " in capsys.readouterr().err
    assert sorted(str(path) for path in stopped.rglob("*")) == before


@pytest.mark.parametrize("name", ["one bit of a shard", "missing shard", "missing metadata"])
def test_a_damaged_checkpoint_is_not_exported(name, stopped):
    DAMAGES[name](stopped / "step_4")
    with pytest.raises(ValueError, match="step_4 is no whole checkpoint"):
        export(stopped / "step_4", stopped / "final_model")
    assert not (stopped / "final_model").exists()


def test_each_rank_checks_its_share(whole, tmp_path):
    path = run_ranks("train_fsdp2", 2, tmp_path, *save_to(tmp_path), "num_train_steps=2") / "step_2"
    flip(path / "__1_0.distcp")
    found = [damage(path, share, 4) for share in range(4)]
    assert sum(reason is not None for reason in found) == 1
    assert "__1_0.distcp" in next(filter(None, found))
    with pytest.raises(AssertionError, match="holds no whole checkpoint"):
        run_ranks("train_fsdp2", 2, tmp_path, *save_to(tmp_path))


def test_plain_tools_check_it_too(whole):
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=whole / "step_6", capture_output=True, text=True)
    assert checked.returncode == 0
    assert ".metadata: OK" in checked.stdout


def test_a_checkpoint_of_another_size_is_refused(stopped, capsys):
    other = stopped / "other"
    run_here("train_fsdp2", other, *save_to(other), "model_kwargs.hidden_size=64")
    shutil.copytree(other / "step_6", stopped / "step_6")
    with pytest.raises(SystemExit):
        run_here("train_fsdp2", stopped, *save_to(stopped))
    assert "hidden_size was 64 and is 48" in capsys.readouterr().err


@pytest.mark.rotated
@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_full_disk_stops_no_training_and_loses_nothing(
    trainer, background, whole, small_disk, tmp_path_factory, capsys
):
    log = tmp_path_factory.mktemp("log")
    command = (trainer, log, *save_to(small_disk, f"checkpoint.async_save={background}"))
    with pytest.raises(SystemExit) as stop:  # the last could not be saved either
        run_here(*command)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "step_6 could not be saved, on rank 0: No space left on device. The newest checkpoint is step_4." in message
    assert metrics(log, "train", "loss") == pytest.approx(metrics(whole, "train", "loss"), rel=1e-5)
    assert {found.name for found in small_disk.iterdir()} == {"step_2", "step_4"}
    remount(small_disk, "size=10M")
    assert curve(run_here(*command)) == pytest.approx(curve(whole), rel=1e-5)
    assert complete_steps(small_disk) == [2, 4, 6]


def test_a_full_disk_on_two_ranks(small_disk, tmp_path_factory):
    log = tmp_path_factory.mktemp("log")
    with pytest.raises(AssertionError, match="The newest checkpoint is step_4"):
        run_ranks("train_fsdp2", 2, log, *save_to(small_disk, "checkpoint.async_save=true"))
    assert complete_steps(small_disk) == [2, 4]


def test_metrics_that_find_no_room_stop_nothing(small_disk, size, tmp_path_factory, capsys):
    ckpt = tmp_path_factory.mktemp("ckpt")
    (small_disk / "filler").write_bytes(b"\0" * (int(2.5 * size) - 20480))
    run_here("train_ddp", small_disk, *save_to(ckpt), "num_train_steps=60", "logger.frequency=1")
    assert "metrics.jsonl cannot be written: No space left on device" in capsys.readouterr().err
    for line in (small_disk / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert complete_steps(ckpt)[-1] == 60


def test_a_final_model_that_finds_no_room_is_told(small_disk, size, capsys):
    command = ("train_ddp", small_disk, *save_to(small_disk, "checkpoint.save_every_n_steps=null"))
    # The final model is a third of a checkpoint; the check before the run wants a checkpoint and a third.
    (small_disk / "filler").write_bytes(b"\0" * int(1.4 * size))
    with pytest.raises(SystemExit):
        run_here(*command, "checkpoint.save_final_model=true")
    assert "final_model could not be written" in capsys.readouterr().err
    (small_disk / "filler").unlink()
    run_here(*command, "checkpoint.save_final_model=true")  # nothing left but that
    assert sorted(path.name for path in small_disk.iterdir() if path.is_dir()) == ["final_model", "step_6"]


def test_what_a_killed_save_left_takes_no_room_from_the_next(small_disk, size, tmp_path_factory):
    log = tmp_path_factory.mktemp("log")
    command = ("train_ddp", log, *save_to(small_disk))
    run_here(*command, "num_train_steps=2")
    litter = small_disk / ".step_4.partial"
    litter.mkdir()
    (litter / "__0_0.distcp").write_bytes(b"\0" * (int(1.4 * size)))
    run_here(*command, "num_train_steps=4")
    assert sorted(path.name for path in small_disk.iterdir()) == ["step_2", "step_4"]


def test_a_log_folder_that_is_full_from_the_start_stops_nothing(small_disk, size, tmp_path_factory, capsys):
    ckpt = tmp_path_factory.mktemp("ckpt")
    (small_disk / "filler").write_bytes(b"\0" * (int(2.5 * size) // 4096 * 4096))
    run_here("train_ddp", small_disk, *save_to(ckpt))
    assert "No space left on device. Training continues without it." in capsys.readouterr().err
    assert complete_steps(ckpt)[-1] == 6


def test_a_folder_that_one_rank_cannot_write_is_told_and_all_ranks_leave(tmp_path):
    (tmp_path / ".probe_1" / "in_the_way").mkdir(parents=True)
    with pytest.raises(AssertionError, match="cannot be written: Is a directory; give another folder"):
        run_ranks("train_ddp", 2, tmp_path / "log", *save_to(tmp_path), timeout=120)


def apart(distributed, path):
    """Each rank with a folder of its own, as on two nodes."""
    here = path / f"node_{distributed.rank}"
    here.mkdir()
    os.chdir(here)
    message = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stderr(message):
        train_on(distributed, "train_fsdp2", "logger.log_dir=null", "checkpoint.ckpt_dir=checkpoints")
    return stop.value.code, message.getvalue()


def test_folders_that_are_not_shared_are_refused(tmp_path):
    (first, message), (second, nothing) = ranks.call_on_ranks(tmp_path, apart, 2, tmp_path)
    assert (first, second, nothing) == (2, 2, "")
    assert "checkpoint.ckpt_dir=checkpoints is not the same folder for all ranks" in message


def test_a_shard_that_another_node_kept_to_itself_fails_the_save(tmp_path):
    writer = StepWriter(tmp_path / "step_1", "{}")
    writer.path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"__1_0\.distcp of another rank is not here"):
        writer.finish(Metadata({}), [([], {"__1_0.distcp": "0"})])
    assert not (tmp_path / "step_1").exists()


def test_a_checkpoint_under_another_number_is_set_aside(stopped, whole, capsys):
    (stopped / "step_4").rename(stopped / "step_5")
    run_here("train_fsdp2", stopped, *save_to(stopped))
    assert (
        "step_5 is damaged and set aside as step_5.damaged: it is step 4 under another name" in capsys.readouterr().err
    )
    assert curve(stopped) == curve(whole)


def test_an_error_that_is_no_disks_fault_ends_the_run(tmp_path, monkeypatch):
    def interrupted(self, metadata, results):
        raise RuntimeError("a bug")

    monkeypatch.setattr(StepWriter, "finish", interrupted)
    with pytest.raises(RuntimeError, match="a bug"):
        run_here("train_ddp", tmp_path, *save_to(tmp_path))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "lock", partial(step_folder.lock, seconds=1.6))
    holder = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit):
            run_here("train_ddp", tmp_path / "log", *save_to(tmp_path))
        told = capsys.readouterr().err
        waits, refused = (told.index(f"{tmp_path}: another run writes to it; {end}") for end in ("waiting", "stop"))
        assert waits < refused and "waiting for its end, 2 s at most" in told
        other.kill()
    run_here("train_ddp", tmp_path / "log", *save_to(tmp_path))


def test_a_folder_that_becomes_read_only(small_disk, tmp_path_factory, capsys):
    remount(small_disk, "size=100M")
    log = tmp_path_factory.mktemp("log")
    command = ["train_ddp", log, *save_to(small_disk), "num_train_steps=120", "checkpoint.max_to_keep=2"]
    (process,) = start_processes([{}], log, *command)
    while not complete_steps(small_disk):
        assert process.is_alive()
        time.sleep(0.01)
    remount(small_disk, "ro")
    left = complete_steps(small_disk)
    process.join(300)
    message = said_by(log)
    assert "could not be saved, on rank 0: Read-only file system. The newest checkpoint is step_" in message
    assert process.exitcode == 2
    assert "Traceback" not in message
    assert complete_steps(small_disk) == left
    assert all(damage(small_disk / f"step_{step}") is None for step in left)
    with pytest.raises(SystemExit):
        run_here(*command)
    assert f"checkpoint.ckpt_dir={small_disk} cannot be written: Read-only file system" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_the_right_to_write(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path / "log", *save_to(tmp_path))
    assert "cannot be written: Permission denied" in capsys.readouterr().err
