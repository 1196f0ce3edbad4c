# SPDX-License-Identifier: Apache-2.0
"""What users type reaches Hydra in its form, or is one sentence with the right one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common import RECIPE, config
from common.command_line import check_launcher, for_hydra
from common.config import FOLDER, agree
from common.distributed import Distributed


KEYS = ["seed", "num_train_steps", "dataset", "dataset.micro_batch_size", "adamw_kwargs", "adamw_kwargs.lr"]


def read(*words):
    return for_hydra(words, FOLDER, KEYS)


def test_keys_may_stand_on_both_sides_of_a_flag():
    words = ["seed=1", "--config-name", "L0_sanity", "num_train_steps=2"]
    assert read(*words) == ["--config-name", "L0_sanity", "seed=1", "num_train_steps=2"]
    assert read("-m", "seed=1,2", "-cn=L0_sanity") == ["-m", "--config-name", "L0_sanity", "seed=1,2"]


def test_paths_reach_hydra_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    Path("a,b [1].txt").touch()
    found = read(
        "x=~/data", "x=[~/a,~/b]", "x=[~/a , ~b]", "x=a,b [1].txt", "x=é ü/ß", "x=2024_01", "x=a,b", "~x", "x="
    )
    assert found[:3] == ["x=/home/me/data", "x=[/home/me/a,/home/me/b]", "x=[/home/me/a , ~b]"]
    assert found[3:] == ["x='a,b [1].txt'", "x='é ü/ß'", "x=2024_01", "x=a,b", "~x", "x="]


def test_a_configuration_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("defaults: [L0_sanity, _self_]\nseed: 1\n")
    named = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    for words in (["--config-name", "mine.yaml"], ["-cn", str(tmp_path / "mine.yaml")], ["--config-name=mine"]):
        assert sorted(read(*words)) == sorted(named)
    assert read("--config-path", ".", "-cn", "mine") == ["--config-dir", ".", "--config-name", "mine"]
    Path("mine.yaml").write_text(
        "seed: 1\nnum_train_steps: 2\ndataset: {}\nadamw_kwargs: {}\n"
    )  # as config.yaml of a run
    assert "hydra.run.dir=." in read("-cn", "mine")
    Path("mine.yaml").write_text("seed: 1\n")
    with pytest.raises(
        ValueError, match=r"mine\.yaml lacks num_train_steps, dataset, adamw_kwargs; let it begin with"
    ):
        read("-cn", "mine")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--num_train_steps 6", "--num_train_steps 6 cannot be read: .* behind them: num_train_steps=6."),
        ("--num-train-steps=6 seed=1", "--num-train-steps=6 cannot be read: .*: num_train_steps=6."),
        ("--lr 1e-4", "behind them: adamw_kwargs.lr=1e-4."),
        ("-seed 7", "-seed 7 cannot be read: .*: seed=7."),
        ("--dataset.micro_batch_size", "behind them: dataset.micro_batch_size=..."),
        ("--config_name L0_sanity", "did you mean --config-name?"),
        ("--nonsense 3", "Unknown flag --nonsense: keys are set by key=value"),
        ("seed=1 --config-name", "--config-name needs a value"),
        ("num_train_steps 6", "num_train_steps 6 cannot be read: write num_train_steps=6"),
        ("num_train_steps = 6", "cannot be read: write num_train_steps=6"),
    ],
)
def test_what_has_no_such_form_is_a_sentence(line, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(*line.split())


TOGETHER = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, None),
        (TOGETHER, None),
        ({"SLURM_NTASKS": "1", "MASTER_PORT": "29500"}, None),
        (TOGETHER | {"SLURM_NTASKS": "2"}, None),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2: .*torchrun --nproc_per_node=N train_ddp.py.*slurm.sh"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: .*torchrun"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4: .*torchrun"),
        (
            {"RANK": "0"},
            "RANK=0 is set in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; .*unset RANK",
        ),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set .*torchrun"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set .*torchrun"),
        (TOGETHER | {"RANK": "x"}, "RANK=x in the environment must be a whole number"),
        (TOGETHER | {"RANK": "2"}, "RANK=2 in the environment must be less than WORLD_SIZE=2"),
        (TOGETHER | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 .*between 1 and 65535"),
    ],
)
def test_launchers(monkeypatch, variables, sentence):
    for name in [
        name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD", "LOCAL_"))
    ]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if sentence is None:
        check_launcher("train_ddp.py")
    else:
        with pytest.raises(ValueError, match=sentence):
            check_launcher("train_ddp.py")


# ---- what ranks agree on


def agreed(mine, first, monkeypatch):
    """The configuration of rank 1 after it has met rank 0's."""
    monkeypatch.setattr(Distributed, "gather", lambda self, value: [config.flat(first), value])
    mine = OmegaConf.create(mine)
    agree(mine, Distributed(rank=1, local_rank=1, num_ranks=2, device=None))
    return mine


def test_folders_are_rank_0s(monkeypatch):
    mine = {"checkpoint": {"ckpt_dir": "b"}, "logger": {"log_dir": "${checkpoint.ckpt_dir}"}}
    first = {"checkpoint": {"ckpt_dir": "a"}, "logger": {"log_dir": "a"}}
    assert agreed(mine, first, monkeypatch) == first


def test_nodes_may_have_copies_of_files(monkeypatch):
    agreed({"dataset": {"files": ["/node1/x.parquet"]}}, {"dataset": {"files": ["/node0/x.parquet"]}}, monkeypatch)


@pytest.mark.parametrize(("key", "mine", "first"), [("seed", 1, 0), ("files", "/x/1.parquet", "/x/0.parquet")])
def test_all_else_is_refused(monkeypatch, key, mine, first):
    with pytest.raises(
        ValueError, match=f"{key} is not the same on all ranks: {first} on rank 0 and {mine} on rank 1"
    ):
        agreed({key: mine}, {key: first}, monkeypatch)


# ---- Ctrl-C, and output that nobody takes


PROGRAM = """
import os, signal, sys, time
from common import quiet
quiet.keep_streams()
from common.distributed import StopSignal
stop = StopSignal()
os.write(1, b"ready")
while not stop.requested: time.sleep(0.01)
print("asked", file=sys.stderr)
time.sleep(float(sys.argv[1]))
os.write(1, b" saved")
"""


def start(seconds, **options):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(seconds)], cwd=RECIPE, stdout=-1, **options)
    assert process.stdout.read(5) == b"ready"
    return process


def test_ctrl_c_stops_after_the_step_and_a_second_one_at_once():
    process = start(0.3, stderr=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == (b" saved", 0)
    assert b"Ctrl-C again ends at once" in err and b"Traceback" not in err
    process = start(60, stderr=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_closed_terminal_or_pipe_ends_no_run():
    process = start(0, stderr=subprocess.PIPE)
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == b" saved" and process.wait(10) == 0


def test_a_run_without_standard_error():
    program = (
        "from common import quiet; import sys; print('x', file=sys.stderr); assert open('/dev/null').fileno() > 2"
    )
    subprocess.run(f'"{sys.executable}" -c "{program}" 2>&-', shell=True, cwd=RECIPE, check=True, timeout=60)
