# SPDX-License-Identifier: Apache-2.0
"""From a user's file to batches: sources, cleaning, crops, clusters, and a loader that resumes."""

import gzip
import hashlib
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from common.contract.ranks import content, excess_chi_square, run_ranks
from common.open_data import Column
from dataset import (
    CLS,
    EOS,
    VOCABULARY,
    ClusterRows,
    SequenceRows,
    TrainLoader,
    crop,
    describe_cleaning,
    tokenize,
)


RECIPE = Path(__file__).parents[1]
RESIDUES = "LAGVSERTIDPKQNFYMHWC"


def random_proteins(num: int, longest: int = 120, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return ["M" + "".join(random.choice(list(RESIDUES), random.integers(1, longest))) for _ in range(num)]


PROTEINS = random_proteins(60)


def write(folder: Path, kind: str, sequences: list[str | None] = PROTEINS, stem: str = "proteins") -> dict:
    """Write the sequences as such a file; the `load_dataset_kwargs` that read it."""
    path = folder / f"{stem}.{kind}"
    rows = {
        "id": [f"p{i}" for i in range(len(sequences))],
        "sequence": sequences,
        "length": list(range(len(sequences))),
    }
    if kind == "parquet":
        pq.write_table(pa.table(rows), path, row_group_size=7)  # several chunks
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.table(rows).schema) as writer:
            writer.write_table(pa.table(rows), max_chunksize=7)
    elif kind == "csv":
        datasets.Dataset.from_dict(rows).to_csv(path)
    elif kind == "json":
        path.write_text(
            "\n".join(json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True))
        )
    else:  # lines of 30 residues, each ended as on Windows
        lines = [f">p{i} a protein\r\n" + "".join(f"{s[j : j + 30]}\r\n" for j in range(0, len(s), 30))
                 for i, s in enumerate(sequences)]  # fmt: skip
        with gzip.open(path, "wt", newline="") if kind == "fasta.gz" else path.open("w", newline="") as file:
            file.writelines(lines)
    return {"path": kind.removesuffix(".gz"), "data_files": str(path), "split": "train"}


def make_loader(distributed, load_dataset_kwargs: dict, seed: int = 1, packed: bool = True, **options) -> TrainLoader:
    defaults = {"token_micro_batch_size": 256, "max_seq_length": 100, "num_workers": 0, "window_rows": 16}
    if options.get("micro_batch_size"):
        defaults["token_micro_batch_size"] = None
    return TrainLoader(distributed, seed, packed, 1, load_dataset_kwargs=load_dataset_kwargs, **defaults | options)


def read(loader: TrainLoader, num: int) -> list[tuple]:
    return [content(batch) for batch in islice(loader, num)]


def sequences_of(batch_content: tuple) -> list[str]:
    """The residues of a packed batch as they were before the masks."""
    *_, inputs = batch_content
    tokens = [t if label == -100 else label for t, label in zip(inputs["input_ids"], inputs["labels"], strict=True)]
    ends = np.cumsum(inputs["seq_lens"])
    framed = [tokens[end - n : end] for n, end in zip(inputs["seq_lens"], ends, strict=True)]
    assert all((s[0], s[-1]) == (CLS, EOS) for s in framed)
    return ["".join(VOCABULARY[t] for t in s[1:-1]) for s in framed]


def read_epochs(loader: TrainLoader, num: int) -> list[list[str]]:
    """The sequences of so many epochs."""
    epochs = [[] for _ in range(num)]
    for batch in loader:
        if batch.name[0] >= num:
            return epochs
        epochs[batch.name[0]] += sequences_of(content(batch))
    raise AssertionError("a loader never ends")


# ---- sources


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "json", "fasta", "fasta.gz"])
def test_every_kind_of_file_gives_the_same_sequences(distributed, tmp_path, kind, streaming):
    loader = make_loader(distributed, write(tmp_path, kind) | {"streaming": streaming}, max_seq_length=256)
    for epoch in read_epochs(loader, 2):
        assert Counter(epoch) == Counter(PROTEINS)
    assert loader.note is None


CLEAN = "".join(f">p{i} Böhm\n{s[:50]}\n{s[50:]}\n" for i, s in enumerate(PROTEINS))
MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        CLEAN.replace("\n", "\r\n").encode(),
        CLEAN.replace("\n", "\r").encode(),
        CLEAN.encode("latin-1"),
        MARK + CLEAN.encode(),
        MARK + CLEAN[: CLEAN.index(">p9")].encode() + MARK + CLEAN[CLEAN.index(">p9") :].encode(),
        CLEAN.replace("\n", "  \t\n\n").encode(),
        CLEAN.rstrip().encode(),
        CLEAN.replace(" Böhm", "").replace(">p", ">"),
        "".join(f">\n{s.lower()}\n" for s in PROTEINS),
        ">first\n>second\n\n" + CLEAN + ">last",
        "; a comment\n\n" + CLEAN,
        gzip.compress(CLEAN.encode("latin-1")),
    ],
    ids=["CRLF", "CR", "Latin-1", "mark", "two files put together", "spaces and blank lines", "no last line end",
         "short headers", "no headers", "empty records", "comment", "gzip"],
)  # fmt: skip
def test_odd_fasta_gives_the_clean_files_sequences(distributed, tmp_path, content, streaming):
    path = tmp_path / "odd.fasta"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kwargs = {"path": "fasta", "data_files": str(path), "split": "train", "streaming": streaming}
    (epoch,) = read_epochs(make_loader(distributed, kwargs, max_seq_length=256), 1)
    assert Counter(epoch) == Counter(PROTEINS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind, content",
    [("fasta", b">a\nMK\xf6VL\n>b\nMK\xc3\xb6VL\n"), ("csv", "sequence\r\nMKöVL\r\nMK\u2028VL\r\n".encode())],
)
def test_a_sign_beyond_ascii_is_one_unknown_residue(distributed, tmp_path, kind, content, streaming):
    (tmp_path / "a").write_bytes(content)
    kwargs = {"path": kind, "data_files": str(tmp_path / "a"), "split": "train", "streaming": streaming}
    loader = make_loader(distributed, kwargs)
    assert read_epochs(loader, 1) == [["MKXVL"] * 2]
    assert loader.note == "in the first 2 sequences: 2 unknown signs (read as X)"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows_among_others(distributed, tmp_path, streaming):
    files = [write(tmp_path, "parquet", rows, f"s{i}")["data_files"] for i, rows in enumerate((["MKV"], [], ["MKL"]))]
    kwargs = {"path": "parquet", "data_files": files, "split": "train", "streaming": streaming}
    assert [sorted(e) for e in read_epochs(make_loader(distributed, kwargs), 2)] == [["MKL", "MKV"]] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("declared", [True, False], ids=["as text", "as bytes"])
def test_parquet_whose_bytes_are_no_utf8(distributed, tmp_path, declared, streaming):
    column = pa.array([b"MKVL", b"MK\xf6VL", None])
    if declared:
        column = pa.StringArray.from_buffers(3, *column.buffers()[1:], column.buffers()[0], 1)
    pq.write_table(pa.table({"sequence": column}), tmp_path / "a.parquet")
    kwargs = {"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train", "streaming": streaming}
    assert [sorted(e) for e in read_epochs(make_loader(distributed, kwargs), 2)] == [["MKVL", "MKXVL"]] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "fasta", "fasta.gz"])
def test_a_changed_file_is_read_anew(distributed, tmp_path, kind, streaming):
    kwargs = write(tmp_path, kind, ["MKVL", "MKVA"]) | {"streaming": streaming}
    assert sorted(read_epochs(make_loader(distributed, kwargs), 1)[0]) == ["MKVA", "MKVL"]
    write(tmp_path, kind, ["MKVL", "MKVC"])  # as long as before
    assert sorted(read_epochs(make_loader(distributed, kwargs), 1)[0]) == ["MKVC", "MKVL"]
    write(tmp_path, kind, ["MKVL", "MKVLAG"])  # longer: its index is another one too
    assert sorted(read_epochs(make_loader(distributed, kwargs), 1)[0]) == ["MKVL", "MKVLAG"]


@pytest.mark.parametrize("how", ["list", "pattern", "by split", "from Hydra"])
def test_several_files(distributed, tmp_path, how):
    files = [write(tmp_path, "parquet", PROTEINS[i::2], f"part_{i}")["data_files"] for i in range(2)]
    given = {"pattern": f"{tmp_path}/part_*.parquet", "by split": {"train": files}}.get(how, files)
    kwargs = {"path": "parquet", "data_files": given, "split": "train"}
    loader = make_loader(distributed, OmegaConf.create(kwargs) if how == "from Hydra" else kwargs, max_seq_length=256)
    assert Counter(read_epochs(loader, 1)[0]) == Counter(PROTEINS)


def test_the_column_is_named(distributed, tmp_path):
    pq.write_table(pa.table({"sequence": ["AAAA"] * 3, "chain": ["MKV", "MKL", "MKI"]}), tmp_path / "a.parquet")
    kwargs = {"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train"}
    assert sorted(read_epochs(make_loader(distributed, kwargs, sequence_column="chain"), 1)[0]) == [
        "MKI",
        "MKL",
        "MKV",
    ]


def test_a_column_is_read_by_row(tmp_path):
    rows = datasets.load_dataset(**write(tmp_path, "arrow"))
    assert len(rows.data.column("sequence").chunks) > 1
    places = np.array([59, 0, 7, 6, 33, 7, 58])
    assert Column(rows, "sequence")[places].to_pylist() == [PROTEINS[i] for i in places]


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_rows_are_skipped(distributed, tmp_path, streaming):
    sequences = [None if i % 4 == 0 else "-*" if i % 4 == 1 else s for i, s in enumerate(PROTEINS)]
    kwargs = write(tmp_path, "parquet", sequences) | {"streaming": streaming}
    loader = make_loader(distributed, kwargs, max_seq_length=256, window_rows=60)
    assert Counter(read_epochs(loader, 1)[0]) == Counter(s for i, s in enumerate(PROTEINS) if i % 4 > 1)
    assert loader.note == (
        "in the first 60 sequences: 15 gaps (dropped), 15 stops (dropped at the end, X inside), "
        "30 empty sequences (skipped)"
    )


# ---- cleaning


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer  # not at the top: ranks import this file, and it takes a second

    return AutoTokenizer.from_pretrained(RECIPE / "tokenizer", local_files_only=True)


def test_tokens_are_those_of_esms_tokenizer(tokenizer):
    sequences = [*random_proteins(100, seed=1), "LAGVSERTIDPKQNFYMHWCXBUZO", "M"]
    tokens = crop([tokenize(s.encode()) for s in sequences], np.arange(len(sequences)), 1024, 0)
    assert [t.tolist() for t in tokens] == tokenizer(sequences)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(33)] == VOCABULARY


@pytest.mark.parametrize(
    "written, read_as",
    [
        ("mkVl", "MKVL"),
        ("xbuzo", "XBUZO"),
        ("--MK-V.A..", "MKVA"),
        ("MKV*", "MKV"),
        ("MKV**\n", "MKV"),
        ("MKV*--", "MKV"),
        ("MK*V*", "MKXV"),
        ("MKJV1?V", "MKXVXXV"),
        ("MK V\tAL\r\nGG\r\n", "MKVALGG"),
        ("*", ""),
        (" -.*\r\n", ""),
        ("", ""),
    ],
)
def test_the_rule_for_other_signs(written, read_as):
    assert list(tokenize(written.encode())) == [VOCABULARY.index(letter) for letter in read_as]


def test_what_is_cleaned_is_counted():
    sequences = [b"MKVL", b"mkVL", b"M-K.V", b"MK*V*", b"MJK1", b"", b"--", b"MK V\r\n"]
    assert describe_cleaning(sequences) == (
        "in the first 8 sequences: 2 lower-case letters (read as upper case), 4 gaps (dropped), 2 stops (dropped at "
        "the end, X inside), 2 unknown signs (read as X), 2 empty sequences (skipped)"
    )
    assert describe_cleaning([b"MKVLXBUZO", b"MK V\r\n"]) is None


# ---- crops

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"  # 25 different ones: the first one tells where a crop begins
LONG = tokenize(LETTERS.encode())


def test_crops_start_anywhere_with_equal_chance():
    tokens = np.stack(crop([LONG] * 20_000, np.arange(20_000), 12, 1, 0))
    assert tokens.shape == (20_000, 12) and (tokens[:, 0] == CLS).all() and (tokens[:, -1] == EOS).all()
    assert (np.diff(tokens[:, 1:-1], axis=1) == 1).all()  # a stretch of the sequence, whose letters are tokens 4 .. 28
    starts = tokens[:, 1] - 4
    assert (starts.min(), starts.max()) == (0, 15)  # both ends are seen
    assert excess_chi_square(np.bincount(starts, minlength=16), 20_000 / 16, 15) < 5


def test_crops_are_new_each_epoch_and_belong_to_the_seed():
    rows = np.arange(1000)
    first, again, next_epoch, other_seed = (
        np.stack(crop([LONG] * 1000, rows, 12, *k)) for k in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert np.array_equal(first, again)
    for other in (next_epoch, other_seed):
        assert (first[:, 1] == other[:, 1]).mean() == pytest.approx(1 / 16, abs=0.03)


def test_crops_of_a_row_do_not_depend_on_its_company():
    together = crop([LONG] * 50, np.arange(50), 12, 1, 0)
    alone = [crop([LONG], np.array([row]), 12, 1, 0)[0] for row in range(50)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("length", [1, 9, 10, 11])
def test_only_longer_sequences_are_cropped(length):
    (tokens,) = crop([LONG[:length]], np.array([3]), 12, 1, 0)
    assert len(tokens) == min(length, 10) + 2
    if length <= 10:
        assert tokens.tolist() == [CLS, *range(4, 4 + length), EOS]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_loader_crops_anew_each_epoch(distributed, tmp_path, streaming):
    kwargs = write(tmp_path, "parquet", [LETTERS] * 40) | {"streaming": streaming}
    epochs = read_epochs(make_loader(distributed, kwargs, max_seq_length=12), 3)
    assert all({len(s) for s in epoch} == {10} and len(epoch) == 40 for epoch in epochs)
    assert len({s for epoch in epochs for s in epoch}) == 16
    assert epochs[0] != epochs[1] != epochs[2]


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
        assert all(r in tokenize(PROTEINS[i].encode()) for r, i in zip(residues, micro_batch.rows, strict=True))


SCRIPT = """
import sys
from pathlib import Path

print("script", flush=True)
sys.path[:0] = sys.argv[1:3]
from test_dataset import content, make_loader, read, write

from common.distributed import process_group

if __name__ == "__main__":
    with process_group(seed=0) as distributed:
        kwargs = write(Path.cwd(), "parquet")
        batches = [read(make_loader(distributed, kwargs, num_workers=n), 5) for n in (0, 2)]
        print("equal" if batches[0] == batches[1] else "not equal")
"""


def test_workers_need_neither_the_script_nor_the_working_folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "datasets.py").write_text("raise SystemExit('not the library')")
    command = [sys.executable, str(tmp_path / "script.py"), str(RECIPE), str(RECIPE / "tests")]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n") == ["script", "equal", ""], done.stderr[-4000:]


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path

sys.path[:0] = [".", "tests"]
from test_dataset import make_loader, write

from common.distributed import process_group

if __name__ == "__main__":
    with process_group(seed=0) as distributed:
        batches = iter(make_loader(distributed, write(Path(sys.argv[1]), "parquet"), num_workers=2))
        next(batches)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_rank_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)]
    with (tmp_path / "told").open("w") as told:  # a pipe would stay open for as long as a worker lives
        done = subprocess.run(command, cwd=RECIPE, env=environment, stdout=told, timeout=300)
    workers = [int(pid) for pid in (tmp_path / "told").read_text().split()]
    assert done.returncode == -signal.SIGKILL and len(workers) == 2
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
        assert len(json.dumps(loader.state_dict())) < (2000 if streaming else 100)
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
    results = run_ranks(tmp_path / "ranks", two_ranks_read, 2, kwargs, 40, 7)
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


# ---- clusters


CLUSTERS = [[f"c{c}_m{m}" for m in range(1 + c % 4)] for c in range(40)]
MEMBERS = dict(zip([m for members in CLUSTERS for m in members], random_proteins(100, 40, seed=9), strict=True))


def write_clusters(folder: Path, table: str = "protein", left_out: str | None = None) -> dict:
    """40 clusters of one to four members, as BioNeMo 2 has them."""
    columns = {"ur50_id": [members[0] for members in CLUSTERS], "ur90_id": CLUSTERS}
    pq.write_table(pa.table(columns), folder / "clusters.parquet")
    with sqlite3.connect(folder / "a #1 database.db") as connection:
        connection.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY, sequence TEXT)")
        rows = [(key, value) for key, value in MEMBERS.items() if key != left_out]
        connection.executemany(f"INSERT INTO {table} VALUES (?, ?)", rows)
    connection.close()
    kwargs = {"path": "parquet", "data_files": str(folder / "clusters.parquet"), "split": "train"}
    return {"load_dataset_kwargs": kwargs, "protein_database": str(folder / "a #1 database.db")}


def clusters_of(sequences: list[str]) -> list[str]:
    ids = {sequence: key for key, sequence in MEMBERS.items()}
    return sorted((ids[s].split("_")[0] for s in sequences), key=lambda c: int(c[1:]))


def test_an_epoch_shows_one_member_of_each_cluster(distributed, tmp_path):
    given = write_clusters(tmp_path)
    epochs = read_epochs(make_loader(distributed, **given), 50)
    for epoch in epochs:
        assert clusters_of(epoch) == [f"c{c}" for c in range(40)]
    assert {s for epoch in epochs for s in epoch} == set(MEMBERS.values())  # in time all members
    assert epochs[:5] == read_epochs(make_loader(distributed, **given), 5)
    assert epochs[:5] != read_epochs(make_loader(distributed, **given, seed=2), 5)


def test_members_have_equal_chances(distributed, tmp_path):
    source = make_loader(distributed, **write_clusters(tmp_path)).plan.source
    rows = np.arange(3, 40, 4)  # those of four members
    draws = Counter(s.decode() for epoch in range(300) for s in source.sequences(rows, epoch))
    counts = np.array([draws[MEMBERS[m]] for row in rows for m in CLUSTERS[row]])
    assert excess_chi_square(counts, 75, 3 * len(rows)) < 5


def test_a_column_of_single_ids(distributed, tmp_path):
    (epoch,) = read_epochs(make_loader(distributed, **write_clusters(tmp_path), cluster_column="ur50_id"), 1)
    assert Counter(epoch) == Counter(MEMBERS[members[0]] for members in CLUSTERS)


def test_clusters_in_workers(distributed, tmp_path):
    given = write_clusters(tmp_path)
    assert read(make_loader(distributed, **given, num_workers=2), 12) == read(make_loader(distributed, **given), 12)


def test_a_source_in_use_can_be_sent_to_a_worker(distributed, tmp_path):
    source = make_loader(distributed, **write_clusters(tmp_path)).plan.source
    assert isinstance(source, ClusterRows) and source.connection is not None
    sent, rows = pickle.loads(pickle.dumps(source)), np.arange(40)
    assert sent.sequences(rows, 3) == source.sequences(rows, 3)
    assert sent.sizes(rows, 3).tolist() == source.sizes(rows, 3).tolist()


def test_empty_clusters_are_skipped_and_many_ids_found(distributed, tmp_path):
    given = write_clusters(tmp_path)
    lists = [[], None, *CLUSTERS * 30]  # more ids than one query of SQLite takes
    pq.write_table(pa.table({"ur90_id": lists}), tmp_path / "clusters.parquet")
    (epoch,) = read_epochs(make_loader(distributed, **given, window_rows=5000), 1)
    assert len(epoch) == 1200


@pytest.mark.parametrize(
    "change, told",
    [
        ({"protein_database": "/none/x.db"}, ["dataset.protein_database=/none/x.db", "no such file"]),
        ({"protein_database": __file__}, [f"dataset.protein_database={__file__}", "not an SQLite file"]),
        ({"table": "proteins"}, ["a #1 database.db", "table protein(id, sequence)"]),
        ({"left_out": "c7_m0"}, ["a #1 database.db", "no protein has the id c7_m0"]),
        ({"cluster_column": "cluster"}, ["dataset.cluster_column=cluster", "ur50_id, ur90_id"]),
        ({"cluster_column": "size"}, ["dataset.cluster_column=size", "int64"]),
        ({"streaming": True}, ["dataset.protein_database", "streaming=false"]),
    ],
)
def test_mistakes_with_clusters(distributed, tmp_path, change, told):
    given = write_clusters(tmp_path, **{k: change.pop(k) for k in ("table", "left_out") if k in change})
    if change.get("cluster_column") == "size":
        pq.write_table(pa.table({"size": [1, 2]}), tmp_path / "clusters.parquet")
    if change.pop("streaming", False):
        given["load_dataset_kwargs"]["streaming"] = True
    check_told(told, lambda: read_epochs(make_loader(distributed, **given | change), 8))


# ---- mistakes


def check_told(told: list[str], action) -> None:
    """One sentence with these parts in it."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert all(part in message for part in told), message
    assert "\n" not in message


def missing(folder):
    return {"path": "parquet", "data_files": str(folder / "none.parquet"), "split": "train"}


def empty_file(folder):
    (folder / "x.parquet").touch()
    return {"path": "parquet", "data_files": str(folder / "x.parquet"), "split": "train"}


def unreadable(folder):
    (folder / "x.parquet").write_text("no parquet\n" * 9)
    return {"path": "parquet", "data_files": str(folder / "x.parquet"), "split": "train"}


def no_rows(folder):
    return write(folder, "parquet", [])


def header_only(folder):
    (folder / "x.csv").write_text("id,sequence\n")
    return {"path": "csv", "data_files": str(folder / "x.csv"), "split": "train"}


def not_fasta(folder):
    (folder / "x.fasta").write_text("no records\n")
    return {"path": "fasta", "data_files": str(folder / "x.fasta"), "split": "train"}


def not_json(folder):
    (folder / "x.json").write_text("{no json}\n")
    return {"path": "json", "data_files": str(folder / "x.json"), "split": "train"}


def all_empty(folder):
    return write(folder, "parquet", ["", "--", "*", " "])


def good(folder):
    return write(folder, "parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "data, options, told",
    [
        (missing, {}, ["dataset.load_dataset_kwargs.data_files=", "none.parquet", "no such file"]),
        (empty_file, {}, ["dataset.load_dataset_kwargs.data_files=", "x.parquet", "empty"]),
        (unreadable, {}, ["dataset.load_dataset_kwargs", "x.parquet", "cannot load"]),
        (not_json, {}, ["dataset.load_dataset_kwargs", "x.json", "cannot load"]),
        (no_rows, {}, ["dataset.load_dataset_kwargs", "proteins.parquet"]),
        (header_only, {}, ["dataset.load_dataset_kwargs", "x.csv"]),
        (not_fasta, {}, ["dataset.load_dataset_kwargs", "x.fasta"]),
        (all_empty, {}, ["dataset", "first 4 sequences are all empty"]),
        (good, {"sequence_column": "seq"}, ["dataset.sequence_column=seq", "id, sequence, length"]),
        (good, {"sequence_column": "length"}, ["dataset.sequence_column=length", "int64"]),
        (good, {"micro_batch_size": 4, "token_micro_batch_size": 256}, ["dataset.micro_batch_size=4", "=256"]),
        (good, {"token_micro_batch_size": None}, ["dataset.micro_batch_size=None", "token_micro_batch_size=None"]),
        (good, {"token_micro_batch_size": 99}, ["dataset.token_micro_batch_size=99", "dataset.max_seq_length=100"]),
        (good, {"max_seq_length": 2}, ["dataset.max_seq_length=2"]),
        (good, {"mlm_probability": 1.5}, ["dataset.mlm_probability=1.5"]),
        (good, {"window_rows": 0}, ["dataset.window_rows=0"]),
    ],
)
def test_mistakes_are_one_sentence(distributed, tmp_path, data, options, told, streaming):
    kwargs = data(tmp_path) | {"streaming": streaming}
    check_told(told, lambda: make_loader(distributed, kwargs, **options))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"split": None}, ["dataset.load_dataset_kwargs.split", "train"]),
        ({"split": "test"}, ["dataset.load_dataset_kwargs", "test"]),
        ({"data_files": None}, ["dataset.load_dataset_kwargs.data_files", "path=parquet"]),
        ({"path": "nobody/nothing", "data_files": None}, ["dataset.load_dataset_kwargs", "nobody/nothing"]),
        ({"colour": 1}, ["dataset.load_dataset_kwargs", "colour"]),
    ],
)
def test_mistakes_in_what_is_loaded(distributed, tmp_path, change, told):
    check_told(told, lambda: make_loader(distributed, good(tmp_path) | change))


def test_a_stream_whose_later_rows_are_all_empty_does_not_spin(distributed, tmp_path):
    """The first file has sequences and the second none: worker 1 says so, where it would look for one for ever."""
    kwargs = [write(tmp_path, "parquet", rows, f"s{i}") for i, rows in enumerate((PROTEINS[:9], ["-"] * 9))]
    files = {"data_files": [k["data_files"] for k in kwargs], "streaming": True}
    loader = make_loader(distributed, kwargs[0] | files, num_workers=2)
    with pytest.raises(ValueError, match="no rows for rank 0, worker 1"):
        read(loader, 50)


# ---- real proteins


@pytest.mark.parametrize("budget", [4096, 16384])
def test_an_epoch_of_real_proteins(distributed, real_proteins, budget):
    kwargs = {"path": "parquet", "data_files": real_proteins, "split": "train"}
    options = {"token_micro_batch_size": budget, "max_seq_length": 1024, "window_rows": 10_000}
    lengths = [len(s) for s in pq.read_table(real_proteins).column("sequence").to_pylist()]
    seq_lens, num_batches = [], 0
    for batch in make_loader(distributed, kwargs, **options):
        if batch.name[0] == 1:
            break
        assert batch.counts["tokens"] <= budget
        seq_lens += batch.inputs["seq_lens"]
        num_batches += 1
    assert sorted(seq_lens) == sorted(min(n + 2, 1024) for n in lengths)
    assert sum(seq_lens) / (num_batches * budget) >= 0.99
