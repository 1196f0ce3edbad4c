# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the numbers in `metrics.jsonl` by hand, `run.json`, `config.yaml`, W&B."""

import hashlib
import io
import json
import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from common import perf_logger
from common.batch import Batch
from common.contract.ranks import call_on_ranks
from common.contract.running import RECIPE, metrics, run_here
from common.perf_logger import PerfLogger
from common.precision import Precision
from common.step_folder import lock


TRAIN_KEYS = {
    "kind", "step", "epoch", "first_micro_batch", "loss", "grad_norm", "learning_rate", "fill", "step_time_s",
    "data_wait_s", "peak_memory_gib", "model_tflops", "peak_share",
}  # fmt: skip
METRICS = SimpleNamespace(UNIT="atoms", LOSS_NAME="Weighted error")
CONFIG = {"model_tag": "tiny", "num_train_steps": 5, "wandb_init_args": {"mode": "disabled"}, "same": "${model_tag}"}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flops(batch: Batch) -> float:
    return 1e9 * batch.counts["atoms"] + 1e6 * batch.counts["structures"]


def make_logger(distributed, folder: Path | None, **options) -> PerfLogger:
    precision = Precision(torch.device("cpu"), "fp32", bf16_pays=False)
    given = {"frequency": 2, "log_dir": folder and str(folder), "peak_tflops": 0.5} | options
    config = OmegaConf.create(CONFIG)
    model = torch.nn.Linear(1233, 1)  # of 1,234 parameters
    return PerfLogger(distributed, config, model, flops, precision, METRICS, "/x/train_ddp.py", **given)


def batch(num_atoms: int, num_structures: int, num_slots: int) -> Batch:
    return Batch({}, (0, 0, 0), {"structures": num_structures, "atoms": num_atoms}, num_slots)


def drive(distributed, folder: Path, **options) -> list[dict]:
    """Five steps by a clock that says how long each takes; rank 1's batches are not those of rank 0."""
    clock = SimpleNamespace(now=100.0)
    perf_logger.time = SimpleNamespace(perf_counter=lambda: clock.now)
    logger = make_logger(distributed, folder, **options)
    logger.start(0, [None, "a note"])
    for step, seconds in enumerate((1.0, 3.0, 2.0, 2.0, 0.5), start=1):
        batches = [batch(30, 4, 40)] if distributed.rank == 0 else [batch(30, 3, 30), batch(10, 1, 20)]
        counts = {"structures": 4, "atoms": 30} if distributed.num_ranks == 1 else {"structures": 8, "atoms": 70}
        clock.now += seconds
        logger.count(batches, counts, step // 2, data_wait_s=seconds / 4)
        logger.log_step(
            step, {"loss": float(step), "forces": 0.5 * step, "stress": 0.0}, 2.0 * step, learning_rate=step / 100
        )
        with logger.paused():
            clock.now += 1000.0  # a validation
        if step == 4:
            logger.log_validation(step, {"loss": 2.5, "error": 12.0, "accuracy": 0.25, "num_structures": 9})
    logger.close()
    return read_lines(folder) if distributed.is_main else []


@pytest.fixture(autouse=True)
def real_clock(monkeypatch):
    monkeypatch.setattr(perf_logger, "time", perf_logger.time)  # put back after the test


FLOPS_OF_RANK = (30e9 + 4e6, 40e9 + 4e6)


def check_numbers(lines: list[dict], atoms: int, slots: int, flops: float, num_ranks: int) -> None:
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 5]  # the last one too
    for line, seconds, steps in zip(train, (4.0, 4.0, 0.5), (2, 2, 1), strict=True):
        step = line["step"]
        assert line.keys() == TRAIN_KEYS | {"forces", "stress", "atoms_per_second", "num_atoms"}
        expected = {
            "epoch": step // 2, "loss": step, "forces": 0.5 * step,
            "grad_norm": 2.0 * step, "learning_rate": step / 100,
            "num_atoms": atoms * step, "fill": atoms / slots,
            "atoms_per_second": atoms * steps / seconds,  # over the whole window
            "step_time_s": seconds / steps, "data_wait_s": seconds / steps / 4,
            "model_tflops": flops * steps / seconds / 1e12,
            "peak_share": flops * steps / seconds / 1e12 / num_ranks / 0.5,
        }  # fmt: skip
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-9)
        assert 0.01 < line["peak_memory_gib"] < 100
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert validation == {
        "kind": "validation", "step": 4, "loss": 2.5, "error": 12.0, "accuracy": 0.25, "num_structures": 9,
    }  # fmt: skip
    assert [line["step"] for line in lines] == [2, 4, 4, 5]


def test_numbers_by_hand(distributed, tmp_path):
    check_numbers(drive(distributed, tmp_path), atoms=30, slots=40, flops=FLOPS_OF_RANK[0], num_ranks=1)


def test_numbers_of_two_ranks(tmp_path):
    lines, nothing = call_on_ranks(tmp_path / "ranks", drive, 2, tmp_path / "log")
    assert nothing == []
    check_numbers(lines, atoms=70, slots=90, flops=sum(FLOPS_OF_RANK), num_ranks=2)


def test_without_a_terminal_there_are_lines(distributed, tmp_path, capsys):
    drive(distributed, tmp_path)
    message = capsys.readouterr().err
    assert "tiny (1,234 parameters), ddp, 1 x " in message and "a note\n" in message
    line = "step 4/5  epoch 2  loss 4.0000 (forces 2.0000)  grad norm 8.000  lr 4.00e-02  15 atoms/s  0.0 min left\n"
    assert line in message
    assert "step 4  validation loss 2.5000  error 12.0000  accuracy 0.2500\n" in message


def test_a_recipe_says_what_is_shown_of_a_validation(distributed, tmp_path, capsys, monkeypatch):
    curves = {"Error, eV": {"MAE": "error_mae", "RMSE": "error_rmse"}, "Other, eV": {"MAE": "other_mae"}}
    monkeypatch.setattr(METRICS, "CURVES", curves, raising=False)
    logger = make_logger(distributed, tmp_path)
    logger.start(0, [])
    logger.log_validation(3, {"error_max": 7.0, "error_rmse": 0.00012345, "error_mae": 0.1})
    assert "step 3  validation error_mae 0.1000  error_rmse 0.0001234\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["curves"] == curves
    assert read_lines(tmp_path)[0]["error_max"] == 7.0


def test_on_a_terminal_there_is_a_bar(distributed, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    drive(distributed, tmp_path)
    bar = terminal.getvalue().rpartition("\r")[2]
    assert "5/5" in bar and "loss 5.0000, 60 atoms/s" in bar and "<" in bar  # the last: elapsed < left


def test_no_folder(distributed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = make_logger(distributed, None)
    logger.start(0, [])
    logger.count([batch(10, 1, 10)], {"atoms": 10}, 0, 0.0)
    logger.log_step(2, {"loss": 1.0}, 1.0, 0.1)
    logger.close()
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_counts_on(distributed, tmp_path):
    first, second = (make_logger(distributed, tmp_path, frequency=1) for _ in range(2))
    first.start(0, [])
    for step in (1, 2):
        first.count([batch(10, 1, 10)], {"atoms": 10}, 0, 0.0)
        first.log_step(step, {"loss": 1.0}, 1.0, 0.1)
    first.log_validation(2, {"loss": 3.0})
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {
        "run_id": state["run_id"], "num_atoms": 20, "validation": {"step": 2, "data": "-", "loss": 3.0},
        "best": {"step": 2, "loss": 3.0, "train_loss": 1.0, "is_said": False},
    }  # fmt: skip
    second.load_state_dict(state)
    second.start(1, [])  # what the killed run wrote past it is dropped
    second.count([batch(5, 1, 5)], {"atoms": 5}, 1, 0.0)
    second.log_step(2, {"loss": 2.0}, 1.0, 0.1)
    assert [(line["step"], line["loss"], line["num_atoms"]) for line in read_lines(tmp_path)] == [
        (1, 1.0, 10), (2, 2.0, 25),
    ]  # fmt: skip
    assert second.state_dict() == state | {"num_atoms": 25}


def test_what_is_no_number_is_null(distributed, tmp_path):
    logger = make_logger(distributed, tmp_path, frequency=1)
    logger.start(0, [])
    logger.count([batch(10, 1, 10)], {"atoms": 10}, 0, 0.0)
    logger.log_step(1, {"loss": float("nan"), "forces": 1.0}, float("inf"), 0.1)
    assert [(line["loss"], line["forces"], line["grad_norm"]) for line in read_lines(tmp_path)] == [(None, 1.0, None)]


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
    given = ["logger.frequency=2", "logger.peak_tflops=null", "num_train_steps=5", "validation.every_n_steps=3"]
    return run_here("train_fsdp2", path, *given)


def test_lines_of_a_run(run):
    lines = read_lines(run)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 5), ("validation", 5),
    ]  # fmt: skip
    train = [line for line in lines if line["kind"] == "train"]
    assert all(line.keys() == TRAIN_KEYS | {"tokens_per_second", "num_tokens"} for line in train)
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
    files = [file for kind in ("*.py", "common/*.[pc]*", "tokens/*.[pc]*") for file in RECIPE.glob(kind)]
    for name, file in sorted((str(file.relative_to(RECIPE)), file) for file in files if file.is_file()):
        digest.update(name.encode() + file.read_bytes())
    assert {"train_ddp.py", "common/distributed.py", "common/cpu_memory.cpp", "tokens/layers.py"} <= {
        str(file.relative_to(RECIPE)) for file in files
    }
    assert facts["code_sha256"] == digest.hexdigest()[:16]
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == version("torch") and facts["versions"]["datasets"] == version("datasets")
    assert (facts["strategy"], facts["num_ranks"], facts["precision"], facts["low_precision"]) == (
        "fsdp2",
        1,
        "fp32",
        {},
    )
    assert (facts["unit"], facts["loss_name"]) == ("tokens", "Masked-LM loss, nats")
    assert facts["layer_backend"] in ("te", "cpp", "torch")
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


def test_a_folder_of_another_run_is_kept_whole(distributed, tmp_path):
    """A run that goes on in a folder to which another one has written since sets that one's files aside."""
    first, other, again = (make_logger(distributed, tmp_path, frequency=1) for _ in range(3))
    first.start(0, [])
    (tmp_path / "metrics.before_1.jsonl").touch()  # an earlier one's, which stays
    other.start(0, [])
    other.count([batch(10, 1, 10)], {"atoms": 10}, 0, 0.0)
    other.log_step(1, {"loss": 1.0}, 1.0, 0.1)
    again.load_state_dict(first.state_dict())
    again.start(1, [])
    assert read_lines(tmp_path) == []
    assert (tmp_path / "metrics.before_1.jsonl").read_text() == ""
    assert json.loads((tmp_path / "metrics.before_3.jsonl").read_text())["loss"] == 1.0
    ids = [
        json.loads((tmp_path / f"run{which}.json").read_text())["run_id"] for which in (".before_2", ".before_3", "")
    ]
    assert ids == [first.run["run_id"], other.run["run_id"], first.run["run_id"]]
    assert all((tmp_path / f"config.before_{n}.yaml").exists() for n in (2, 3))


def test_two_runs_do_not_share_a_folder(distributed, tmp_path, monkeypatch):
    monkeypatch.setattr(perf_logger, "lock", partial(lock, seconds=0.3))
    holder = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"logger\.log_dir=.*another run writes to it"):
            make_logger(distributed, tmp_path)
        other.kill()


@pytest.mark.parametrize(
    ("train", "validation", "said_at"),
    [
        ([3.0, 2.0, 1.5, 1.2], [2.9, 2.5, 2.6, 2.8], [3]),  # once
        ([3.0, 2.0, 2.1, 2.2], [2.9, 2.5, 2.6, 2.8], []),  # training goes up too
        ([3.0, 2.0, 1.9, 1.8], [2.9, 2.5, 2.51, 2.4], []),  # no more than noise
        ([3.0, 2.0, 1.9, 1.8, 1.7, 1.6], [2.9, 2.5, 2.6, 2.4, 2.39, 2.5], [3, 6]),  # lower again meanwhile
    ],
)
def test_overfitting_is_said(distributed, tmp_path, capsys, train, validation, said_at):
    """Also where the run was stopped between: the lowest loss is in the checkpoint."""
    logger, said = make_logger(distributed, tmp_path), []
    logger.start(0, [])
    for step, (loss, found) in enumerate(zip(train, validation, strict=True), start=1):
        logger.count([batch(30, 4, 40)], {"structures": 4, "atoms": 30}, epoch=step, data_wait_s=0.0)
        logger.log_step(step, {"loss": loss}, 1.0, learning_rate=0.1)
        capsys.readouterr()
        logger.log_validation(step, {"loss": found})
        if "overfitting" in (message := capsys.readouterr().err):
            said.append(step)
            assert f"since step {step - 1} ({validation[step - 2]:.4f} -> {found:.4f})" in message
        state, logger = logger.state_dict(), make_logger(distributed, tmp_path)
        logger.load_state_dict(json.loads(json.dumps(state)))
        logger.start(step, [])
    assert said == said_at
