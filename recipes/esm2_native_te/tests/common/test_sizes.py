# SPDX-License-Identifier: Apache-2.0
"""The index of sizes: measured once, by all ranks of a node together, kept, and the same as a direct measurement."""

import errno
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from common import sizes
from common.batch import Batch
from common.contract.ranks import call_on_ranks
from common.epoch_plan import EpochPlan, Grouping
from common.loader import Loader
from common.sizes import size_index


NUM_ROWS = 47
SIZES = np.random.default_rng(0).integers(0, 1000, NUM_ROWS)
# Rows of none to four members.
MEMBERS = [np.random.default_rng(row).integers(1, 1000, row % 5) for row in range(NUM_ROWS)]


class Measure:
    """Remembers the rows that it was asked for; each time with rows from `fails_at` on, it raises `error` instead."""

    def __init__(self, fails_at: int = NUM_ROWS, error: BaseException | None = None, values: np.ndarray = SIZES):
        self.rows, self.fails_at, self.error, self.values = [], fails_at, error, values

    def __call__(self, rows):
        if rows[-1] >= self.fails_at:
            raise self.error
        self.rows += rows.tolist()
        return self.values[rows], None


class MeasureMembers(Measure):
    def __call__(self, rows):
        self.rows += rows.tolist()
        some = [MEMBERS[row] for row in rows]
        return np.concatenate(some), np.array([len(members) for members in some])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and chunks of five rows."""
    use(tmp_path, monkeypatch)
    return tmp_path / "row_sizes"


def use(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    patch.setattr(sizes, "CHUNK", 5)


def build(distributed, key: str | None = "key", measure: Measure | None = None, num_rows: int = NUM_ROWS):
    """The index, and the rows that were measured for it."""
    measure = measure or Measure()
    return size_index(distributed, "dataset", key, num_rows, measure), measure.rows


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- what it says


@pytest.mark.parametrize("chunk", [1, 5, 46, 47, 1000])
@pytest.mark.parametrize("key", ["key", None], ids=["kept", "in memory"])
def test_sizes_are_those_of_a_direct_measurement(distributed, cache, monkeypatch, key, chunk):
    monkeypatch.setattr(sizes, "CHUNK", chunk)
    index, measured = build(distributed, key)
    assert measured == list(range(NUM_ROWS))  # each row once
    assert index.sizes.dtype == np.int32 and index.sizes.tolist() == SIZES.tolist()
    assert index.offsets is None


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("key", ["key", None], ids=["kept", "in memory"])
def test_members_are_found_by_their_row(distributed, cache, monkeypatch, key, chunk):
    monkeypatch.setattr(sizes, "CHUNK", chunk)
    index, measured = build(distributed, key, MeasureMembers())
    assert measured == list(range(NUM_ROWS))
    assert len(index.offsets) == NUM_ROWS + 1 and index.offsets.dtype == np.int64
    for row, members in enumerate(MEMBERS):
        assert index.sizes[index.offsets[row] : index.offsets[row + 1]].tolist() == members.tolist()


def test_rows_held_in_memory_leave_nothing(distributed, cache):
    first, second = build(distributed, None), build(distributed, None)
    assert first[1] == second[1] == list(range(NUM_ROWS))
    assert not cache.exists()


# ---- what is kept


@pytest.mark.parametrize("kind", [Measure, MeasureMembers])
def test_a_second_start_measures_nothing(distributed, cache, kind):
    first, _ = build(distributed, measure=kind())
    arrays = ["key/offsets.npy"] if kind is MeasureMembers else []
    assert files(cache) == ["key", *arrays, "key/sizes.npy"]  # and nothing else
    second, measured = build(distributed, measure=kind())
    assert measured == []
    assert second.sizes.tolist() == first.sizes.tolist()
    assert kind is Measure or second.offsets.tolist() == first.offsets.tolist()


def test_another_key_is_measured_by_itself(distributed, cache):
    build(distributed)
    other, measured = build(distributed, "other", Measure(values=SIZES[::-1]))
    assert measured == list(range(NUM_ROWS)) and other.sizes.tolist() == SIZES[::-1].tolist()
    assert build(distributed)[0].sizes.tolist() == SIZES.tolist()


@pytest.mark.parametrize("fails_at", [0, 22, NUM_ROWS - 1])
def test_a_killed_build_goes_on_from_its_chunks(distributed, cache, fails_at):
    with pytest.raises(KeyboardInterrupt):
        build(distributed, measure=Measure(fails_at, KeyboardInterrupt()))
    assert not (cache / "key").exists()
    for parts in cache.glob(".*"):
        (parts / f".{fails_at}.npz.half").write_bytes(b"PK\x03\x04")  # killed while it wrote one
    index, measured = build(distributed)
    assert measured == list(range(fails_at // 5 * 5, NUM_ROWS))
    assert index.sizes.tolist() == SIZES.tolist()
    assert files(cache) == ["key", "key/sizes.npy"]


def test_chunks_of_another_length_are_not_taken_up(distributed, cache, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        build(distributed, measure=Measure(22, KeyboardInterrupt()))
    monkeypatch.setattr(sizes, "CHUNK", 7)
    assert build(distributed)[0].sizes.tolist() == SIZES.tolist()


def test_a_build_killed_as_it_was_put_together_measures_nothing_again(distributed, cache, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        build(distributed)
    index, measured = build(distributed)
    assert measured == [] and index.sizes.tolist() == SIZES.tolist()
    assert files(cache) == ["key", "key/sizes.npy"]


def test_a_faster_node_with_the_same_folder(distributed, cache, monkeypatch):
    """The other has put the index together, and removed the chunks, while this one was about to."""
    real = sizes.join

    def overtaken(parts, num_parts, target):
        real(parts, num_parts, target)
        real(parts, num_parts, target)

    monkeypatch.setattr(sizes, "join", overtaken)
    assert build(distributed)[0].sizes.tolist() == SIZES.tolist()
    assert files(cache) == ["key", "key/sizes.npy"]


# ---- a cache that cannot be written


def refusal(distributed) -> str:
    with pytest.raises(ValueError) as error:
        build(distributed)
    message = str(error.value)
    assert message.startswith("dataset: the cache ") and "\n" not in message
    assert "set HF_HOME or HF_DATASETS_CACHE to a folder that can" in message
    return message


def test_a_file_where_the_folder_should_be(distributed, cache):
    cache.write_text("")
    assert f"the cache {cache} cannot be written" in refusal(distributed)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_the_right_to_write(distributed, cache):
    cache.parent.chmod(0o500)
    assert "(Permission denied)" in refusal(distributed)


@pytest.mark.parametrize(("place", "function"), [(np, "savez"), (np.lib.format, "write_array_header_1_0")])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_fails_while_it_is_built(distributed, cache, monkeypatch, place, function, number):
    def fails(*arguments, **named):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(place, function, fails)
        assert f"({os.strerror(number)})" in refusal(distributed)
    assert build(distributed)[0].sizes.tolist() == SIZES.tolist()


def test_an_index_that_is_there_needs_no_right_to_write(distributed, cache, monkeypatch):
    build(distributed)

    def fails(*arguments, **named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for place, name in ((np, "savez"), (np, "save"), (Path, "mkdir"), (Path, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(place, name, fails)
    assert build(distributed)[1] == []


# ---- ranks and workers


def on_ranks(distributed, folder: Path, kind: type, mistaken: bool) -> dict:
    """Build it, twice; which rows this rank measured, and what it then has. First once with a mistake, if asked to."""
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        first, message = kind(), None
        if mistaken:
            wrong = Measure(10, ValueError(f"rank {distributed.rank} is mistaken"))
            with pytest.raises(ValueError) as error:
                build(distributed, measure=wrong)
            message = str(error.value)
        index, measured = build(distributed, measure=first)
        again = build(distributed, measure=kind())[1]
        offsets = None if index.offsets is None else index.offsets.tolist()
        return {"measured": measured, "again": again, "sizes": index.sizes.tolist(), "offsets": offsets,
                "message": message, "before": wrong.rows if mistaken else []}  # fmt: skip


@pytest.mark.parametrize("kind", [Measure, MeasureMembers])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_out_the_chunks(distributed, tmp_path, cache, num_ranks, kind):
    alone, _ = build(distributed, "alone", kind())
    results = call_on_ranks(tmp_path / "ranks", on_ranks, num_ranks, tmp_path, kind, False)
    for rank, result in enumerate(results):
        assert result["measured"] == [row for row in range(NUM_ROWS) if row // 5 % num_ranks == rank]
        assert result["again"] == []
        assert result["sizes"] == alone.sizes.tolist()
        assert result["offsets"] == (None if alone.offsets is None else alone.offsets.tolist())
    assert files(cache / "key") == [f"{name}.npy" for name in ("offsets", "sizes")[kind is Measure :]]


def test_a_mistake_on_one_rank_is_raised_on_all_and_what_was_measured_is_kept(tmp_path, cache):
    """Both fail at their second chunk: the first rank's sentence is the one that all have."""
    results = call_on_ranks(tmp_path / "ranks", on_ranks, 2, tmp_path, Measure, True)
    assert [result["message"] for result in results] == ["rank 0 is mistaken"] * 2
    assert sorted(row for result in results for row in result["before"]) == list(range(10))
    assert sorted(row for result in results for row in result["measured"]) == list(range(10, NUM_ROWS))
    assert all(result["sizes"] == SIZES.tolist() for result in results)


def on_two_nodes(distributed, folder: Path) -> tuple[list[int], list[int], list[str]]:
    """Each rank is a node with a cache of its own, and the first one has the index already."""
    node = replace(distributed, local_rank=0, num_local_ranks=1)
    with pytest.MonkeyPatch.context() as patch:
        use(folder / f"node_{distributed.rank}", patch)
        if distributed.rank == 0:
            shutil.copytree(folder / "row_sizes", folder / "node_0" / "row_sizes")
        index, measured = build(node)
        left = files(folder / f"node_{distributed.rank}" / "row_sizes")
        return measured, index.sizes.tolist(), left


def test_a_node_that_has_the_index_measures_nothing(distributed, tmp_path, cache):
    build(distributed)
    first, second = call_on_ranks(tmp_path / "ranks", on_two_nodes, 2, tmp_path)
    assert (first[0], sorted(second[0])) == ([], list(range(NUM_ROWS)))
    for _, found, left in (first, second):
        assert found == SIZES.tolist() and left == ["key", "key/sizes.npy"]


@pytest.mark.parametrize("used", [False, True])
def test_workers_map_the_files(distributed, cache, used):
    num_rows = 100_000
    many = np.arange(num_rows, dtype=np.int32)
    sizes.CHUNK = num_rows  # put back by `cache`
    index, _ = build(distributed, measure=Measure(num_rows, values=many), num_rows=num_rows)
    if used:
        assert index.sizes[7] == 7
    sent = pickle.dumps(index)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert isinstance(received.sizes, np.memmap) and received.sizes.tolist() == many.tolist()
    assert isinstance(index.sizes, np.memmap)  # of this process too


def test_what_is_held_in_memory_is_sent_to_workers(distributed, cache):
    index, _ = build(distributed, None, MeasureMembers())
    received = pickle.loads(pickle.dumps(index))
    assert received.sizes.tolist() == index.sizes.tolist() and received.offsets.tolist() == index.offsets.tolist()


# ---- whether it is the same data


def test_other_data_of_equal_length_has_another_digest(distributed, cache):
    index, _ = build(distributed)
    other = SIZES.copy()
    other[[3, 40]] = other[[40, 3]]
    digests = {build(distributed, "other", Measure(values=other))[0].digest, index.digest}
    assert len(digests) == 2
    assert build(distributed, None)[0].digest == build(distributed)[0].digest == index.digest  # wherever it lies


def test_members_divided_in_another_way_have_another_digest(distributed, cache):
    def by(num_members):
        return lambda rows: (SIZES[:6], np.array(num_members))

    digests = {size_index(distributed, "dataset", None, 2, by(some)).digest for some in ([2, 4], [3, 3])}
    assert len(digests) == 2


class Source:
    """Rows by an index; what is read of one is its number."""

    def __init__(self, index):
        self.index = index
        self.identity = {"num_rows": len(index.sizes), "sizes": index.digest}

    def __len__(self):
        return len(self.index.sizes)

    def sizes(self, rows, epoch):
        return self.index.sizes[rows]

    def read(self, rows, epoch):
        return rows.tolist()


def as_batch(sample: dict) -> Batch:
    return Batch({"rows": sample["items"]}, sample["name"], {"rows": len(sample["items"])}, 1)


def test_a_resume_refuses_other_data(distributed, cache):
    def loader(index):
        return Loader(distributed, "dataset", EpochPlan(Source(index), Grouping(num_rows=4), 1, 20), as_batch, 0)

    first = loader(build(distributed)[0])
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state, expected = first.state_dict(), next(batches).inputs
    same = loader(build(distributed, None)[0])
    same.load_state_dict(state)
    assert next(iter(same)).inputs == expected
    as_long = loader(build(distributed, "other", Measure(values=SIZES[::-1]))[0])
    with pytest.raises(ValueError, match=r"not what the checkpoint was made with \(other sizes\), though"):
        as_long.load_state_dict(state)
    shorter = loader(build(distributed, "shorter", num_rows=40)[0])
    with pytest.raises(ValueError, match="made with 47 rows and the data now has 40"):
        shorter.load_state_dict(state)


def test_a_checkpoint_from_before_there_was_a_digest_goes_by_the_number_of_rows(distributed, cache):
    plan = EpochPlan(Source(build(distributed)[0]), Grouping(num_rows=4), 1, 20)
    loader = Loader(distributed, "dataset", plan, as_batch, 0)
    loader.load_state_dict({"position": [0, 1, 2], "num_rows": NUM_ROWS})
    assert next(iter(loader)).name == (0, 1, 2)
    with pytest.raises(ValueError, match="made with 48 rows and the data now has 47"):
        loader.load_state_dict({"position": [0, 1, 2], "num_rows": NUM_ROWS + 1})


@pytest.mark.parametrize("when", [0, 2, 4])
def test_another_run_may_finish_first_and_take_the_chunks_away(distributed, tmp_path, monkeypatch, when):
    monkeypatch.setattr(sizes.datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(sizes, "CHUNK", 10)
    asked = []

    def measure(rows):
        if len(asked) == when:  # what the end of the other run does
            asked.append("the other run")
            sizes.size_index(distributed, "dataset", "key", 45, lambda rows: (rows + 1, None))
        asked.append(rows)
        return rows + 1, None

    index = sizes.size_index(distributed, "dataset", "key", 45, measure)
    assert index.sizes.tolist() == list(range(1, 46))
