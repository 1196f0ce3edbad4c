# SPDX-License-Identifier: Apache-2.0
"""A recipe's `slurm.sh` on a real Slurm, stopped in every way that Slurm has; started by slurm/test.sh.

RECIPE=recipes/NAME says which.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / os.environ.get("RECIPE", "recipes/esm2_native_te")
sys.path.insert(0, str(RECIPE))
from common.contract.running import TINY, curve, metrics  # noqa: E402


pytestmark = pytest.mark.skipif(not os.environ.get("SLURM_CONF"), reason="no cluster: bash slurm/test.sh")
CLUSTER = ["bash", str(ROOT / "slurm" / "cluster.sh")]
CONFIG = ["--config-name", "L0_sanity", *TINY]
# Some tens of seconds, so that there is time to be stopped in.
LONG = [
    "num_train_steps=600",
    "validation.every_n_steps=300",
    "logger.frequency=10",
    "checkpoint.save_every_n_steps=200",
]


@pytest.fixture
def recipe(tmp_path):
    """A copy, as users have it."""
    return shutil.copytree(RECIPE, tmp_path / "recipe", ignore=shutil.ignore_patterns("__pycache__", "outputs"))


@pytest.fixture(scope="module")
def long_curve(tmp_path_factory):
    """Of the long run, never stopped, on this machine without Slurm."""
    path = tmp_path_factory.mktemp("long")
    command = [sys.executable, "train_ddp.py", *CONFIG, *LONG[:-1], f"logger.log_dir={path}"]
    subprocess.run(command, cwd=RECIPE, check=True, capture_output=True)
    return curve(path)


def sbatch(recipe: Path, options: list[str], arguments: list[str], **variables: str) -> str:
    """Submit `slurm.sh`; the job's number."""
    command = ["sbatch", "--parsable", *options, "slurm.sh", *arguments]
    done = subprocess.run(command, cwd=recipe, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job(number: str) -> dict[str, str]:
    """What Slurm knows of it."""
    done = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=True)
    return dict(part.split("=", 1) for part in done.stdout.splitlines()[0].split() if "=" in part)


def wait_until(condition, seconds: float, what: str, recipe: Path) -> None:
    for _ in range(int(seconds * 4)):
        if condition():
            return
        time.sleep(0.25)
    raise AssertionError(f"{what}: not in {seconds} s\n{output(recipe)}")


def output(recipe: Path) -> str:
    """All jobs' output."""
    return "\n".join(path.read_text() for path in recipe.glob("*.out"))


def wait_for_end(recipe: Path, number: str, seconds: float = 240) -> dict[str, str]:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: job(number)["JobState"] in ended, seconds, f"the end of job {number}", recipe)
    return job(number)


def wait_for_steps(recipe: Path, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_text().count("\n") > 5, 120, "5 lines of metrics", recipe)


def submit_long_run(recipe: Path, *options: str) -> tuple[str, Path]:
    folder = recipe / "outputs" / "run"
    where = [f"logger.log_dir={folder}", f"checkpoint.ckpt_dir={folder}"]
    return sbatch(recipe, list(options), [*CONFIG, *LONG, *where]), folder


def start_long_run(recipe: Path) -> tuple[str, Path]:
    number, folder = submit_long_run(recipe)
    wait_for_steps(recipe, folder)
    return number, folder


@pytest.mark.parametrize(
    "trainer", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("train_ddp.py", "train_mfsdp.py"))]
)
def test_two_nodes_give_the_loss_of_one_process(recipe, trainer, tmp_path):
    variables = {"TRAINER": trainer} if trainer else {}
    number = sbatch(recipe, [], [*CONFIG, "logger.log_dir=outputs/run"], **variables)
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    assert "Exception raised" not in output(recipe) and "failed to shutdown" not in output(recipe)
    run = json.loads((recipe / "outputs" / "run" / "run.json").read_text())
    assert run["num_ranks"] == 2 and run["strategy"] == (trainer[6:-3] or "fsdp2")
    local = [sys.executable, "train_ddp.py", *CONFIG, f"logger.log_dir={tmp_path / 'local'}"]
    subprocess.run(local, cwd=RECIPE, check=True, capture_output=True)
    assert curve(recipe / "outputs" / "run") == pytest.approx(curve(tmp_path / "local"), rel=1e-5)


def test_a_mistake_ends_the_job(recipe):
    first = sbatch(recipe, ["--nodes=1"], ["--config-name", "L0_sanity", "num_train_step=3"])
    number = sbatch(recipe, ["--nodes=1"], [], TRAINER="train.py")
    assert wait_for_end(recipe, first)["JobState"] == "FAILED"
    assert "error: Unknown key num_train_step: did you mean num_train_steps?" in output(recipe)
    assert wait_for_end(recipe, number)["ExitCode"] == "2:0" and "TRAINER=train.py" in output(recipe)


def test_near_its_time_limit_it_saves_requeues_itself_and_goes_on(recipe):
    """Warned 15 s after its start, be it in the middle or, on a slow machine, before its first step.

    That the curve is that of a run that was not stopped, the slow tests show, and those of the recipe.
    """
    number, folder = submit_long_run(recipe, "--time=2", "--signal=USR1@105")
    wait_until(lambda: "requeued to resume" in output(recipe), 120, "the warning", recipe)
    # Or it would go on by 15 s each time.
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=20"], check=True)
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    assert int(job(number)["Restarts"]) >= 1 and "Resuming from" in output(recipe)
    assert metrics(folder, "train", "step") == list(range(10, 601, 10))


@pytest.mark.slow
def test_asked_to_go_on_later(recipe, long_curve):
    number, folder = start_long_run(recipe)
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    wait_until(lambda: int(job(number)["Restarts"]) == 1, 60, "the requeue", recipe)
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    assert curve(folder) == pytest.approx(long_curve, rel=1e-5)


def test_asked_to_end(recipe):
    number, folder = start_long_run(recipe)
    subprocess.run(["scancel", "--signal=TERM", number], check=True)
    assert wait_for_end(recipe, number, 60)["JobState"] == "COMPLETED", output(recipe)
    stopped = int(re.search(r"Stopped after step (\d+) as asked", output(recipe)).group(1))
    assert (folder / f"step_{stopped}" / ".metadata").exists()


@pytest.mark.slow
def test_with_nowhere_to_save_it_does_not_begin_over_and_over(recipe):
    folder = recipe / "outputs" / "run"
    number = sbatch(recipe, [], [*CONFIG, *LONG[:-1], f"logger.log_dir={folder}"])
    wait_for_steps(recipe, folder)
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    found = wait_for_end(recipe, number, 60)
    assert found["JobState"] == "FAILED" and found["Restarts"] == "0"
    assert "checkpoint.ckpt_dir is not set" in output(recipe)


@pytest.mark.slow
def test_requeued_by_an_operator(recipe, long_curve):
    number, folder = start_long_run(recipe)
    subprocess.run(["scontrol", "requeue", number], check=True)
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    assert "Stopped after step" in output(recipe)  # Slurm asks before it kills: a save that is short enough is made
    assert curve(folder) == pytest.approx(long_curve, rel=1e-5)


@pytest.mark.slow
def test_a_node_that_dies(recipe, long_curve):
    """Its ranks stand still too, so the run cannot end before Slurm, after half a minute, takes it for dead."""
    number, folder = start_long_run(recipe)
    subprocess.run([*CLUSTER, "kill", "node2"], check=True)
    try:
        wait_until(lambda: int(job(number)["Restarts"]) == 1, 150, "the requeue", recipe)
    finally:
        subprocess.run([*CLUSTER, "start", "node2"], check=True)
    assert wait_for_end(recipe, number)["JobState"] == "COMPLETED", output(recipe)
    assert curve(folder) == pytest.approx(long_curve, rel=1e-5)


def test_a_sweep(recipe):
    (recipe / "rates.txt").write_text(
        "# two rates\nadamw_kwargs.lr=1e-3\n\n'adamw_kwargs.betas=[0.9, 0.99]' adamw_kwargs.lr=1e-2\n"
    )
    array = ["--array=1,2,9", "--nodes=1", "--output=%x-%A_%a.out"]
    number = sbatch(recipe, array, CONFIG, SWEEP="rates.txt")
    for task in (1, 2):
        assert wait_for_end(recipe, f"{number}_{task}")["JobState"] == "COMPLETED", output(recipe)
    (log,) = recipe.glob(f"*-{number}_1.out")
    assert log.read_text().startswith("Run 1 of rates.txt: adamw_kwargs.lr=1e-3\n")
    runs = sorted((recipe / "outputs" / f"sweep_{number}").glob("run_*"))
    assert [run.name for run in runs] == ["run_1", "run_2"]
    table = subprocess.run([sys.executable, "compare_runs.py", *runs], cwd=recipe, capture_output=True, text=True)
    assert table.returncode == 0 and "adamw_kwargs.lr" in table.stdout and "| 0.01 |" in table.stdout
    assert wait_for_end(recipe, f"{number}_9")["JobState"] == "FAILED"
    assert "rates.txt has no run 9" in output(recipe)


def test_only_nodes_are_killed_and_started():
    for words, message in (
        (["kill", "node9"], "node9: no such node; there are node1 node2."),
        (["start", "node9"], "node9: no such node"),
        (["start", "node1"], "node1 runs"),
    ):
        done = subprocess.run([*CLUSTER, *words], capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr


def test_what_has_the_number_of_a_daemon_that_is_gone_is_left_alone(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        for name in ("slurmctld", "munged", "node1"):
            (tmp_path / f"{name}.pid").write_text(f"{other.pid}\n")
        subprocess.run([*CLUSTER, "down"], env=os.environ | {"SLURM_HOME": str(tmp_path)}, check=True)
        assert other.poll() is None
        other.kill()
