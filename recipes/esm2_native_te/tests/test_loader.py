# SPDX-License-Identifier: Apache-2.0
"""A loader over a plan and over a stream: the same batches on any layout, and a state to resume from."""

import hashlib
import json
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from protein_files import (
    PROTEINS,
    make_loader,
    random_proteins,
    read,
    read_epochs,
    sequences_of,
    write,
    write_clusters,
)

from common import loader
from common.batch import Batch
from common.contract.ranks import call_on_ranks, content
from dataset import ALPHABET, SequenceRows


RECIPE = Path(__file__).parents[1]


# ---- the loader, map-style

DIGESTS = {
    "tokens": "99994675f88b1052",
    "rows": "5e61cf04d23b690b",
    "a stream": "019c1e6c4637a412",
    "clusters": "06575729ea2c0f63",
}


def expected(distributed, kwargs: dict, num: int, **options) -> list[tuple]:
    return read(make_loader(distributed, kwargs, **options), num)


def test_padded_and_packed_read_the_same(distributed, tmp_path):
    kwargs = write(tmp_path, "parquet")
    packed, padded = (list(islice(make_loader(distributed, kwargs, packed=p), 30)) for p in (True, False))
    assert [(b.name, b.counts) for b in packed] == [(b.name, b.counts) for b in padded]
    lengths = [b.inputs["attention_mask"].sum(1).tolist() for b in padded]
    assert [b.inputs["seq_lens"] for b in packed] == lengths


def test_budget_and_order(distributed, tmp_path):
    kwargs = write(tmp_path, "parquet")
    batches = list(islice(make_loader(distributed, kwargs), 40))
    assert all(batch.num_slots == batch.counts["tokens"] <= 256 for batch in batches)
    assert batches[-1].name[0] > 0  # past the end of an epoch
    other_seed = make_loader(distributed, kwargs, seed=2)
    assert [sequences_of(content(b)) for b in batches] != [sequences_of(c) for c in read(other_seed, 40)]
    rows = list(islice(make_loader(distributed, kwargs, micro_batch_size=4), 15))
    assert [len(batch.inputs["seq_lens"]) for batch in rows] == [4] * 15


@pytest.mark.parametrize("before, after", [(0, 2), (2, 0)])
def test_workers_do_not_matter_and_neither_does_a_stop(distributed, tmp_path, before, after):
    """The same batches to the bit, read in one go or saved by one number of workers and resumed by another."""
    kwargs = write(tmp_path, "parquet")
    whole = expected(distributed, kwargs, 45)
    assert {name[0] for name, *_ in whole} == {0, 1, 2}
    first = make_loader(distributed, kwargs, num_workers=before)
    assert read(first, 13) == whole[:13]
    state = json.loads(json.dumps(first.state_dict()))
    second = make_loader(distributed, kwargs, num_workers=after)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert read(second, 32) == whole[13:]


@pytest.mark.parametrize("num_read", [0, 1, 4, 5, 6, 16, 17])
def test_resume_at_the_edges_of_windows_and_epochs(distributed, tmp_path, num_read):
    kwargs = write(tmp_path, "parquet")
    whole = expected(distributed, kwargs, 40)
    first = make_loader(distributed, kwargs)
    read(first, num_read)
    second = make_loader(distributed, kwargs)
    second.load_state_dict(first.state_dict())
    assert read(second, 20) == whole[num_read : num_read + 20]


@pytest.mark.parametrize("how", ["tokens", "rows", "a stream", "clusters"])
def test_batches_are_what_they_have_always_been(distributed, tmp_path, how):
    """Their digests from before windows were read by workers: a change here changes the curve of every run."""
    odd = [f"{s[:40]}-*j{s[40:].lower()}*" if i % 3 else None if i % 2 else s * 4 for i, s in enumerate(PROTEINS)]
    if how == "clusters":
        loader = make_loader(distributed, **write_clusters(tmp_path))
    else:
        size = {"micro_batch_size": 4} if how == "rows" else {}
        kwargs = write(tmp_path, "parquet", odd) | {"streaming": how == "a stream"}
        loader = make_loader(distributed, kwargs, packed=how != "rows", **size)
    batches = []
    for name, counts, num_slots, inputs in read(loader, 40):  # as they were written then
        kept = {key: value for key, value in inputs.items() if key not in ("seq_lens", "selected")}
        seq_lens = [sum(row) for row in inputs["attention_mask"]] if how == "rows" else inputs["seq_lens"]
        batches.append((*map(repr, (name, seq_lens, counts["labels"], num_slots)), sorted(kept.items())))
    assert batches[-1][0] > "(1,"  # past an epoch
    assert hashlib.sha256(repr(batches).encode()).hexdigest()[:16] == DIGESTS[how]


def test_each_row_is_read_once(distributed, tmp_path, monkeypatch):
    read_rows, read_them = [], SequenceRows.sequences
    loader = make_loader(distributed, write(tmp_path, "parquet"))

    def counting(source, rows, epoch):
        read_rows.extend((epoch, row) for row in rows.tolist())
        return read_them(source, rows, epoch)

    monkeypatch.setattr(SequenceRows, "sequences", counting)
    assert len(read_epochs(loader, 2)) == 2
    first = len(loader.plan.window(2, 0)[0].rows)
    assert Counter(epoch for epoch, _ in read_rows) == {0: 60, 1: 60, 2: first}  # to plan a window, none is read
    assert len(set(read_rows)) == len(read_rows)


def test_rows_of_an_earlier_window_are_read_again(distributed, tmp_path):
    plan = make_loader(distributed, write(tmp_path, "parquet")).plan
    before, after = plan.window(0, 0)[0], plan.window(0, 1)[0]
    for micro_batch in (after, before):
        residues = [bytes(t[1:-1]) for t in plan.source.read(micro_batch.rows, 0)]
        assert all(
            r in ALPHABET.tokenize(PROTEINS[i].encode()) for r, i in zip(residues, micro_batch.rows, strict=True)
        )


SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path

print("script", flush=True)
sys.path[:0] = sys.argv[1:3]
from protein_files import make_loader, read, write

from common.distributed import process_group

if __name__ == "__main__":
    with process_group(seed=0) as distributed:
        kwargs = write(Path.cwd(), "parquet")
        expected, batches = read(make_loader(distributed, kwargs), 5), make_loader(distributed, kwargs, num_workers=2)
        print("equal" if expected == read(batches, 5) else "not equal")
        going = iter(batches)
        next(going)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_need_neither_script_nor_working_folder_and_do_not_outlive_a_rank_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "datasets.py").write_text("raise SystemExit('not the library')")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(tmp_path / "script.py"), str(RECIPE), str(RECIPE / "tests")]
    with (tmp_path / "printed").open("w") as printed, (tmp_path / "errors").open("w") as errors:
        # A pipe would stay open for as long as a worker lives.
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=environment, stdout=printed, stderr=errors, timeout=300
        )
    *words, last = (tmp_path / "printed").read_text().splitlines()
    assert words == ["script", "equal"], (tmp_path / "errors").read_text()[-4000:]
    workers = [int(pid) for pid in last.split()]
    assert done.returncode == -signal.SIGKILL and len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Large:
    """A collator of batches that no pipe holds."""

    def __call__(self, sample: dict) -> Batch:
        return Batch({"text": "x" * 2_000_000}, sample["name"], {"rows": 1}, 1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_is_killed_while_it_sends_is_not_waited_for(distributed, tmp_path, capfd, num_workers):
    built = make_loader(distributed, write(tmp_path, "parquet"), num_workers=num_workers)
    others = multiprocessing.active_children()  # of tests before, which end when they are collected
    batches = iter(loader.Loader(distributed, "dataset", built.plan, Large(), num_workers))
    next(batches)
    time.sleep(0.5)  # it has begun to send the next one, and waits for a reader
    next(process for process in multiprocessing.active_children() if process not in others).kill()
    found = []

    def go_on():
        try:
            found.extend(next(batches).name for _ in range(20))
        except RuntimeError as error:
            found.append(str(error))

    reading = threading.Thread(target=go_on, daemon=True)
    reading.start()
    reading.join(30)
    assert not reading.is_alive() and "exited unexpectedly" in found[-1]
    assert "dataset: a data worker was killed, perhaps for lack of memory." in capfd.readouterr().err


# ---- the loader, streaming


@pytest.fixture
def shards(tmp_path) -> dict:
    """120 proteins in four files, read as a stream."""
    files = [write(tmp_path, "parquet", random_proteins(30, seed=i), f"s{i}")["data_files"] for i in range(4)]
    return {"path": "parquet", "data_files": files, "split": "train", "streaming": True}


@pytest.mark.parametrize(
    "num_workers, stops", [(0, [1, 5, 9, 30, 60]), (2, [36, 38])]
)  # there worker 1 is an epoch ahead
def test_a_stream_resumes_exactly(distributed, shards, num_workers, stops):
    whole = expected(distributed, shards, 80, num_workers=num_workers)
    assert {name[0] for name, *_ in whole} >= {0, 1}
    seen = Counter(s for batch in whole if batch[0][0] == 0 for s in sequences_of(batch))
    assert sum(seen.values()) == 120 and max(seen.values()) == 1
    for stop in stops:
        first = make_loader(distributed, shards, num_workers=num_workers)
        assert read(first, stop) == whole[:stop]
        second = make_loader(distributed, shards, num_workers=num_workers)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert read(second, 80 - stop) == whole[stop:]  # over the ends of epochs


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "json", "fasta", "fasta.gz"])
def test_a_stream_of_every_kind_resumes(distributed, tmp_path, kind):
    kwargs = write(tmp_path, kind) | {"streaming": True}
    whole = expected(distributed, kwargs, 25)
    first, second = (make_loader(distributed, kwargs) for _ in range(2))
    read(first, 9)
    second.load_state_dict(first.state_dict())
    assert read(second, 16) == whole[9:]


def test_a_stream_refuses_another_layout(distributed, shards):
    loader = make_loader(distributed, shards)
    read(loader, 3)
    state = loader.state_dict()
    assert state["layout"] == {"num_ranks": 1, "num_workers": 0}
    other = make_loader(distributed, shards, num_workers=2)
    with pytest.raises(ValueError) as error:
        other.load_state_dict(state)
    assert "'num_workers': 0" in str(error.value) and "'num_workers': 2" in str(error.value)
    assert "dataset.load_dataset_kwargs.streaming=false" in str(error.value)


def test_a_stream_has_no_more_workers_than_files(distributed, shards):
    assert make_loader(distributed, shards, num_workers=2).num_workers == 2
    one_file = shards | {"data_files": shards["data_files"][0]}
    assert make_loader(distributed, one_file, num_workers=30).num_workers == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_the_state_stays_small(distributed, tmp_path, streaming):
    """No rows in it, only places; whatever the window and however far."""
    kwargs = write(tmp_path, "parquet", PROTEINS * 100) | {"streaming": streaming}
    loader = make_loader(distributed, kwargs, window_rows=2000, token_micro_batch_size=2048)
    batches = iter(loader)
    for place in (0, 30, 150):
        for _ in range(place):
            next(batches)
        assert len(json.dumps(loader.state_dict())) < (2000 if streaming else 300)
    assert loader.last_name[0] or loader.last_name[-2] > 0  # past the first window


def two_ranks_read(distributed, load_dataset_kwargs: dict, num: int, stop: int) -> dict:
    """What this rank reads in one go, and what is left after a stop."""
    first, whole = (make_loader(distributed, load_dataset_kwargs) for _ in range(2))
    results = {"whole": read(whole, num), "first": read(first, stop), "state": first.state_dict()}
    second = make_loader(distributed, load_dataset_kwargs)
    second.load_state_dict(json.loads(json.dumps(results["state"])))
    return results | {"second": read(second, num - stop)}


@pytest.mark.parametrize("streaming", [True, False])
def test_two_ranks(distributed, tmp_path, shards, streaming):
    kwargs = shards | {"streaming": streaming}
    results = call_on_ranks(tmp_path / "ranks", two_ranks_read, 2, kwargs, 40, 7)
    for result in results:
        assert result["first"] + result["second"] == result["whole"]
    alone = make_loader(distributed, kwargs)
    if streaming:  # each rank has its own half of the files
        seen = Counter(s for r in results for batch in r["whole"] if batch[0][0] == 0 for s in sequences_of(batch))
        assert sum(seen.values()) == 120 and max(seen.values()) == 1
        assert results[0]["state"] == results[1]["state"]
        with pytest.raises(ValueError, match="'num_ranks': 2"):
            alone.load_state_dict(results[0]["state"])
    else:  # the ranks take turns in one plan, and one rank goes on where two stopped
        whole = expected(distributed, kwargs, 80)
        assert [batch for pair in zip(*(r["whole"] for r in results), strict=True) for batch in pair] == whole
        for result in results:
            alone = make_loader(distributed, kwargs)
            alone.load_state_dict(result["state"])
            assert read(alone, 20) == whole[14:34]


def test_a_long_folder_for_temporary_files_does_not_stop_workers(tmp_path, monkeypatch):
    """The sockets of `multiprocessing` lie in it, and their names have 107 bytes at most."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 25)))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    loader._keep_sockets_short()
    assert len(multiprocessing.util.get_temp_dir()) < 70
    assert tempfile.gettempdir() == str(tmp_path / ("long" * 25))


def test_another_stream_is_refused(distributed, tmp_path):
    first, second = (
        make_loader(distributed, write(tmp_path, "parquet", rows, name) | {"streaming": True})
        for name, rows in (("a", PROTEINS), ("b", PROTEINS[::-1]))
    )
    state = first.state_dict()
    first.load_state_dict(state)
    with pytest.raises(ValueError, match="the stream is not what the checkpoint was made with, its first rows differ"):
        second.load_state_dict(state)


def test_sizes_are_kept_where_the_data_is(distributed, tmp_path):
    make_loader(distributed, write(tmp_path, "parquet") | {"cache_dir": str(tmp_path / "cache")})
    assert len(list((tmp_path / "cache" / "row_sizes").iterdir())) == 1
