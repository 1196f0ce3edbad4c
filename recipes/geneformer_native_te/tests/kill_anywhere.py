# SPDX-License-Identifier: Apache-2.0
"""Kill a run wherever it hurts, again and again, and show that nothing came of it.

    python tests/kill_anywhere.py --deaths 24 --seed 0 --trainer train_fsdp2

starts a small run on two ranks under `torchrun --max-restarts` and, at moments drawn from the seed, sends SIGKILL to
one rank, to all ranks and to a data worker, kills a rank at a chosen file operation inside a synchronous save, inside
one in the background, while old checkpoints are removed and while the final model is written; and sends SIGTERM and
SIGUSR1, after which the same command is given again. In the end the run's weights and metrics must be those of an
undisturbed run to the bit, each step must have read what the plan says, and only whole checkpoints may be left. Linux.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from common import quiet  # noqa: E402, F401  # isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402

from common.contract.running import (  # noqa: E402
    RECIPE,
    THIS_RECIPE,
    TINY,
    TRAINERS,
    environment,
    recipe_module,
    torchrun,
    with_table,
    write_table,
)
from common.run_facts import cpu_name, versions  # noqa: E402
from common.step_folder import damage, read_weights  # noqa: E402
from rows import run_in  # noqa: E402


SAVE_EVERY, KEEP, NUM_RANKS = 3, 2, 2
IN_A_SAVE, PRUNING, EXPORTING = ".partial", ".old", "final_model"
LAYOUT = [
    f"checkpoint.save_every_n_steps={SAVE_EVERY}", f"checkpoint.max_to_keep={KEEP}", "dataset.num_workers=1",
    "checkpoint.save_final_model=true", "validation.every_n_steps=40",
]  # fmt: skip
if "use_sequence_packing:" in (RECIPE / "hydra_config" / "defaults.yaml").read_text():
    LAYOUT.append("use_sequence_packing=true")


def deaths_in_order(num_deaths: int, draw: random.Random) -> list[tuple[bool, str]]:
    """(whether saves are in the background, kind of death): runs of kills, each ended by a signal to stop."""
    order: list[tuple[bool, str]] = []
    background = False
    while len(order) < num_deaths:
        save = "in a save in the background" if background else "in a save"
        kills = ["one rank", "all ranks", "data worker", save, "pruning"]
        draw.shuffle(kills)
        ends = "SIGUSR1" if background else "SIGTERM"
        order += [(background, kind) for kind in (*kills, ends)]
        background = not background
    return [*order[: num_deaths - 1], (order[num_deaths - 1][0], "exporting")]


class Run:
    """One `torchrun`, and what there is to see of it from outside."""

    def __init__(self, folder: Path, trainer: str, num_steps: int, more: list[str]):
        self.folder, self.ckpt, self.bomb = folder, folder / "ckpt", folder / "bomb"
        self.command = [f"{trainer}.py", *TINY, *LAYOUT, f"num_train_steps={num_steps}", *more]
        self.command += [f"checkpoint.ckpt_dir={self.ckpt}", f"logger.log_dir={folder}"]
        self.process: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, background: bool, max_restarts: int) -> None:
        """Give the command."""
        faults = str(Path(__file__).parent / "faults")
        command = [*torchrun(NUM_RANKS), f"--max-restarts={max_restarts}", *self.command]
        command.append(f"checkpoint.async_save={str(background).lower()}")
        with open(self.folder / "log.txt", "a") as log:
            self.process = subprocess.Popen(
                command, cwd=RECIPE, stdout=log, stderr=log, start_new_session=True,
                env=environment() | {"BOMB": str(self.bomb), "PYTHONPATH": faults, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def lines(self) -> list[dict]:
        """The metrics so far."""
        found = []
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # being written
                break
        return found

    def life(self) -> tuple[int, int]:
        """What changes when a run begins (its metrics are a new file), and its newest step."""
        try:
            lines = [line for line in self.lines() if line["kind"] == "train"]
            return os.stat(self.folder / "metrics.jsonl").st_ino, lines[-1]["step"] if lines else 0
        except OSError:
            return 0, 0

    def ranks(self) -> list[int]:
        """Process ids."""
        return [pid for pid in children(self.process.pid) if b"RANK=" in read(f"/proc/{pid}/environ")]

    def workers(self) -> list[int]:
        """Process ids of the data workers of all ranks: forked from a server that each rank has."""
        servers = [c for rank in self.ranks() for c in children(rank) if b"forkserver" in read(f"/proc/{c}/cmdline")]
        return [worker for server in servers for worker in children(server)]


def read(path: str) -> bytes:
    """A file of /proc, empty when the process is gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]


class RunFailed(Exception):
    """The run did what it should not."""


def wait_for(condition, run: Run, what: str, seconds: float = 300):
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if run.process.poll() is not None and not condition():
            raise RunFailed(f"the run ended with exit code {run.process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise RunFailed(f"nothing happened in {seconds:.0f} s: {what}")
        time.sleep(0.005)
    return value


def kill(pids: list[int], number: int) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def disturb(run: Run, kind: str, before: tuple[int, int], draw: random.Random, number: int) -> dict:
    """Cause one death; `before` is what `life` was at the death before."""
    steps = draw.randint(1, 5)
    if kind in ("one rank", "all ranks") and draw.random() < 0.3:  # while it starts
        wait_for(lambda: len(run.ranks()) == NUM_RANKS, run, "the ranks were there")
        time.sleep(draw.uniform(0.5, 5))
        kind += ", starting"
    else:
        wait_for(lambda: run.life()[0] != before[0], run, "a new life")
        at = run.life()[1]
        if kind not in ("exporting", "pruning"):
            wait_for(lambda: run.life()[1] >= at + steps, run, f"{steps} steps more")
    ranks = wait_for(lambda: len(run.ranks()) == NUM_RANKS and run.ranks(), run, "the ranks were there")
    life = run.life()
    if kind.startswith("one rank"):
        kill([draw.choice(ranks)], signal.SIGKILL)
    elif kind.startswith("all ranks"):
        kill(ranks, signal.SIGKILL)
    elif kind == "data worker":
        kill([draw.choice(wait_for(run.workers, run, "workers were there"))], signal.SIGKILL)
    elif kind.startswith("SIG"):
        # Slurm signals every process of the step; torchrun's own answer to SIGTERM is tested elsewhere.
        kill(ranks if draw.random() < 0.5 else [draw.choice(ranks)], getattr(signal, kind))
        wait_for(lambda: run.process.poll() is not None, run, "the run stopped as asked")
        if run.process.returncode:
            raise RunFailed(f"{kind}: exit code {run.process.returncode}")
    else:
        at = {"pruning": PRUNING, "exporting": EXPORTING}.get(kind, IN_A_SAVE)
        rank = draw.randrange(NUM_RANKS) if at == IN_A_SAVE else 0
        after = draw.randint(0, 12 if at == IN_A_SAVE and rank == 0 else 3)
        new = run.bomb.with_suffix(".new")
        new.write_text(json.dumps({"at": at, "after": after, "rank": rank, "number": number}))
        new.rename(run.bomb)
        wait_for(lambda: not run.bomb.exists(), run, f"death at file operation {after} of rank {rank} ({kind})")
        kind += f", file operation {after} of rank {rank}"
    if not kind.startswith("SIG"):
        wait_for(lambda: not set(ranks) & set(run.ranks()), run, "the ranks were replaced")
    return {"kind": kind, "step": run.life()[1], "life": life}


def planned(folder: Path, num_steps: int) -> tuple[list[dict], np.ndarray]:
    """What the plan says of each step: first micro-batch, tokens or atoms so far; and how often each row has come."""
    settings, plan = run_in(folder)
    steps, units, of_units = [], 0, f"num_{recipe_module('metrics').UNIT}"
    times = np.zeros(plan.num_rows, dtype=np.int64)
    batches = plan.starting_at(0, 0, 0)
    for step in range(1, num_steps + 1):
        some = list(islice(batches, settings.micro_batches_per_step))
        for batch in some:
            np.add.at(times, batch.rows, 1)
            units += int(plan.source.sizes(batch.rows, batch.epoch).sum())
        steps.append({"step": step, "first_micro_batch": list(some[0][:3]), of_units: units})
    return steps, times


def compare(disturbed: Run, calm: Run, num_steps: int) -> list[str]:
    """All that is not as it should be."""
    wrong = []
    theirs, ours = (read_weights(run.ckpt / f"step_{num_steps}") for run in (calm, disturbed))
    if different := [name for name in theirs if not torch.equal(theirs[name], ours[name])]:
        wrong.append(f"{len(different)} of {len(theirs)} tensors differ from the undisturbed run's")
    keys = ("kind", "step", "first_micro_batch", *{key: None for kind in THIS_RECIPE.CURVE.values() for key in kind})
    lines = [[{k: line.get(k) for k in keys} for line in run.lines()] for run in (calm, disturbed)]
    if lines[0] != lines[1]:
        wrong.append("the metrics differ from the undisturbed run's")
    steps, times = planned(disturbed.folder, num_steps)
    read = [{k: line[k] for k in steps[0]} for line in disturbed.lines() if line["kind"] == "train"]
    if read != steps:
        wrong.append("the steps did not read what the plan says")
    if times.max() - times.min() > 1:
        wrong.append(f"some rows came {times.min()} times and others {times.max()} times")
    expected = {f"step_{num_steps}", f"step_{num_steps - (num_steps % SAVE_EVERY or SAVE_EVERY)}", "final_model"}
    if (left := {found.name for found in disturbed.ckpt.iterdir()}) != expected:
        wrong.append(f"the checkpoint folder holds {sorted(left)}")
    wrong += [f"{name}: {reason}" for name in left if "step_" in name and (reason := damage(disturbed.ckpt / name))]
    return wrong


def main(folder: Path, trainer: str, num_deaths: int, seed: int, more: list[str]) -> dict:
    """Both runs and the comparison; "wrong" in the result is a list of what is not as it should be."""
    draw = random.Random(seed)
    num_steps = 14 * num_deaths + 10
    calm, disturbed = (Run(folder / name, trainer, num_steps, more) for name in ("calm", "disturbed"))
    print(f"{trainer}, {num_steps} steps: undisturbed ...", flush=True)
    calm.start(background=False, max_restarts=0)
    if calm.process.wait():
        raise RunFailed(f"the undisturbed run failed: {(calm.folder / 'log.txt').read_text()[-2000:]}")
    deaths, life, most = [], (0, 0), 0
    try:
        order = deaths_in_order(num_deaths, draw)
        for number, (background, kind) in enumerate(order):
            if disturbed.process is None or disturbed.process.poll() is not None:
                # Not one restart more than there are kills: no start may fail by itself.
                kills = next(
                    (i for i, (_, k) in enumerate(order[number:]) if k.startswith("SIG")), len(order) - number
                )
                disturbed.start(background, max_restarts=kills)
            deaths.append(disturb(disturbed, kind, life, draw, number))
            life = deaths[-1].pop("life")
            left = len(list(disturbed.ckpt.iterdir())) if disturbed.ckpt.exists() else 0
            most = max(most, left)
            print(f"{number + 1:>3}  {deaths[-1]['kind']}, at step {deaths[-1]['step']}; {left} folders", flush=True)
        if disturbed.process.wait(timeout=600):
            raise RunFailed(f"the run failed in the end with exit code {disturbed.process.returncode}")
        wrong = compare(disturbed, calm, num_steps)
    except RunFailed as error:
        wrong = [f"{error}; the end of its log:\n{(disturbed.folder / 'log.txt').read_text()[-3000:]}"]
    finally:
        if disturbed.process and disturbed.process.poll() is None:
            os.killpg(disturbed.process.pid, signal.SIGKILL)
    for sentence in wrong or [
        "Weights and metrics equal those of the undisturbed run to the bit; nothing is left over."
    ]:
        print(sentence)
    return {
        "recipe": RECIPE.name, "trainer": trainer, "seed": seed, "num_ranks": NUM_RANKS, "num_steps": num_steps,
        "deaths": deaths, "most_folders": most, "overrides": more, "wrong": wrong, "machine": cpu_name(),
        "versions": versions(),
    }  # fmt: skip


def table(results: list[dict]) -> str:
    """How often what happened, in Markdown."""
    kinds = [
        "one rank",
        "all ranks",
        "data worker",
        "in a save",
        "in a save in the background",
        "pruning",
        "exporting",
    ]
    kinds += ["SIGTERM", "SIGUSR1"]
    rows = [f"| recipe | trainer | seed | steps | deaths | {' | '.join(kinds)} | folders, at most | in the end |"]
    rows.append("|---" * (len(kinds) + 7) + "|")
    for result in results:
        came = [death["kind"].partition(",")[0] for death in result["deaths"]]
        end = "; ".join(sentence.splitlines()[0] for sentence in result["wrong"]) or "equal to the bit"
        counts = [str(came.count(kind)) for kind in kinds]
        names = (result["recipe"], f"`{result['trainer']}`")
        cells = [*names, *(str(result[key]) for key in ("seed", "num_steps")), str(len(came)), *counts]
        rows.append(f"| {' | '.join([*cells, str(result['most_folders']), end])} |")
    first = results[0]
    packages = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return "\n".join([*rows, "", f"Two ranks. {first['machine']}; {packages}."])


def read_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainer", choices=TRAINERS, nargs="+", default=["train_fsdp2"])
    parser.add_argument("--keep", type=Path, help="leave the runs there; a folder that is not there yet")
    parser.add_argument("--json", type=Path, help="write what happened there; other recipes and trainers in it stay")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    parser.add_argument("--from", dest="source", type=Path, help="a JSON that is there, instead of runs")
    parser.add_argument("--check", type=Path, help="exit with 1 if this page has another table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    found = parser.parse_args()
    if found.deaths < 1:
        parser.error(f"--deaths {found.deaths} must be at least 1.")
    if found.keep and found.keep.exists() and any(found.keep.iterdir()):
        parser.error(f"--keep {found.keep} is not empty; the runs would go on from what is there.")
    return found


if __name__ == "__main__":
    asked = read_arguments()
    if asked.source:
        results = json.loads(asked.source.read_text())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (asked.keep or Path(scratch)).absolute()
            results = [main(folder / name, name, asked.deaths, asked.seed, asked.overrides) for name in asked.trainer]
    if asked.json:
        new, known = results, json.loads(asked.json.read_text()) if asked.json.exists() else []
        done = [(result["recipe"], result["trainer"]) for result in new]
        results = [result for result in known if (result["recipe"], result["trainer"]) not in done] + new
        asked.json.write_text(json.dumps(results, indent=1) + "\n")
    if asked.table:
        write_table(asked.table, "kill_anywhere", table(results))
    if asked.check and (text := asked.check.read_text()) != with_table(text, "kill_anywhere", table(results)):
        sys.exit(f"error: {asked.check}: its table is not the one of {asked.source}; write it: --table.")
    sys.exit(any(result["wrong"] for result in results))
