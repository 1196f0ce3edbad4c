# SPDX-License-Identifier: Apache-2.0
"""`slurm.sh` starts what exists; Slurm's own commands are stood in for by two scripts that do their part."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.contract.running import RECIPE, TINY, environment, metrics


# A trainer that loads, when it hears no signal, and then takes twelve steps; a child of what stands in for torchrun.
TRAINER = """
import os, pathlib, signal, sys, time
when, signal_name, code = sys.argv[1:]
def send(now):
    if now == when:
        os.killpg(0, getattr(signal, f"SIG{signal_name}"))
heard = []
send("loading")
time.sleep(3)
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
for step in range(1, 13):
    send(f"step {step}")
    time.sleep(0.5)
    if heard and step < 12:
        pathlib.Path(os.environ["STOPPED_EARLY"]).touch()
        break
print("stopped early" if step < 12 else "came to its end")
sys.exit(int(code))
"""


# When the signal comes, which, with what code the trainer ends; what it says, and the code of the node.
SIGNALS = [
    ("never", "USR1", 0, "came to its end", 0),
    ("start", "USR1", 0, "stopped early", 75),
    ("loading", "USR1", 0, "stopped early", 75),
    ("loading", "TERM", 0, "stopped early", 0),
    ("step 2", "USR1", 0, "stopped early", 75),
    ("step 2", "USR1", 3, "stopped early", 3),  # with nowhere to save, for one
    ("step 12", "USR1", 0, "came to its end", 0),  # all is done: not to be queued again
]


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    return job_in(tmp_path)


def job_in(tmp_path: Path) -> dict:
    """The variables of a job, and beside them what stands in for Slurm."""
    stand_in(tmp_path, "srun", 'while case $1 in --*) ;; *) false;; esac; do shift; done; exec "$@"')
    stand_in(tmp_path, "scontrol", "echo 127.0.0.1")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node1"}
    job["SLURM_JOB_CPUS_PER_NODE"] = "64(x2),8,32"
    return environment() | job | {"SLURM_SUBMIT_DIR": str(RECIPE), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_script_trains_with_what_is_passed_on(slurm, tmp_path):
    command = [
        "bash",
        "slurm.sh",
        "--config-name",
        "L0_sanity",
        *TINY,
        f"logger.log_dir={tmp_path}",
        "num_train_steps=2",
    ]
    subprocess.run(command, cwd=RECIPE, env=slurm, check=True, timeout=180)
    assert len(metrics(tmp_path, "train", "loss")) == 2


@pytest.mark.parametrize("trainer", [None, "train_ddp.py"])
def test_the_trainer_that_is_asked_for(trainer, slurm, tmp_path):
    stand_in(tmp_path, "torchrun", "printf '%s\\n' \"$@\"")
    given = {"TRAINER": trainer} if trainer else {}
    command = ["bash", "slurm.sh", "seed=1"]
    done = subprocess.run(command, cwd=RECIPE, env=slurm | given, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == [trainer or "train_fsdp2.py", "seed=1"], done.stderr


def test_a_trainer_that_is_not_there(slurm):
    done = subprocess.run(
        ["bash", "slurm.sh"], cwd=RECIPE, env=slurm | {"TRAINER": "train.py"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "TRAINER=train.py" in done.stderr


def run_node(slurm: dict, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`slurm_node.sh` in a process group of its own: Slurm signals all of a job's processes."""
    (tmp_path / "tmp").mkdir()
    variables = slurm | {"RDZV_ENDPOINT": f"127.0.0.1:{20000 + os.getpid() % 20000}", "TMPDIR": str(tmp_path / "tmp")}
    command = ["bash", "slurm_node.sh", *arguments]
    done = subprocess.run(
        command, cwd=RECIPE, env=variables, capture_output=True, text=True, timeout=180, start_new_session=True
    )
    assert not list((tmp_path / "tmp").glob("tmp.*"))
    return done


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> Iterator[dict]:
    """By case, how its node ends; they wait for most of their time, so all go at once."""
    with ThreadPoolExecutor(len(SIGNALS)) as pool:
        yield {case: pool.submit(signalled, tmp_path_factory.mktemp("node"), *case[:3]) for case in SIGNALS}


def signalled(tmp_path: Path, when: str, signal: str, code: int) -> subprocess.CompletedProcess:
    slurm = job_in(tmp_path)
    (tmp_path / "trainer.py").write_text(TRAINER)
    arguments = f"{tmp_path}/trainer.py '{when}' {signal} {code}"
    stand_in(tmp_path, "torchrun", f"{sys.executable} {arguments}; exit $?")
    stand_in(tmp_path, "nvidia-smi", f"kill -{signal} 0" if when == "start" else "exit 1")
    return run_node(slurm, tmp_path, "trainer")


@pytest.mark.parametrize("case", SIGNALS, ids=lambda case: "-".join(map(str, case[:3])))
def test_a_signal_at_any_time(case, ends):
    *_, message, node_code = case
    done = ends[case].result()
    assert message in done.stdout, done.stderr
    assert done.returncode == node_code


def test_a_signal_before_the_trainer_hears_it(slurm, tmp_path):
    stand_in(tmp_path, "nvidia-smi", "kill -USR1 0; exit 1")
    save_to = [f"logger.log_dir={tmp_path / 'run'}", f"checkpoint.ckpt_dir={tmp_path / 'run'}"]
    done = run_node(slurm, tmp_path, "train_ddp.py", *TINY, *save_to, "num_train_steps=100000")
    assert done.returncode == 75, done.stderr
    assert "as asked" in done.stderr and list((tmp_path / "run").glob("step_*/.metadata"))


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("a=1  b=2", ["a=1", "b=2"]),
        ("'fp8_layers=[0-3, 5]' seed=1", ["fp8_layers=[0-3, 5]", "seed=1"]),
        ('name="two words" path=a\\ b', ["name=two words", "path=a b"]),
        ("a=$HOME b=`id` c=$(id) d=*", ["a=$HOME", "b=`id`", "c=$(id)", "d=*"]),
    ],
)
def test_a_line_of_a_sweep(line, overrides, slurm, tmp_path):
    stand_in(tmp_path, "srun", "printf '%s\\n' \"$@\"")
    (tmp_path / "sweep.txt").write_text(f"# a comment\n\n{line}\n")
    task = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SWEEP": str(tmp_path / "sweep.txt")}
    done = subprocess.run(["bash", "slurm.sh", "x=0"], cwd=RECIPE, env=slurm | task, capture_output=True, text=True)
    folder = "outputs/sweep_7/run_1"
    told, *message = done.stdout.splitlines()
    assert told == f"Run 1 of {tmp_path / 'sweep.txt'}: {line}"
    assert message[:2] == ["--cpus-per-task=8", "--cpu-bind=cores"]
    assert message[5:] == ["x=0", f"logger.log_dir={folder}", f"checkpoint.ckpt_dir={folder}", *overrides], done.stderr


def test_a_quote_that_is_not_closed(slurm, tmp_path):
    (tmp_path / "sweep.txt").write_text("'a=1\n")
    task = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SWEEP": str(tmp_path / "sweep.txt")}
    done = subprocess.run(["bash", "slurm.sh"], cwd=RECIPE, env=slurm | task, capture_output=True, text=True)
    assert done.returncode == 2 and "a quote is not closed in: 'a=1" in done.stderr
