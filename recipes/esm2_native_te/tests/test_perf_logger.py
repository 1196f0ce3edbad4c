# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the numbers in `metrics.jsonl` by hand, `run.json`, `config.yaml`, W&B."""

import hashlib
import io
import json
import platform
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from ranks import run_ranks
from running import RECIPE, metrics, run_here

import perf_logger
from collator import Batch
from modeling_esm2 import Esm2Config
from perf_logger import PerfLogger
from precision import Precision


TRAIN_KEYS = {
    "kind", "step", "first_micro_batch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "num_tokens",
    "fill", "step_time_s", "data_wait_s", "peak_memory_gib", "model_tflops", "peak_share",
}  # fmt: skip
SHAPE = Esm2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
CONFIG = {"model_tag": "tiny", "num_train_steps": 5, "wandb_init_args": {"mode": "disabled"}, "same": "${model_tag}"}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_logger(distributed, folder: Path | None, **options) -> PerfLogger:
    number_format = Precision(torch.device("cpu"), "fp32", SHAPE)
    given = {"frequency": 2, "log_dir": folder and str(folder), "peak_tflops": 0.5} | options
    return PerfLogger(distributed, OmegaConf.create(CONFIG), SHAPE, 1234, number_format, "/x/train_ddp.py", **given)


def batch(seq_lens: list[int], num_labels: int, num_slots: int) -> Batch:
    return Batch({}, (0, 0, 0), seq_lens, num_labels, num_slots)


def drive(distributed, folder: Path, **options) -> list[dict]:
    """Five steps by a clock that says how long each takes; rank 1's batches are not those of rank 0."""
    clock = SimpleNamespace(now=100.0)
    perf_logger.time = SimpleNamespace(perf_counter=lambda: clock.now)
    logger = make_logger(distributed, folder, **options)
    logger.start({"step": 0}, [None, "a note"])
    for step, seconds in enumerate((1.0, 3.0, 2.0, 2.0, 0.5), start=1):
        batches = [batch([10, 20], 4, 40)] if distributed.rank == 0 else [batch([30], 3, 30), batch([10], 1, 20)]
        clock.now += seconds
        logger.count(batches, data_wait_s=seconds / 4, num_tokens=30 if distributed.num_ranks == 1 else 70)
        logger.log_step(step, float(step), 2.0 * step, learning_rate=step / 100)
        with logger.paused():
            clock.now += 1000.0  # a validation
        if step == 4:
            logger.log_validation(step, {"loss": 2.5, "perplexity": 12.0, "accuracy": 0.25, "num_labels": 9})
    logger.close()
    return read_lines(folder) if distributed.is_main else []


@pytest.fixture(autouse=True)
def real_clock(monkeypatch):
    monkeypatch.setattr(perf_logger, "time", perf_logger.time)  # put back after the test


# 3 * (layers * (2 (4 E^2 + 2 E F) T + 4 E sum(length^2)) + 2 (E^2 + E P) L), by hand for the batches above, less what
# the last layer leaves out: of T - L tokens all but q, k and v.
PRODUCTS, LESS, HEAD = 2 * (4 * 48**2 + 2 * 48 * 80), 2 * (48**2 + 2 * 48 * 80), 2 * (48**2 + 48 * 64)
FLOPS_OF_RANK = (
    3 * (2 * (PRODUCTS * 30 + 4 * 48 * (10**2 + 20**2)) + HEAD * 4 - LESS * 26 - 4 * 48 * (10**2 + 20**2) * 26 / 30),
    3 * (2 * (PRODUCTS * 40 + 4 * 48 * (30**2 + 10**2)) + HEAD * 4
         - LESS * (27 + 9) - 4 * 48 * (30**2 * 27 / 30 + 10**2 * 9 / 10)),
)  # fmt: skip


def check_numbers(lines: list[dict], tokens: int, slots: int, flops: int, num_ranks: int) -> None:
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 5]  # the last one too
    for line, seconds, steps in zip(train, (4.0, 4.0, 0.5), (2, 2, 1), strict=True):
        step = line["step"]
        assert line.keys() == TRAIN_KEYS
        expected = {
            "loss": step, "grad_norm": 2.0 * step, "learning_rate": step / 100,
            "num_tokens": tokens * step, "fill": tokens / slots,
            "tokens_per_second": tokens * steps / seconds,  # over the whole window
            "step_time_s": seconds / steps, "data_wait_s": seconds / steps / 4,
            "model_tflops": flops * steps / seconds / 1e12,
            "peak_share": flops * steps / seconds / 1e12 / num_ranks / 0.5,
        }  # fmt: skip
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-9)
        assert 0.01 < line["peak_memory_gib"] < 100
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert validation == {
        "kind": "validation", "step": 4, "loss": 2.5, "perplexity": 12.0, "accuracy": 0.25, "num_labels": 9,
    }  # fmt: skip
    assert [line["step"] for line in lines] == [2, 4, 4, 5]


def test_numbers_by_hand(distributed, tmp_path):
    check_numbers(drive(distributed, tmp_path), tokens=30, slots=40, flops=FLOPS_OF_RANK[0], num_ranks=1)


def test_the_reference_computes_all_of_the_last_layer(distributed, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIG, "model_tag", "facebook/esm2_t6_8M_UR50D")
    flops = 3 * (2 * (PRODUCTS * 30 + 4 * 48 * (10**2 + 20**2)) + HEAD * 4)
    check_numbers(drive(distributed, tmp_path), tokens=30, slots=40, flops=flops, num_ranks=1)


def test_numbers_of_two_ranks(tmp_path):
    lines, nothing = run_ranks(tmp_path / "ranks", drive, 2, tmp_path / "log")
    assert nothing == []
    check_numbers(lines, tokens=70, slots=90, flops=sum(FLOPS_OF_RANK), num_ranks=2)


def test_without_a_terminal_there_are_lines(distributed, tmp_path, capsys):
    drive(distributed, tmp_path)
    told = capsys.readouterr().err
    assert "tiny (0.0M parameters), ddp, 1 x " in told and "a note\n" in told
    assert "step 4/5  loss 4.0000  grad norm 8.000  lr 4.00e-02  15 tokens/s  0.0 min left\n" in told
    assert "step 4  validation loss 2.5000  perplexity 12.000  accuracy 0.2500\n" in told


def test_on_a_terminal_there_is_a_bar(distributed, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    drive(distributed, tmp_path)
    bar = terminal.getvalue().rpartition("\r")[2]
    assert "5/5" in bar and "loss 5.0000, 60 tokens/s" in bar and "<" in bar  # the last: elapsed < left


def test_no_folder(distributed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = make_logger(distributed, None)
    logger.start({"step": 0}, [])
    logger.count([batch([10], 1, 10)], 0.0, 10)
    logger.log_step(2, 1.0, 1.0, 0.1)
    logger.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2250),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_peaks_of_gpus(distributed, monkeypatch, gpu, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    logger = make_logger(replace(distributed, device=torch.device("cuda", 0)), None, peak_tflops=None)
    assert logger.run["device"] == gpu and logger.run["peak_tflops_per_rank"] == peak
    assert logger.run["peak_source"] == ("data sheet" if peak else "unknown")


# ---- a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps, reported every second one and at the end; validated after the third and at the end."""
    path = tmp_path_factory.mktemp("run")
    return run_here("train_fsdp2", path, "logger.frequency=2", "num_train_steps=5", "validation.every_n_steps=3")


def test_lines_of_a_run(run):
    lines = read_lines(run)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 5), ("validation", 5),
    ]  # fmt: skip
    train = [line for line in lines if line["kind"] == "train"]
    assert all(line.keys() == TRAIN_KEYS for line in train)
    assert train[0]["learning_rate"] == pytest.approx(4e-4)  # the second of two warm-up steps reaches the peak
    assert 0.3 < train[0]["fill"] < 1 and 2.5 < train[0]["loss"] < 4
    assert 0 < train[0]["data_wait_s"] < train[0]["step_time_s"]
    tokens = [line["num_tokens"] for line in train]
    assert 0 < tokens[0] < tokens[1] < tokens[2] <= 5 * 4 * 2 * 96  # steps, micro-batches, rows, longest
    peak = json.loads((run / "run.json").read_text())["peak_tflops_per_rank"]
    for line in train:
        assert line["peak_share"] == pytest.approx(line["model_tflops"] / peak)


def test_run_json(run):
    facts = json.loads((run / "run.json").read_text())
    digest = hashlib.sha256()
    for file in sorted(RECIPE.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    assert facts["code_sha256"] == digest.hexdigest()[:16]
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == version("torch") and facts["versions"]["datasets"] == version("datasets")
    assert (facts["strategy"], facts["num_ranks"], facts["precision"], facts["low_precision"]) == (
        "fsdp2",
        1,
        "fp32",
        {},
    )
    assert facts["model_tag"] == "esm2_t4_1M" and facts["threads_per_rank"] == torch.get_num_threads()
    assert facts["device"] and "num_train_steps=5" in facts["command"]
    if not torch.cuda.is_available():
        assert facts["peak_source"] == "measured" and 0.001 < facts["peak_tflops_per_rank"] < 100
    width, ffn, layers = 48, 80, 2
    layer = 4 * width**2 + 2 * width * ffn + 9 * width + ffn  # matrices, biases, norms
    assert facts["num_parameters"] == layers * layer + 64 * width + 2 * width + width**2 + 3 * width + 33


def test_config_yaml_is_resolved(run):
    text = (run / "config.yaml").read_text()
    config = OmegaConf.load(run / "config.yaml")
    assert "${" not in text and "???" not in text
    assert config.num_train_steps == 5 and config.logger.frequency == 2
    assert config.validation.max_seq_length == config.dataset.max_seq_length == 96
    assert config.dataset.load_dataset_kwargs.data_files == str(RECIPE / "data" / "train.parquet")


def test_an_earlier_runs_metrics_are_kept(tmp_path):
    for seed in (1, 2, 3):
        run_here("train_ddp", tmp_path, "num_train_steps=1", f"seed={seed}", "validation.load_dataset_kwargs=null")
    kept = [json.loads((tmp_path / f"metrics.before_{i}.jsonl").read_text())["loss"] for i in (1, 2)]
    assert len({*kept, *metrics(tmp_path, "train", "loss")}) == 3


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "probe").mkdir()
    try:
        wandb.init(mode="offline", dir=tmp_path / "probe").finish()
    except wandb.Error as error:
        pytest.skip(f"wandb does not run offline here: {error}")
    named = ["wandb_init_args.mode=offline", "wandb_init_args.project=proteins", "wandb_init_args.name=mine"]
    run_here("train_ddp", tmp_path / "log", "num_train_steps=3", *named)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    for text in ("train/loss", "train/tokens_per_second", "validation/perplexity", "proteins", "mine", "adamw_kwargs"):
        assert text.encode() in content, text
