# SPDX-License-Identifier: Apache-2.0
"""Streams, tiny and long data, and files as people have them, through the trainers."""

import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from recorded import DATA, contents, proteins, record, seq_lens_of, sequences_of, write

from common.batch import Batch
from common.contract.running import RECIPE, TINY, curve, environment, meeting, metrics, run_here


PACKED = "use_sequence_packing=true"


@pytest.fixture
def read(monkeypatch) -> list[Batch]:
    return record(monkeypatch)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Callable]:
    """`two_ranks(folder, *overrides)` trains; for each rank what it read and how it ended. They start up only once."""
    context = multiprocessing.get_context("forkserver")
    ranks = [ProcessPoolExecutor(1, mp_context=context) for _ in range(2)]

    def run(folder: Path, *overrides: str) -> list[dict]:
        places = zip(ranks, meeting(len(ranks)), strict=True)
        ends = [pool.submit(_rank, variables, folder, overrides) for pool, variables in places]
        return [end.result(timeout=120) for end in ends]

    yield run
    for pool in ranks:
        pool.shutdown()


def _rank(variables: dict[str, str], folder: Path, overrides: tuple[str, ...]) -> dict:
    os.environ |= variables
    code, message = 0, StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(message):
        taken = record(patch)
        try:
            run_here("train_fsdp2", folder, *overrides)
        except SystemExit as stopped:
            code = stopped.code
    errors = [line for line in message.getvalue().splitlines() if "error" in line.lower()]
    return {"read": contents(taken), "code": code, "errors": errors}


def refused(ranks: list[dict]) -> str:
    """The one sentence with which all ranks end, printed by the first of them."""
    assert [(rank["code"], len(rank["errors"])) for rank in ranks] == [(2, 1), (2, 0)], ranks
    (message,) = ranks[0]["errors"]
    assert message.startswith("error: ")
    return message


# ---- streaming

STREAM = [f"{DATA}.streaming=true", "dataset.window_rows=5", "micro_batches_per_step=2", "num_train_steps=12"]
FILES = [proteins(n, seed=n) for n in (11, 6, 5, 2)]  # 24 rows


def saved(folder: Path) -> list[str]:
    return [f"checkpoint.ckpt_dir={folder}", "checkpoint.save_final_model=true"]


EVERY = ["checkpoint.save_every_n_steps=1", "checkpoint.max_to_keep=null"]


def tail(folder: Path, step: int) -> list[dict]:
    """What the trajectory decides of every line after `step`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("kind", "step", "loss", "grad_norm", "learning_rate", "num_tokens", "accuracy", "num_labels")
    return [{k: line.get(k) for k in keys} for line in lines if line["step"] > step]


def assert_resumes(start, whole: Path, parts: Path, step: int) -> None:
    """From the checkpoint of this step alone, the rest of the run is the same to the bit."""
    parts.mkdir()
    shutil.copytree(whole / f"step_{step}", parts / f"step_{step}")
    start(parts, *saved(parts))
    rest = tail(parts, 0)
    assert rest and rest == tail(whole, step)
    ends = [(folder / "final_model" / "model.safetensors").read_bytes() for folder in (whole, parts)]
    assert ends[0] == ends[1]


def assert_once_an_epoch(batches: list[Batch], files: list[list[str]], num_workers: int) -> None:
    """A worker reads the files that are its turn, each row once before any row again."""
    for worker in range(max(1, num_workers)):
        mine = [b for b in batches if b.name[2] == worker]
        expected = Counter(s for rows in files[worker :: max(1, num_workers)] for s in rows)
        epochs = [Counter(s for b in mine if b.name[0] == e for s in sequences_of(b)) for e in range(mine[-1].name[0])]
        assert epochs and all(epoch == expected for epoch in epochs)


@pytest.mark.parametrize(
    ("num_workers", "files", "stops"),
    [
        (0, FILES, [2, 3, 7]),
        pytest.param(0, [sum(FILES, [])], [8], marks=pytest.mark.slow),
        pytest.param(2, FILES, [3, 8], marks=pytest.mark.slow),
        (2, FILES[:3], [8]),  # worker 0 has two files, worker 1 one
    ],
)
def test_a_stream_stops_and_goes_to_the_bit(read, tmp_path, num_workers, files, stops):
    options = [write(tmp_path / "data", *files), *STREAM, f"dataset.num_workers={num_workers}"]
    whole = run_here("train_ddp", tmp_path / "whole", *options, *saved(tmp_path / "whole"), *EVERY)
    straight = contents(read)
    assert_once_an_epoch(read, files, num_workers)
    if len(stops) == 3:  # the places that matter: each window of five rows is three micro-batches
        before, after = ({step: straight[2 * step + place][0] for step in stops} for place in (-1, 0))
        assert (before[2], after[2]) == ((0, 0, 0, 1, 0), (0, 0, 0, 1, 1))  # inside a window
        assert (before[3], after[3]) == ((0, 0, 0, 1, 2), (0, 0, 0, 2, 0))  # between windows
        assert (before[7][0], after[7][0]) == (0, 1)  # between epochs
    for step in stops:
        read.clear()
        assert_resumes(
            lambda folder, *more: run_here("train_ddp", folder, *options, *more), whole, tmp_path / f"{step}", step
        )
        assert contents(read) == straight[2 * step :]


@pytest.mark.parametrize(
    ("files", "step"),
    [(FILES, 5), pytest.param(FILES[:3], 6, marks=pytest.mark.slow), pytest.param(FILES, 9, marks=pytest.mark.slow)],
)  # of three files each rank reads all, and takes every other row
def test_a_stream_on_two_ranks_stops_and_goes_to_the_bit(two_ranks, tmp_path, files, step):
    options = [write(tmp_path / "data", *files), *STREAM, "dataset.num_workers=1"]
    whole, ranks = tmp_path / "whole", []

    def start(folder, *more):
        ranks[:] = two_ranks(folder, *options, *more)

    start(whole, *saved(whole), *EVERY)
    straight = [rank["read"] for rank in ranks]
    first_epoch = [s for some in straight for name, sequences, _ in some if name[0] == 0 for s in sequences]
    assert Counter(first_epoch) == Counter(sum(files, []))
    assert_resumes(start, whole, tmp_path / "parts", step)
    assert [rank["read"] for rank in ranks] == [some[step:] for some in straight]  # one micro-batch a rank and step


def test_a_stream_goes_on_only_on_its_layout(two_ranks, tmp_path, capsys):
    options = [write(tmp_path / "data", *FILES), *STREAM, f"checkpoint.ckpt_dir={tmp_path}/ckpt"]
    run_here("train_ddp", tmp_path, *options, "num_train_steps=2")
    one, two = "'num_ranks': 1, 'num_workers': 0", "'num_ranks': 1, 'num_workers': 2"
    with pytest.raises(SystemExit) as stopped:
        run_here("train_ddp", tmp_path / "again", *options, "dataset.num_workers=2")
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("error: ") and one in message and two in message, message
    message = refused(two_ranks(tmp_path / "ranks", *options))
    assert one in message and "'num_ranks': 2, 'num_workers': 0" in message and "start again" in message


def test_a_stream_and_a_plan_do_not_go_on_from_each_other(tmp_path, capsys):
    options = [write(tmp_path / "data", *FILES), *STREAM, "checkpoint.allow_config_change=true"]
    for before, after in (("true", "false"), ("false", "true")):
        ckpt = [f"checkpoint.ckpt_dir={tmp_path}/{before}", f"{DATA}.streaming={before}"]
        run_here("train_ddp", tmp_path, *options, *ckpt, "num_train_steps=1")
        with pytest.raises(SystemExit) as stopped:
            run_here("train_ddp", tmp_path, *options, *ckpt, f"{DATA}.streaming={after}")
        message = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and f"error: {DATA}.streaming={after}, but the checkpoint" in message, message


def test_a_stream_with_fewer_rows_than_ranks_is_refused(two_ranks, tmp_path):
    message = refused(two_ranks(tmp_path, write(tmp_path, proteins(1)), f"{DATA}.streaming=true"))
    assert f"error: {DATA}.streaming=true: the stream has no row for worker 0 of rank 1; use fewer ranks" in message


@pytest.mark.parametrize(
    ("num_rows", "num_workers", "worker"), [([1, 1, 1], 2, 1), ([2, 2, 0, 1], 2, 1), ([0, 1, 2], 1, None)]
)
def test_a_stream_with_too_few_rows_for_the_workers(two_ranks, tmp_path, num_rows, num_workers, worker):
    """Three files: each rank reads all of them, and every other row. Four: it reads two, of which one is empty."""
    data = write(tmp_path / "data", *(proteins(n) for n in num_rows))
    options = [data, f"{DATA}.streaming=true", f"dataset.num_workers={num_workers}", "num_train_steps=1"]
    ranks = two_ranks(tmp_path, *options)
    if worker is None:
        assert [rank["code"] for rank in ranks] == [0, 0]
    else:
        assert f"worker {worker} of rank" in (message := refused(ranks)) and "num_workers than 2" in message, message


def test_a_worker_that_fails_ends_the_run(tmp_path):
    """The second file has rows and no residue: worker 1 says so, where it would look for one for ever."""
    data = write(tmp_path, proteins(9), ["-"] * 9)
    command = [sys.executable, "train_ddp.py", *TINY, data, f"{DATA}.streaming=true", "dataset.num_workers=2"]
    command += ["logger.log_dir=null", "validation.load_dataset_kwargs=null"]
    done = subprocess.run(command, cwd=RECIPE, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "no rows for rank 0, worker 1" in done.stderr


def test_a_stream_of_one_row(read, tmp_path):
    (row,) = rows = proteins(1)
    run_here("train_ddp", tmp_path, write(tmp_path / "data", rows), *STREAM, "dataset.num_workers=2")
    assert [sequences_of(batch) for batch in read] == [[row]] * 24


# ---- little data, long data, and epochs that end inside a step


def assert_layouts_agree(tmp_path: Path, read: list[Batch], data: str, *options: str, workers: bool = True) -> Path:
    """The same rows and, to rounding, the same curve, however the run is laid out; returns the first run's folder."""
    reference = run_here("train_ddp", tmp_path / "reference", data, *options)
    rows = [(batch.name, sequences_of(batch)) for batch in read]
    layouts = [[PACKED], [PACKED, "dataset.num_workers=2"]] if workers else [[PACKED]]
    for number, layout in enumerate(layouts):
        read.clear()
        other = run_here("train_fsdp2", tmp_path / f"{number}", data, *options, *layout)
        assert [(batch.name, sequences_of(batch)) for batch in read] == rows
        assert curve(other) == pytest.approx(curve(reference), rel=1e-5)
    return reference


@pytest.mark.parametrize(
    ("num_rows", "size"),
    [
        (1, "dataset.token_micro_batch_size=96"),
        (3, "dataset.micro_batch_size=2"),
        pytest.param(1, "dataset.micro_batch_size=2", marks=pytest.mark.slow),
        pytest.param(3, "dataset.token_micro_batch_size=96", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_many_epochs(read, tmp_path, num_rows, size):
    rows = proteins(num_rows, 45, 60)  # of these 96 tokens hold one
    data = write(tmp_path / "data", rows)
    options = [] if "token" not in size else ["dataset.micro_batch_size=null", "validation.micro_batch_size=2",
                                              "validation.token_micro_batch_size=null"]  # fmt: skip
    reference = assert_layouts_agree(tmp_path, read, data, size, *options, workers=num_rows == 3 and not options)
    micro_batches_an_epoch = num_rows if options else -(-num_rows // 2)
    epochs = 6 * 4 // micro_batches_an_epoch
    assert Counter(s for batch in read for s in sequences_of(batch)) == Counter(rows * epochs)
    assert {batch.name[0] for batch in read} == set(range(epochs))
    assert np.isfinite(metrics(reference, "train", "loss")).all()


@pytest.mark.parametrize("num_rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_of_many_epochs_on_two_ranks(two_ranks, tmp_path, num_rows):
    data = write(tmp_path / "data", proteins(num_rows))
    alone = curve(run_here("train_ddp", tmp_path / "one", data))
    layout = [PACKED, "dataset.num_workers=1"] if num_rows == 3 else []
    two_ranks(tmp_path / "two", data, *layout)
    assert curve(tmp_path / "two") == pytest.approx(alone, rel=1e-5)


def test_a_row_that_no_mask_falls_on(tmp_path):
    """Steps without a label have a loss of 0 and move nothing but the moments; no number is lost."""
    data = write(tmp_path / "data", ["M"])
    reference = run_here("train_ddp", tmp_path / "one", data, "dataset.micro_batch_size=1", "micro_batches_per_step=1")
    losses = metrics(reference, "train", "loss")
    assert 0.0 in losses and np.isfinite(losses).all()


def test_every_row_is_too_long(two_ranks, read, tmp_path):
    rows = proteins(9, 150, 400)
    data = write(tmp_path / "data", rows)
    alone = curve(assert_layouts_agree(tmp_path, read, data))
    assert {n for batch in read for n in seq_lens_of(batch)} == {96}
    assert all(any(s in row for row in rows) for batch in read for s in sequences_of(batch))
    two_ranks(tmp_path / "two", data, PACKED)
    assert curve(tmp_path / "two") == pytest.approx(alone, rel=1e-5)


def test_epochs_that_end_inside_a_step(read, tmp_path):
    """Seven rows are four micro-batches an epoch, and a step takes three."""
    rows = proteins(7)
    options = [write(tmp_path / "data", rows), "micro_batches_per_step=3", "num_train_steps=8"]
    whole = run_here("train_ddp", tmp_path / "whole", *options, *saved(tmp_path / "whole"), *EVERY)
    straight = contents(read)
    assert [name[0] for name, *_ in straight[3:6]] == [0, 1, 1]
    for epoch in range(6):
        assert Counter(s for name, some, _ in straight if name[0] == epoch for s in some) == Counter(rows)
    for step in (1, 2, 5):
        read.clear()
        assert_resumes(
            lambda folder, *more: run_here("train_ddp", folder, *options, *more), whole, tmp_path / f"{step}", step
        )
        assert contents(read) == straight[3 * step :]


# ---- files as people have them

SEQUENCES = proteins(20)


def fasta(end: str = "\n", header: str = ">sp|{}| Böhm et al.") -> str:
    """Lines of 30 residues."""
    return "".join(
        f"{header.format(i)}{end}" + "".join(f"{s[j : j + 30]}{end}" for j in range(0, len(s), 30))
        for i, s in enumerate(SEQUENCES)
    )


def worst() -> bytes:
    """A file from Windows: byte order mark, CRLF, Latin-1 names, lower case, spaces, blank lines, an empty record."""
    text = fasta("  \r\n\r\n", ">").lower() + ">the last one is empty"
    return b"\xef\xbb\xbf" + text.replace(">", ">Böhm", 9).encode("latin-1")


@pytest.fixture(scope="module")
def clean_curve(tmp_path_factory) -> dict:
    """The curve of the clean file, by whether it is a stream."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "clean.fasta").write_text(fasta() + ">empty\n")
    return {
        streaming: curve(run_here("train_ddp", folder / streaming, *fasta_options(folder / "clean.fasta", streaming)))
        for streaming in ("false", "true")
    }


def fasta_options(file: Path, streaming: str) -> list[str]:
    """To train on and to validate with this file."""
    return [f"{section}.load_dataset_kwargs.{key}={value}" for section in ("dataset", "validation")
            for key, value in (("path", "fasta"), ("data_files", file))] + [
                f"{DATA}.streaming={streaming}", f"+validation.load_dataset_kwargs.streaming={streaming}"]  # fmt: skip


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("name", ["worst.fasta", "worst.fasta.gz"])
def test_an_odd_fasta_file_trains_like_a_clean_one(clean_curve, tmp_path, name, streaming):
    (tmp_path / name).write_bytes(gzip.compress(worst()) if name.endswith("gz") else worst())
    assert curve(run_here("train_ddp", tmp_path, *fasta_options(tmp_path / name, streaming))) == clean_curve[streaming]


@pytest.mark.parametrize("section", ["dataset", "validation"])
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.fasta", fasta().encode("utf-16"), ["a.fasta", "zero bytes", "UTF-8"]),
        ("a.fasta", (RECIPE / "data" / "validation.parquet").read_bytes(), ["a.fasta", "no plain text"]),
        ("a.fasta", b"MKV\nMKL\n", ["has no rows", "a line that begins with >"]),
        ("a.csv", "id,sequence\nBöhm,MKVL\n".encode("latin-1"), ["a.csv", "no UTF-8", "encoding=latin-1"]),
        ("a.json", '{"id": "Böhm", "sequence": "MKVL"}\n'.encode("utf-16"), ["a.json", "no UTF-8"]),
        ("a.json", b'{"sequence": "MKV"}\n{"sequence": MKL}\n', ["a.json, line 2", "JSON parse error"]),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, section, name, content, parts):
    (tmp_path / name).write_bytes(content)
    where = f"{section}.load_dataset_kwargs"
    with pytest.raises(SystemExit) as stopped:
        run_here("train_ddp", tmp_path, f"{where}.path={name[2:]}", f"{where}.data_files={tmp_path / name}")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith(f"error: {where}") and message.count("\n") == 1, message
    if section == "validation" and "has no rows" in message:
        parts = parts[:1]
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_the_encoding_that_a_sentence_advises(read, tmp_path, streaming):
    (tmp_path / "a.csv").write_bytes("id,sequence\r\nBöhm,MKVL\r\n".encode("latin-1"))
    run_here("train_ddp", tmp_path, f"{DATA}.path=csv", f"{DATA}.data_files={tmp_path}/a.csv",
             f"{DATA}.streaming={streaming}", f"+{DATA}.encoding=latin-1", "num_train_steps=1")  # fmt: skip
    assert {s for batch in read for s in sequences_of(batch)} == {"MKVL"}
