# SPDX-License-Identifier: Apache-2.0
"""The search for the largest model, with made-up memory; runs with made-up ranks; and one real run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import largest_model  # noqa: E402


# In place of torchrun: three Python processes and one of another program, then what a run leaves.
WHOLE_RUN = """
import json, subprocess, sys, time
from pathlib import Path
folder = Path(next(word for word in sys.argv if word.startswith("logger.log_dir=")).partition("=")[2])
ranks = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
compiler = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
time.sleep(3)
for step, seconds in ((1, 50.0), (2, 4.0)):
    line = {"kind": "train", "loss": 3.0, "num_tokens": 100 * step, "step_time_s": seconds}
    with (folder / "metrics.jsonl").open("a") as lines:
        print(json.dumps(line), file=lines)
(folder / "run.json").write_text(json.dumps({"num_parameters": 7}))
"""
# Ends when asked to, unlike its rank, whose number it writes down.
STUBBORN_RANK = """
import subprocess, sys, time
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
rank = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE)
rank.stdout.readline()
open(PATH, "w").write(str(rank.pid))
time.sleep(600)
"""
# The script itself, but for torchrun.
DRIVER = """
import runpy, sys
sys.path.insert(0, HERE)
import scaling_ranks
scaling_ranks.torchrun = lambda num_ranks: [sys.executable, "-c", FAKE]
sys.argv = ["largest_model.py", "--quick", "--output", OUTPUT, "--limit-gib=0.1"]
runpy.run_path(f"{HERE}/largest_model.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def much_memory(monkeypatch):
    monkeypatch.setattr(largest_model, "free_gib", lambda: 64.04)


def made_up(fixed_gib, layer_gib, more_gib=0.0, most=10**9):
    """In place of `train`; `more_gib` is what the line does not tell; more layers than `most` are killed."""

    def train(asked, num_layers):
        peak = fixed_gib + layer_gib * num_layers + (more_gib if num_layers > max(asked.depths) else 0.0)
        found = {
            "num_layers": num_layers,
            "num_parameters": 20_000_000 * num_layers,
            "peak_gib": peak,
            "tokens_per_second": 10.0,
            "losses": [3.0, 3.0],
        }
        return found if num_layers <= most else dict.fromkeys(found) | {"num_layers": num_layers}

    return train


@pytest.mark.parametrize(
    ("memory", "largest"),
    [
        ((2.1, 0.3), 59),
        ((2.1, 0.3, 0.9), 56),
        ((2.1, 0.3, -0.9), 62),
        ((2.004, 0.3), 59),
        ((15.0, 0.4), 12),
        ((19.0, 0.3), 3),
        ((2.1, 0.3, 0.0, 58), 58),
        ((2.1, 0.3, 0.0, 40), 40),
        ((2.1, 0.3, 0.0, 17), 17),
        ((2.1, 0.3, 0.0, 1), 1),
    ],
    ids=[
        "as the line says", "more than it says", "less than it says", "not rounded", "fewest", "fewer", "killed above",
        "killed far below the line", "second killed", "all but one killed",
    ],
)  # fmt: skip
def test_the_deepest_that_fits(memory, largest, tmp_path, monkeypatch):
    monkeypatch.setattr(largest_model, "train", made_up(*memory))
    output, page = tmp_path / "numbers.json", tmp_path / "page.md"
    assert largest_model.main([f"--output={output}", f"--table={page}"]) == 0
    fitting = {run["num_layers"]: largest_model.fits(run, 20) for run in json.loads(output.read_text())["runs"]}
    assert max(layers for layers, fit in fitting.items() if fit) == largest
    assert fitting[largest + 1] is False and len(fitting) <= 9
    assert f"| **{largest}** | **{20 * largest:,}** |" in page.read_text()
    assert "| memory, GiB: sum of the processes' peaks |" in page.read_text()
    check = ["--from", str(output), "--check", str(page)]
    assert largest_model.main(check) == 0
    page.write_text(page.read_text().replace(f"**{largest}**", f"**{largest + 1}**"))
    assert largest_model.main(check) == 1


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        ((30.01, 0.3), "--limit-gib 20: no depth fits; 30.4 would do."),
        ((2.0, 0.3, 0.0, 0), "--limit-gib 20: no depth fits; one layer runs out of memory."),
        ((2.0, -0.01), "33 layers took 1.67 GiB, no more than 12 layers"),
    ],
    ids=["too little", "all killed", "no line"],
)
def test_nothing_is_found(memory, reason, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(largest_model, "train", made_up(*memory))
    assert largest_model.main([f"--output={tmp_path}/numbers.json"]) == 1
    assert f"error: {reason}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_failure_leaves_docs_as_they_were(monkeypatch, capsys, tmp_path):
    def train(asked, num_layers):
        if num_layers > 33:
            raise largest_model.Failed("third run")
        return made_up(2.0, 0.3)(asked, num_layers)

    monkeypatch.setattr(largest_model, "train", train)
    monkeypatch.setattr(largest_model, "OUTPUT", tmp_path / "numbers.json")
    assert largest_model.main([f"--table={tmp_path}/page.md"]) == 1
    assert "error: third run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_is_measured():
    asked = largest_model.read_arguments(["--quick", "--output=x.json", "dataset.max_seq_length=64"])
    run = largest_model.train(asked, 2)
    assert run["num_parameters"] < 7_500_000 and 2.5 < run["losses"][-1] < 4
    assert 0.5 < run["peak_gib"] < 8 and run["tokens_per_second"] > 0


def one_run(monkeypatch, command, *arguments):
    """`train` with another command in place of torchrun."""
    monkeypatch.setattr(largest_model, "torchrun", lambda num_ranks: command)
    return largest_model.train(largest_model.read_arguments(["--quick", "--output=x.json", *arguments]), 5)


def test_what_counts(monkeypatch):
    watched, order = [], []
    memory = largest_model.Memory
    monkeypatch.setattr(largest_model, "Memory", lambda pid: watched.append(memory(pid)) or watched[0])
    monkeypatch.setattr(largest_model, "cpp_available", order.append)
    run = one_run(monkeypatch, [sys.executable, "-c", WHOLE_RUN])
    assert order == [16]  # the kernels were compiled, and for heads of so many channels
    assert len(watched[0].seen) == 4 and len(watched[0].peaks) == 3 and run["peak_gib"] == sum(watched[0].peaks)
    assert run["tokens_per_second"] == 25  # of the second step


def test_ranks_that_were_not_seen(monkeypatch):
    monkeypatch.setattr(largest_model, "NUM_RANKS", 3)
    with pytest.raises(largest_model.Failed, match="4 processes ran, but only 3 were seen"):
        one_run(monkeypatch, [sys.executable, "-c", WHOLE_RUN])


@pytest.mark.parametrize(
    ("stderr", "found"),
    [
        (
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
            True,
        ),
        ("OSError: [Errno 12] Cannot allocate memory", True),
        ("cannot allocate memory for thread-local data: ABORT", True),
        ("OSError: libgomp.so.1: cannot allocate memory in static TLS block", False),
        ("ValueError: memory", False),
    ],
)
def test_what_tells_of_no_memory(stderr, found):
    assert largest_model.out_of_memory(1, stderr) == found


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        ("import os, time; time.sleep(9 * (os.environ['RANK'] == '0')); os.kill(os.getpid(), 9)", None),
        ("raise RuntimeError('attention in layers_cpp.cpp failed: no memory is left, or oneDNN refuses')", None),
        ("import sys; sys.exit('error: dataset.max_seq_length=1 is too short.')", "error: dataset.max_seq_length=1"),
    ],
    ids=["killed", "no memory", "mistake"],
)
def test_a_rank_that_fails(rank, reason, monkeypatch, tmp_path):
    (tmp_path / "train_fsdp2.py").write_text(rank)
    monkeypatch.setattr(largest_model, "RECIPE", tmp_path)
    command = largest_model.torchrun(largest_model.NUM_RANKS)
    if reason:
        with pytest.raises(largest_model.Failed, match=f"5 layers: exit code 1: {reason}"):
            one_run(monkeypatch, command)
    else:
        assert not largest_model.fits(one_run(monkeypatch, command), 1e9)


def is_alive(pid):
    try:
        return largest_model.stat(pid)[0] != "Z"
    except OSError:
        return False


def wait_for(condition):
    """True once it holds; False if it never does."""
    for _ in range(1200):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_a_run_that_takes_too_long(monkeypatch, tmp_path):
    rank_id = tmp_path / "rank"
    with pytest.raises(largest_model.Failed, match=r"5 layers took longer than 5 s; give a longer --timeout\."):
        one_run(monkeypatch, [sys.executable, "-c", STUBBORN_RANK.replace("PATH", repr(str(rank_id)))], "--timeout=5")
    assert wait_for(lambda: not is_alive(rank_id.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stop_leaves_no_process(number, tmp_path):
    rank_id, output = tmp_path / "rank", tmp_path / "numbers.json"
    fake = STUBBORN_RANK.replace("PATH", repr(str(rank_id)))
    driver = DRIVER.replace("HERE", repr(str(HERE))).replace("FAKE", repr(fake)).replace("OUTPUT", repr(str(output)))
    command = [sys.executable, "-c", driver]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert wait_for(lambda: rank_id.exists() and rank_id.read_text())
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 128 + number and "Traceback" not in said and not output.exists()
    assert wait_for(lambda: not is_alive(rank_id.read_text()))


def test_a_process_and_all_below_it(monkeypatch, tmp_path):
    monkeypatch.setattr(largest_model, "PROC", tmp_path)
    for pid, parent in ((1, 0), (2, 1), (3, 1), (4, 3), (5, 0)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) name) S {parent} 0")
    for pid, broken in ((6, ""), (7, "7 (name) S one")):  # one that has just ended, and one that is not understood
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(broken)
    assert sorted(largest_model.family(1)) == [1, 2, 3, 4]
    for thread, children in ((1, "2 "), (9, "3 8 ")):  # a kernel with lists; 8 is gone
        (tmp_path / "1" / "task" / str(thread)).mkdir(parents=True)
        (tmp_path / "1" / "task" / str(thread) / "children").write_text(children)
    assert sorted(largest_model.family(1)) == [1, 2, 3, 4, 8]


def test_the_watcher_outlives_what_it_cannot_read(monkeypatch):
    looked = []

    def broken(pid):
        looked.append(pid)
        raise (ValueError, IndexError, OSError)[len(looked) % 3]

    monkeypatch.setattr(largest_model, "stat", broken)
    memory = largest_model.Memory(os.getpid())
    assert wait_for(lambda: len(looked) > 6) and memory.is_alive()
    memory.over.set()
    memory.join()


@pytest.mark.parametrize(
    "override",
    [
        "num_train_steps=3", "micro_batches_per_step=4", "model_tag=esm2_t4_1M", "model_kwargs.hidden_size=48",
        "model_kwargs={num_hidden_layers: 3}", "logger.log_dir=x", "checkpoint.ckpt_dir=x", "+validation.max_rows=3",
        "precision=fp32", "use_activation_checkpointing=false", "dataset.token_micro_batch_size=9",
        "dataset.micro_batch_size=9", "dataset={num_workers: 3}",
    ],
)  # fmt: skip
def test_what_the_benchmark_sets_itself(override, capsys):
    with pytest.raises(SystemExit, match="2"):
        largest_model.read_arguments([override])
    assert f"{override}: the benchmark sets that itself" in capsys.readouterr().err.splitlines()[-1]


def test_data_may_be_others():
    given = ["dataset.load_dataset_kwargs.data_files=x", "dataset.max_seq_length=99"]
    assert largest_model.read_arguments(given).overrides == given


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--limit-gib", "-3"], "above 0"),
        (["--limit-gib", "nan"], "--limit-gib nan must be a number of GiB above 0"),
        (["--limit-gib", "inf"], "--limit-gib inf must be a number of GiB above 0"),
        (["--limit-gib", "1e9"], "--limit-gib 1e+09 is more than the 64.0 GiB of memory that are available here; "
                                 "give at most --limit-gib 64,"),
        (["--timeout", "0"], "at least 1"),
        (["--quick"], "--output"),
        (["--check", "page.md"], "--from"),
        (["--from", "nowhere.json"], "no such file"),
    ],
)  # fmt: skip
def test_what_it_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        largest_model.main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux")
def test_memory_of_this_machine(monkeypatch):
    monkeypatch.undo()
    assert 0 < largest_model.free_gib() < 1e6
