# SPDX-License-Identifier: Apache-2.0
"""A step that is no number, or jumps, is noticed on all ranks, explained, and traced to its rows."""

import io
import json
import math
import sys
from contextlib import redirect_stderr

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import modeling_esm2
import rows
from common import anomalies
from common.batch import Batch
from common.contract.ranks import call_on_ranks
from common.contract.running import TRAINERS, command_here, metrics, train_on
from common.distributed import process_group
from common.epoch_plan import permuted
from common.step_folder import read_weights


ONE = Batch({}, (0, 0, 0), {"labels": 3, "tokens": 5}, 5)
NUM_ROWS, POISON = 400, "W" * 80
TRYPTOPHAN = 22
STEP = 4  # where the poison comes


class InfiniteGradient(torch.autograd.Function):
    """The identity, but backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def poisoned(kind):
    """Replace forward passes: those that see the poison go wrong in that way."""
    embed, model = modeling_esm2.Embeddings.forward, modeling_esm2.Esm2ForMaskedLM.forward
    seen = []

    def embeddings(self, input_ids, *more):
        x = embed(self, input_ids, *more)
        if (input_ids == TRYPTOPHAN).sum() < 50:
            return x
        seen.append(1)
        if kind == "once" and len(seen) > 1:
            return x
        if kind == "gradient":
            return InfiniteGradient.apply(x)
        return x * math.nan if kind in ("output", "once") else x

    def whole(self, input_ids, *more, **named):
        output = model(self, input_ids, *more, **named)
        if (input_ids == TRYPTOPHAN).sum() >= 50 and kind in ("loss", "spike"):
            # Added: the gradients know nothing of it.
            output.loss = output.loss + (math.nan if kind == "loss" else 100.0)
        if kind == "large":
            output.loss = output.loss * 1e25
        return output

    return pytest.MonkeyPatch.context(), embeddings, whole


def train(distributed, trainer, path, kind, more):
    """A run with poison in the data, on ranks that are up already; its exit code."""
    data = f"dataset.load_dataset_kwargs.data_files={path / 'data.parquet'}"
    context, embeddings, whole = poisoned(kind)
    with context as patch:
        patch.setattr(modeling_esm2.Embeddings, "forward", embeddings)
        patch.setattr(modeling_esm2.Esm2ForMaskedLM, "forward", whole)
        try:
            train_on(distributed, trainer, data, f"logger.log_dir={path}", *more)
        except SystemExit as stop:
            return stop.code
    return 0


def train_and_tell(*arguments):
    with redirect_stderr(io.StringIO()) as message:
        code = train(*arguments)
    return code, message.getvalue()


def train_alone(trainer, path, kind, more):
    """The same on one rank; Megatron-FSDP has a process of its own, as in `running.run_here`."""
    if trainer == "train_mfsdp":
        ((code, message),) = call_on_ranks(path / "alone", train_and_tell, 1, trainer, path, kind, more)
        sys.stderr.write(message)
        return code
    with process_group(0) as alone:
        return train(alone, trainer, path, kind, more)


def write_data(path, step=STEP, times=1):
    """Rows with the poison where that step finds it, as the last row of its last micro-batch but one."""
    sequences = ["".join(np.random.default_rng(i).choice(list("ACDEFGHIKLM"), 40)) for i in range(NUM_ROWS)]
    rows = permuted(np.arange(NUM_ROWS), NUM_ROWS, 42, 0)
    poison = [int(rows[(step + later) * 8 - 3]) for later in range(times)]
    for row in poison:
        sequences[row] = POISON
    path.mkdir(parents=True, exist_ok=True)
    names = [f"protein {i}" for i in range(NUM_ROWS)]
    pq.write_table(pa.table({"sequence": sequences, "accession": names}), path / "data.parquet")
    return poison[0]


def report(path):
    return [json.loads(line) for line in (path / "anomalies.jsonl").read_text().splitlines()]


@pytest.fixture
def look_up(capsys):
    """What `rows.py` prints."""

    def look_up(*words):
        capsys.readouterr()
        assert command_here("rows.py", *words) == 0
        return capsys.readouterr().out

    return look_up


WHERE = {
    "output": ("esm.embeddings", "output"),
    "gradient": ("esm.embeddings.word_embeddings", "gradient of the output"),
    "loss": ("the model", "output"),
    "once": (None, None),
}


@pytest.mark.rotated
@pytest.mark.parametrize("kind", WHERE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_that_is_no_number_stops_the_run_and_is_explained(trainer, kind, tmp_path, capsys, look_up):
    row = write_data(tmp_path)
    saves = [f"checkpoint.ckpt_dir={tmp_path / 'ckpt'}", "checkpoint.save_every_n_steps=1"]
    assert train_alone(trainer, tmp_path, kind, saves) == 1
    message = capsys.readouterr().err
    (found,) = report(tmp_path)
    assert (found["kind"], found["step"], found["action"]) == ("nonfinite", STEP, "stopped")
    assert found["loss"] is None or kind == "gradient"
    module, what = WHERE[kind]
    assert (found["module"], found.get("what")) == (module, what)
    assert [batch["name"] for batch in found["micro_batches"]] == [[0, 0, 4 * (STEP - 1) + i] for i in range(4)]
    assert f"step {STEP}: the {'gradient norm' if kind == 'gradient' else 'loss'} is " in message
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["step_2", "step_3"]
    if kind == "once":
        assert "computed once more, all was finite" in message
        return
    assert found["micro_batch"] == [0, 0, 4 * STEP - 2]
    if kind == "output":
        name = ".".join(map(str, found["micro_batch"]))
        for arguments in (["--step", str(STEP)], ["--micro-batch", name]):
            line = next(line for line in look_up(tmp_path, *arguments).splitlines() if POISON[:50] in line)
            assert line.split()[:3] == [name, str(row), "82"]
            assert line.endswith(f"accession=protein {row}")


@pytest.mark.rotated
@pytest.mark.parametrize("kind", ["output", "gradient", "loss"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_can_be_left_out(trainer, kind, tmp_path, capsys):
    write_data(tmp_path)
    ckpt = tmp_path / "ckpt"
    saves = [f"checkpoint.ckpt_dir={ckpt}", "checkpoint.save_every_n_steps=1", "checkpoint.max_to_keep=null"]
    assert train_alone(trainer, tmp_path, kind, [*saves, "anomalies.on_nonfinite=skip"]) == 0
    weights = [read_weights(ckpt / f"step_{step}") for step in range(STEP - 1, STEP + 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(tensor.isfinite().all() for tensor in weights[2].values())
    losses = metrics(tmp_path, "train", "loss")
    assert (losses[STEP - 1] is None) == (kind != "gradient")
    assert None not in losses[: STEP - 1] + losses[STEP:]
    assert report(tmp_path)[0]["action"] == "skipped"
    assert "The weights stay as they are." in capsys.readouterr().err


@pytest.mark.parametrize(
    "trainer", [t if t == "train_fsdp2" else pytest.param(t, marks=pytest.mark.slow) for t in TRAINERS]
)
def test_all_ranks_agree_although_one_saw_it(trainer, tmp_path):
    write_data(tmp_path)
    arguments = (trainer, tmp_path, "output", ["anomalies.on_nonfinite=skip", "use_sequence_packing=true"])
    assert call_on_ranks(tmp_path / "ranks", train, 2, *arguments) == [0, 0]
    (found,) = report(tmp_path)
    # The third of four micro-batches: the first rank's second.
    assert (found["rank"], found["micro_batch"], found["module"]) == (0, [0, 0, 4 * STEP - 2], "esm.embeddings")
    assert [batch["rank"] for batch in found["micro_batches"]] == [0, 1, 0, 1]
    losses = [batch["loss"] for batch in found["micro_batches"]]
    assert [loss is None for loss in losses] == [False, False, True, False]
    assert None not in metrics(tmp_path, "train", "loss")[STEP:]


def test_too_many_in_a_row_stop_the_run(tmp_path, capsys):
    write_data(tmp_path, step=2, times=5)
    more = ["anomalies.on_nonfinite=skip", "anomalies.max_skipped=3", "num_train_steps=20"]
    assert train_alone("train_fsdp2", tmp_path, "output", more) == 1
    assert [(one["step"], one["action"]) for one in report(tmp_path)] == [
        (2, "skipped"),
        (3, "skipped"),
        (4, "stopped"),
    ]
    assert "anomalies.max_skipped=3" in capsys.readouterr().err


def test_a_norm_that_overflows_is_not_blamed_on_the_hardware(tmp_path, capsys):
    write_data(tmp_path)
    assert train_alone("train_ddp", tmp_path, "large", []) == 1
    assert "first in the norm of all gradients, too large for FP32" in capsys.readouterr().err


def test_an_earlier_runs_rows_are_not_mixed_up_with_this_ones(tmp_path, look_up):
    row = write_data(tmp_path)
    train_alone("train_ddp", tmp_path, "output", ["micro_batches_per_step=2", "num_train_steps=9"])
    train_alone("train_ddp", tmp_path, "none", ["logger.frequency=10"])
    assert (tmp_path / "anomalies.before_1.jsonl").exists()
    assert f"protein {row}" in look_up(tmp_path, "--step", str(STEP))


def test_a_jump_of_the_loss_is_recorded_and_training_goes_on(tmp_path, capsys, look_up):
    row = write_data(tmp_path, step=25)
    assert train_alone("train_ddp", tmp_path, "spike", ["num_train_steps=30"]) == 0
    (found,) = report(tmp_path)
    assert (found["kind"], found["step"]) == ("spike", 25)
    assert found["loss"] == pytest.approx(100 + found["median_loss"], rel=0.1)
    worst = max(found["micro_batches"], key=lambda batch: batch["loss"])
    assert worst["name"] == [0, 0, 4 * 25 - 2]
    assert "step 25  the loss jumped to 10" in capsys.readouterr().err
    assert f"protein {row}" in look_up(tmp_path, "--step", "25")


@pytest.fixture
def judge(distributed):
    return anomalies.Anomalies(distributed, None, spike_deviations=5.0, spike_window=30)


def judged(judge, step, loss, grad_norm=1.0):
    return judge.judge(step, [ONE], [{"loss": torch.tensor(loss)}], torch.tensor(grad_norm))


def losses_of(seed, num_steps=300, noise=0.05):
    draw = np.random.default_rng(seed)
    return [float(x) for x in 2 + np.exp(-np.arange(num_steps) / 50) + noise * draw.standard_normal(num_steps)]


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_noise_is_no_jump(seed, judge, capsys):
    for step, loss in enumerate(losses_of(seed), 1):
        assert judged(judge, step, loss).is_sound
    assert "jumped" not in capsys.readouterr().err


def test_it_needs_some_steps_to_know_what_is_usual_and_goes_on_after_a_resume(judge, distributed, capsys):
    losses = losses_of(0)
    judged(judge, 1, 50.0)
    for step, loss in enumerate(losses[:100], 2):
        judged(judge, step, loss)
    assert "jumped" not in capsys.readouterr().err
    resumed = anomalies.Anomalies(distributed, None, spike_deviations=5.0, spike_window=30)
    resumed.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    for one in (judge, resumed):
        judged(one, 102, losses[100] + 1)
        assert "the loss jumped" in capsys.readouterr().err


def test_a_window_too_short_to_know_what_is_usual_is_refused(distributed):
    with pytest.raises(ValueError, match="spike_window=5 must be at least 20"):
        anomalies.Anomalies(distributed, None, spike_window=5)


def test_it_can_be_turned_off(distributed, capsys):
    judge = anomalies.Anomalies(distributed, None, spike_deviations=None)
    for step, loss in enumerate([*losses_of(0), 1e6], 1):
        judged(judge, step, loss)
    assert "jumped" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("short")
    write_data(path)
    train_alone("train_ddp", path, "none", ["num_train_steps=2"])
    return path


@pytest.mark.parametrize(
    ("step", "micro_batch", "message"),
    [
        (0, None, "--step 0 must lie between 1 and num_train_steps=2"),
        (3, None, "--step 3 must lie between 1 and num_train_steps=2"),
        (None, "0.0.9999", "--micro-batch 0.0.9999: there is none"),
        (None, "-1.0.0", "--micro-batch -1.0.0: there is none"),
        (None, "hello", "--micro-batch hello: there is none"),
    ],
)
def test_rows_refuses_what_cannot_be(step, micro_batch, message, short_run):
    with pytest.raises(ValueError) as refused:
        rows.main(short_run, step, micro_batch)
    assert str(refused.value).startswith(message)


def test_rows_wants_the_folder_of_a_run(tmp_path, capsys):
    assert command_here("rows.py", tmp_path, "--step", "1") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "has no config.yaml" in said
