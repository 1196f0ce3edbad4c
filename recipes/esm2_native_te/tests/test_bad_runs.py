# SPDX-License-Identifier: Apache-2.0
"""Data, folders, weights and services that cannot serve are one sentence; all ranks end with it."""

import gzip
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentences import assert_in, files, refusals

from common.contract.running import (
    RECIPE,
    TINY,
    environment,
    meeting,
    run_here,
    said_by,
    start_processes,
    torchrun,
)


REFERENCE = "model_tag=facebook/esm2_t6_8M_UR50D"
PACKED = "use_sequence_packing=true"


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    return refusals(tmp_path, capfd, monkeypatch)


# ---- data


def write_bad_data(folder: Path) -> None:
    (folder / "empty.parquet").touch()
    (folder / "text.parquet").write_text("not a parquet file, but longer than its magic bytes\n" * 3)
    pq.write_table(pa.table({"protein": ["MKV"]}), folder / "other_column.parquet")
    pq.write_table(pa.table({"sequence": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"sequence": ["", None, " - "]}), folder / "blank.parquet")
    pq.write_table(pa.table({"sequence": pa.array([], pa.string())}), folder / "no_rows.parquet")
    (folder / "no_rows.csv").write_text("id,sequence\n")
    (folder / "no_rows.fasta").write_text("MKV\n")  # no record begins
    whole = gzip.compress("".join(f">p{i}\nMKVLAAGIT\n" for i in range(999)).encode(), mtime=0)
    (folder / "cut.fasta.gz").write_bytes(whole[: len(whole) // 2])


BAD_DATA = [
    ("parquet", "missing.parquet", ["data_files=missing.parquet: no such file", "full path"]),
    ("parquet", "empty.parquet", ["empty.parquet: the file is empty", "with rows"]),
    ("parquet", "no_rows.parquet", ["split=train of no_rows.parquet has no rows"]),
    ("parquet", "other_column.parquet", ["sequence_column=sequence: the data has no such column", "has protein"]),
    ("parquet", "numbers.parquet", ["sequence_column=sequence: the column holds int64, not text"]),
    ("parquet", "blank.parquet", ["all empty", "column"]),
    ("parquet", "text.parquet", ["text.parquet", "arquet"]),
    ("fasta", "cut.fasta.gz", ["cut.fasta.gz"]),
    ("csv", "no_rows.csv", ["split=train of no_rows.csv has no rows"]),
    ("fasta", "no_rows.fasta", ["split=train of no_rows.fasta has no rows"]),
    ("parquet", "null", ["data_files is not set"]),
]


@pytest.mark.parametrize(
    ("section", "kind", "name", "parts"),
    [("dataset", *case) for case in BAD_DATA] + [("validation", *case) for case in BAD_DATA[:5]],
)
def test_data(refused, tmp_path, section, kind, name, parts):
    write_bad_data(tmp_path)
    where = f"{section}.load_dataset_kwargs"
    message = refused(f"{where}.path={kind}", f"{where}.data_files={name}")
    assert_in(message, f"error: {section}", *parts)


def test_libraries_add_nothing(tmp_path):
    write_bad_data(tmp_path)
    command = [sys.executable, "train_ddp.py", f"dataset.load_dataset_kwargs.data_files={tmp_path}/text.parquet"]
    done = subprocess.run(command, cwd=RECIPE, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dataset.load_dataset_kwargs") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_file_too_small_for_its_parts(refused, tmp_path):
    (tmp_path / "few.fasta").write_text("".join(f">p{i}\nMKVLAAGIT\n" for i in range(5)))
    few = ("dataset.load_dataset_kwargs.data_files=few.fasta", "dataset.token_micro_batch_size=null")
    assert_in(refused(*few, "--config-name", "my_proteins"), "split=train[95%:] of few.fasta has no rows")


def test_split_and_database(refused, tmp_path):
    assert_in(refused("dataset.load_dataset_kwargs.split=test"), "dataset.load_dataset_kwargs", "test")
    assert_in(refused("dataset.load_dataset_kwargs.split=null"), "dataset.load_dataset_kwargs.split", "train")
    assert_in(refused("dataset.cluster_column=sequence", "dataset.protein_database=no.db"), "no.db: no such file")


# ---- what a run writes


def test_folders_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("kept")
    message = refused("checkpoint.ckpt_dir=file/below")
    assert_in(message, "checkpoint.ckpt_dir=file/below cannot be written", "give another folder")
    assert_in(refused("logger.log_dir=file"), "logger.log_dir=file cannot be written", "give another folder")


def test_a_full_disk(refused, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=1000) if str(path) == "full" else usage(path)
    )
    message = refused("checkpoint.ckpt_dir=full")
    assert_in(message, "checkpoint.ckpt_dir=full has 0.0 MiB free", "MiB; make room or take another folder")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("checkpoint.save_final_model=true", ["save_final_model=true needs checkpoint.ckpt_dir"]),
        ("checkpoint.save_every_n_steps=0", ["checkpoint.save_every_n_steps=0 must be at least 1, or null"]),
        ("checkpoint.max_to_keep=0", ["checkpoint.max_to_keep=0 must be at least 1, or null"]),
    ],
)
def test_saving(refused, override, parts):
    assert_in(refused(override), *parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with its final model."""
    path = tmp_path_factory.mktemp("finished")
    run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", "checkpoint.save_final_model=true", "num_train_steps=3")
    return path


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ["checkpoint.ckpt_dir=ckpt", "final_model already", "save_final_model=false"]),
        (
            ["checkpoint.save_final_model=false", "checkpoint.resume_from_checkpoint=false"],
            ["ckpt holds step_3 of an earlier run", "resume_from_checkpoint=true", "another folder"],
        ),
        (["model_kwargs.hidden_size=64"], ["model_kwargs.hidden_size was 48 and is 64", "another folder"]),
        (
            ["model_kwargs.num_hidden_layers=3", "checkpoint.allow_config_change=true"],
            ["model_kwargs.num_hidden_layers was 2 and is 3"],
        ),
        (["model_tag=esm2_t6_8M_UR50D"], ["model_tag was esm2_t4_1M and is esm2_t6_8M_UR50D"]),
        ([REFERENCE], ["model_tag was esm2_t4_1M and is facebook/esm2_t6_8M_UR50D"]),
        (["seed=7"], ["seed was 42 and is 7", "checkpoint.allow_config_change=true"]),
        (
            ["init_from=other", "checkpoint.allow_config_change=true"],
            ["init_from was null and is other", "another folder to start from other ones"],
        ),
        (["num_train_steps=2"], ["num_train_steps=2", "at step 3", "more steps"]),
    ],
)
def test_an_earlier_run_stays_as_it_is(refused, finished, tmp_path, overrides, parts):
    shutil.copytree(finished, tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / ("final_model" if overrides else "step_3"))
    message = refused("checkpoint.ckpt_dir=ckpt", "checkpoint.save_final_model=true", *overrides)
    assert_in(message, *parts)


# ---- pretrained weights


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda path: shutil.rmtree(path), ["init_from=source", "no local folder"]),
        (lambda path: (path / "model.safetensors").unlink(), ["init_from=source", "neither *.safetensors nor"]),
        (lambda path: (path / "model.safetensors").write_bytes(b"half"), ["init_from=source", "cannot be used"]),
        (lambda path: (path / "config.json").unlink(), ["init_from=source", "config.json"]),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "bert"}'),
            ["init_from=source", "bert", "esm"],
        ),
        (lambda path: (path / "config.json").write_text("{"), ["init_from=source", "cannot be used"]),
    ],
)
def test_weights_that_cannot_be_used(refused, finished, tmp_path, spoil, parts):
    shutil.copytree(finished / "final_model", tmp_path / "source")
    spoil(tmp_path / "source")
    assert_in(refused("init_from=source"), *parts)


@pytest.mark.parametrize(
    ("key", "value", "had"), [("hidden_size", 64, 48), ("num_hidden_layers", 3, 2), ("num_attention_heads", 2, 4)]
)
def test_weights_of_another_size(refused, finished, key, value, had):
    message = refused(f"init_from={finished / 'final_model'}", f"model_kwargs.{key}={value}")
    assert_in(message, f"init_from={finished}", f"{key}={had}", str(value), "model_kwargs of that size")


def test_a_name_that_the_hub_does_not_give(refused):
    assert_in(refused("init_from=nobody/nothing"), "init_from=nobody/nothing", "hub")


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "bert"}'])
def test_a_folder_that_is_no_model(refused, tmp_path, text):
    (tmp_path / "folder").mkdir()
    if text:
        (tmp_path / "folder" / "config.json").write_text(text)
    assert_in(refused("model_tag=folder"), "model_tag=folder is no folder of an ESM-2")


# ---- Weights & Biases


def test_wandb_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_in(refused("wandb_init_args.mode=online"), "wandb_init_args.mode=online", "pip install wandb", "disabled")


def test_wandb_that_does_not_start(refused, monkeypatch):
    wandb = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(mode, project, name, config, entity=None):
        raise wandb.Error("api_key not configured (no-tty).\nCall wandb login.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert_in(refused("wandb_init_args.mode=online", "+wandb_init_args.entity=me"), "mode=online", "wandb login")
    message = refused("wandb_init_args.mode=offline", "+wandb_init_args.colour=red")
    assert_in(message, "wandb_init_args", "mode=offline", "'colour'")


# ---- two ranks


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        pytest.param(
            ["micro_batches_per_step=3"],
            ["micro_batches_per_step=3 does not divide by the 2 ranks; 2 or 4 would"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["cp_size=2", PACKED, "model_kwargs.num_attention_heads=1"],
            ["cp_size=2 must be at most the number of heads, 1"],
            marks=pytest.mark.slow,
        ),
        (["sed=1"], ["Unknown key sed"]),
        (
            ["dataset.load_dataset_kwargs.data_files='${oc.env:TEST_FOLDER}/${oc.env:RANK}.parquet'"],
            ["0.parquet on rank 0 and", "1.parquet on rank 1; give one value"],
        ),
    ],
    ids=["all ranks", "too few heads", "before they meet", "one rank"],
)
def test_two_ranks_say_it_once_and_all_stop(tmp_path, tmp_path_factory, overrides, parts):
    shutil.copy(RECIPE / "data" / "train.parquet", tmp_path / "0.parquet")
    before = files(tmp_path)
    options = [f"checkpoint.ckpt_dir={tmp_path}/ckpt", *overrides]
    if "${oc.env:RANK}" in overrides[0]:  # as torchrun passes it on
        command = [*torchrun(2), "train_fsdp2.py", *TINY, f"logger.log_dir={tmp_path}/log", *options]
        env = environment() | {"TEST_FOLDER": str(tmp_path)}
        done = subprocess.run(command, cwd=RECIPE, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and "exitcode  : 2" in done.stderr
        said = done.stderr
    else:
        scratch = tmp_path_factory.mktemp("said")
        ranks = start_processes(meeting(2), scratch, "train_fsdp2", tmp_path / "log", *options)
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [2, 2]
        said = said_by(scratch)
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert_in(message, *parts)
    ours = [line for line in said.splitlines() if line.startswith("  File") and str(RECIPE) in line]
    assert not ours  # no traceback of a rank
    assert files(tmp_path) == before
