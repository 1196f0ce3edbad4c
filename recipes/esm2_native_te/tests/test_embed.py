# SPDX-License-Identifier: Apache-2.0
"""Embeddings are what plain transformers gives, whatever the batches and ranks, and after an interruption."""

import fcntl
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import embed
from common import parts
from common.contract import ranks
from common.contract.running import run_here


PROTEINS = [
    "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTT",
    "mkv-",
    "MKTAYIAKQRQISFVKSHFSRQ",
    "",
    "W" * 120,
    "MA*X",
]
FAST = ["--layer-backend=torch", "--precision=fp32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return run_here(
        "train_ddp", path, f"checkpoint.ckpt_dir={path}", "checkpoint.save_final_model=true", "num_train_steps=1"
    )


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "my.fasta"
    path.write_text("".join(f">p{i} some text\n{s}\n" for i, s in enumerate(PROTEINS)))
    return path


@pytest.fixture(scope="module")
def expected(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    model = AutoModel.from_pretrained(run / "final_model", add_pooling_layer=False).eval()
    with torch.no_grad():
        return [
            model(**tokenizer(p, return_tensors="pt")).last_hidden_state[0, 1:-1].numpy() if p else None
            for p in PROTEINS
        ]


def same(file, expected, tolerance=1e-4):
    found = pq.read_table(file).to_pylist()
    assert [line["row"] for line in found] == [*range(len(PROTEINS))]
    assert [line["id"] for line in found] == [f"p{i}" for i in range(len(PROTEINS))]
    for line, vectors in zip(found, expected, strict=True):
        if vectors is None:
            assert line["embedding"] is None and line["num_residues"] == 0
            continue
        assert line["num_residues"] == len(vectors)
        np.testing.assert_allclose(line["embedding"], vectors.mean(0), rtol=tolerance, atol=tolerance)
        if "residue_embeddings" in line:
            np.testing.assert_allclose(line["residue_embeddings"], vectors, rtol=tolerance, atol=tolerance)
    return found


@pytest.mark.parametrize("source", ["final_model", "step_1", "."])
def test_it_is_what_transformers_gives(run, fasta, expected, source, tmp_path, capfd):
    embed.main([str(fasta), str(run / source), str(tmp_path / "out.parquet"), "--per-residue", "--tokens=60", *FAST])
    assert "residue_embeddings" in same(tmp_path / "out.parquet", expected)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert "1 of 6 proteins are longer than the 96 tokens" in capfd.readouterr().err or source != "final_model"


def on_a_rank(distributed, options):
    embed.ROWS_PER_PART = 2
    embed.embed(distributed, embed.parse(options))


def test_ranks_share_the_work(run, fasta, expected, tmp_path):
    words = [str(fasta), str(run / "final_model"), str(tmp_path / "out.parquet"), *FAST]
    ranks.call_on_ranks(tmp_path / "ranks", on_a_rank, 2, words)
    assert "residue_embeddings" not in same(tmp_path / "out.parquet", expected)[0]


def test_the_same_command_continues_and_another_does_not(run, fasta, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(embed, "ROWS_PER_PART", 2)
    computed, real = [], embed.vectors

    def dies(*arguments):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(1)
        return real(*arguments)

    words = [str(fasta), str(run / "final_model"), str(tmp_path / "out.parquet"), "--half", *FAST]
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(embed, "vectors", dies)
        embed.main(words)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(SystemExit):
        embed.main([word for word in words if word != "--half"])
    kept = sorted((tmp_path / "out.parquet.parts").glob("part_*.parquet"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2
    monkeypatch.setattr(parts, "joined", lambda files, target, joined=parts.joined: (
        times.append([path.stat().st_mtime_ns for path in kept]), joined(files, target)))  # fmt: skip
    capfd.readouterr()
    embed.main(words)
    assert "100%" in capfd.readouterr().err  # of what was left
    assert times.pop() == times
    same(tmp_path / "out.parquet", expected, 2e-3)


def test_two_at_a_time_are_refused(run, fasta, tmp_path, capfd):
    folder = tmp_path / "out.parquet.parts"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as another process has it
    words = [str(fasta), str(run / "final_model"), str(tmp_path / "out.parquet"), *FAST]
    with pytest.raises(SystemExit):
        embed.main(words)
    assert f"{folder}: another run writes to it; stop that one" in capfd.readouterr().err
    assert not [*folder.iterdir()]
    os.close(held)
    embed.main(words)
    assert (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_files(run, expected, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.csv

    data = pa.table({"id": [f"p{i}" for i in range(len(PROTEINS))], "protein": PROTEINS})
    (pa.csv.write_csv if kind == "csv" else pq.write_table)(data, tmp_path / f"my.{kind}")
    words = [str(tmp_path / f"my.{kind}"), str(run / "final_model"), str(tmp_path / "out.parquet"), "--column=protein"]
    embed.main([*words, *FAST])
    same(tmp_path / "out.parquet", expected)
