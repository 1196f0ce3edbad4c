# SPDX-License-Identifier: Apache-2.0
"""Ranks agree: on sums, on a user's mistake, and on who goes first."""

import io
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from common.batch import Batch
from common.contract.ranks import call_on_ranks
from common.contract.running import RECIPE, TINY, environment
from common.distributed import Distributed, passes_per_step, process_group, shorten_waits


def ranks(num_ranks: int, group_size: int = 1) -> Distributed:
    return Distributed(0, 0, num_ranks, torch.device("cpu"), group_size=group_size)


@pytest.mark.parametrize(
    "micro_batches, num_ranks, passes", [(None, 4, 1), (1, 1, 1), (6, 1, 6), (4, 4, 1), (8, 4, 2), (12, 2, 6)]
)
def test_passes_per_step(micro_batches, num_ranks, passes):
    assert passes_per_step(micro_batches, ranks(num_ranks)) == passes


@pytest.mark.parametrize(
    "micro_batches, num_ranks, works",
    [(6, 4, "4 or 8 would"), (9, 2, "8 or 10 would"), (1, 4, "; 4 would"), (0, 2, "; 2 would"), (-3, 2, "; 2 would")],
)
def test_a_number_that_does_not_divide(micro_batches, num_ranks, works):
    with pytest.raises(ValueError) as error:
        passes_per_step(micro_batches, ranks(num_ranks))
    assert f"micro_batches_per_step={micro_batches} " in str(error.value)
    assert works in str(error.value)


def test_ranks_that_share_a_micro_batch_count_as_one():
    assert passes_per_step(6, ranks(4, group_size=2)) == 3
    with pytest.raises(ValueError, match="=3 does not divide by the 2 groups of 2 ranks; 2 or 4 would"):
        passes_per_step(3, ranks(4, group_size=2))


def test_a_group_of_one_needs_no_launcher(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for _ in range(2):  # and leaves nothing behind
        with process_group(seed=5) as alone:
            assert (alone.rank, alone.local_rank, alone.num_ranks, alone.is_main) == (0, 0, 1, True)
            assert alone.sum(1, 2.5) == [1, 2.5]
            assert torch.initial_seed() == 5
            with alone.main_first(), alone.fail_together():
                pass
        assert not torch.distributed.is_initialized()


def test_a_mistake_of_the_only_rank(distributed, capsys):
    with pytest.raises(SystemExit) as stopped, distributed.fail_together(), distributed.main_first():
        raise ValueError("dataset.x=1:\n no.")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: dataset.x=1: no.\n"


@pytest.mark.parametrize(
    "trainer, override, code", [("train_fsdp2", "num_train_steps=1", 0), ("train_ddp", "seed=x", 2)]
)
def test_python_is_not_taken_down_under_the_threads_of_gloo(trainer, override, code, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\n"
        "class Kept:\n"
        "    def __del__(self, write=os.write): write(1, b', taken down')\n"
        "kept = Kept()\n"
        "atexit.register(os.write, 1, b'exit functions')\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(RECIPE)))}

    def ended(*command):
        done = subprocess.run([sys.executable, *command], cwd=RECIPE, env=environment() | paths, capture_output=True)
        return done.returncode, done.stdout.decode()

    assert ended("-c", "") == (0, "exit functions, taken down")
    assert ended(f"{trainer}.py", *TINY, override, f"logger.log_dir={tmp_path}") == (code, "exit functions")


@pytest.mark.parametrize(
    "end, code, message",
    [("1 + 1", 0, ""), ("sys.exit(3)", 3, ""), ("sys.exit()", 0, ""), ("sys.exit('why')", 1, "why\n")],
)
def test_a_process_ends_as_its_block_does(end, code, message):
    script = "import sys\nfrom common.distributed import end_of_process\nprint('before')\n"
    script += f"with end_of_process(): {end}"
    done = subprocess.run([sys.executable, "-c", script], cwd=RECIPE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "before\n", message)


# ---- three ranks


def mistaken(where: str, failing: tuple, distributed: Distributed) -> tuple:
    """The exit code and what is printed when these ranks fail, in a start-up like that of the training scripts."""
    printed, code = io.StringIO(), None
    with redirect_stderr(printed):
        try:
            with distributed.fail_together():
                if where == "block" and distributed.rank in failing:
                    raise ValueError(f"rank {distributed.rank} is mistaken")
                with distributed.main_first():
                    if where == "main_first" and distributed.rank in failing:
                        raise ValueError(f"rank {distributed.rank} is mistaken")
                with distributed.main_first():  # as the validator has another one
                    pass
        except SystemExit as stopped:
            code = stopped.code
    return code, printed.getvalue()


CASES = [(), (0,), (1,), (0, 1, 2), (2,)]


def on_three_ranks(distributed: Distributed, folder) -> dict:
    rank = distributed.rank
    results = {"sum": distributed.sum(rank, 0.1, 2.0**52 + rank)}
    batches = [Batch({}, (5 + rank, 0, i), {"structures": 2 + rank, "atoms": 10**12}, 9) for i in range(1 + rank)]
    results["counts"] = [distributed.sum_counts(batches, stop=rank in stopped) for stopped in ((), (1,), (0, 1, 2))]
    results["gathered"] = distributed.gather(f"of rank {rank}")
    results["max"] = distributed.max(-1.0 - rank)
    results["main_first"] = [mistaken("main_first", failing, distributed) for failing in CASES]
    node = replace(distributed, local_rank=distributed.rank % 2)  # ranks 0 and 2 each lead a node
    results["two_nodes"] = [mistaken("main_first", failing, node) for failing in CASES]
    results["block"] = [mistaken("block", failing, distributed) for failing in ((), (0, 1, 2))]
    with distributed.main_first():
        if distributed.is_main:
            time.sleep(0.3)
            (folder / "cache").write_text("written once")
        results["cache"] = (folder / "cache").read_text()
    return results


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return call_on_ranks(folder, on_three_ranks, 3, folder)


def test_sums_are_of_all_ranks_and_exact(three_ranks):
    for result in three_ranks:
        assert result["sum"] == [3, pytest.approx(0.3, rel=1e-15), 3 * 2.0**52 + 3]


def test_counts_are_of_all_ranks_the_epoch_of_the_first_and_all_stop_when_one_is_asked_to(three_ranks):
    counts = {"structures": 2 + 2 * 3 + 3 * 4, "atoms": 6 * 10**12}
    for result in three_ranks:
        assert result["counts"] == [(counts, 5, False), (counts, 5, True), (counts, 5, True)]


def test_what_each_rank_gives_and_the_largest(three_ranks):
    for result in three_ranks:
        assert (result["gathered"], result["max"]) == (["of rank 0", "of rank 1", "of rank 2"], -1.0)


def test_groups_that_do_not_divide_the_ranks():
    with pytest.raises(ValueError, match="cp_size=4 does not divide the 6 ranks; 1, 2, 3, 6 would"):
        ranks(6).in_groups("cp_size", 4)


def test_main_goes_first(three_ranks):
    assert [result["cache"] for result in three_ranks] == ["written once"] * 3


@pytest.mark.parametrize("nodes", ["main_first", "two_nodes"])
@pytest.mark.parametrize("case, failing", list(enumerate(CASES)))
def test_all_ranks_stop_when_one_is_mistaken(three_ranks, nodes, case, failing):
    expected = (2, f"error: rank {failing[0]} is mistaken\n") if failing else (None, "")
    message = [result[nodes][case] for result in three_ranks]
    assert message[0] == expected
    assert message[1:] == [(expected[0], "")] * 2  # only rank 0 says so


def test_a_mistake_that_all_make_is_told_once(three_ranks):
    assert [result["block"] for result in three_ranks] == [
        [(None, ""), (2, "error: rank 0 is mistaken\n" if rank == 0 else "")] for rank in range(3)
    ]


def test_gpus_wait_for_minutes_and_cpus_for_hours():
    """NCCL is not here; what is asked of its group is."""
    asked = []
    group = SimpleNamespace(
        _get_backend=lambda device: SimpleNamespace(_set_default_timeout=lambda t: asked.append((device.type, t)))
    )
    shorten_waits(group, torch.device("cpu"))
    assert asked == []
    shorten_waits(group, torch.device("cuda", 0))
    assert asked == [("cuda", timedelta(minutes=20))]
