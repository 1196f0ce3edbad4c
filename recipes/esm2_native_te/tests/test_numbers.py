# SPDX-License-Identifier: Apache-2.0
"""The numbers are right, and not only equal to each other: against `reference.py`, which is plain and in float64."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import modeling_esm2
from collator import MaskedLMCollator
from common.contract.running import run_here
from common.step_folder import read_weights
from common.weights import copy_parameters
from convert import save_native
from modeling_esm2 import Embeddings, Esm2Config, Esm2ForMaskedLM, training_flops
from tokens.layout import IGNORED


NUM_HEADS = 4
SHAPE = {  # that of `running.TINY`
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": NUM_HEADS, "intermediate_size": 80,
    "layer_backend": "torch",
}  # fmt: skip
# (packed, pad_to_multiple_of); 1 is FP32's and BF16's, 16 FP8's.
LAYOUTS = pytest.mark.parametrize(
    "layout", [(False, 1), (True, 1), (False, 16), (True, 16)], ids=["padded", "packed", "padded 16", "packed 16"]
)


def first_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers, random to the last bias, and large: attention is far from even, no norm is idle."""
    random = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        model = Esm2ForMaskedLM(Esm2Config(**SHAPE))
    parameters = {
        name: torch.randn(x.shape, generator=random, dtype=torch.float32) * 0.2
        + (name.endswith("norm.weight") or "norm_weight" in name)
        for name, x in model.named_parameters()
    }
    return parameters, {
        name: torch.randn(x.shape, generator=random, dtype=torch.float32) for name, x in model.named_buffers()
    }


def make_model() -> Esm2ForMaskedLM:
    model = Esm2ForMaskedLM(Esm2Config(**SHAPE))
    parameters, buffers = first_weights()
    copy_parameters(model, parameters | buffers)
    return model


def doubles(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.double() for name, weight in weights.items()}


def sample(lengths: tuple[int, ...], index: int = 0) -> dict:
    """Proteins of so many tokens with <cls> and <eos>."""
    random = np.random.default_rng((7, index))
    return {"name": (0, 0, index), "items": [np.r_[0, random.integers(4, 29, n - 2), 2] for n in lengths]}


def masked(sample: dict, rate: float) -> list[tuple[list[int], list[int | None]]]:
    """What the collator with seed 3 makes of the sample, by the reference."""
    tokens, labels = reference.mask(
        np.concatenate(sample["items"]).tolist(), np.random.default_rng((3, *sample["name"])), rate
    )
    ends = np.cumsum([len(tokens) for tokens in sample["items"]]).tolist()
    return [(tokens[a:b], labels[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def inputs_of(sample: dict, rate: float, layout: tuple[bool, int]) -> dict:
    return MaskedLMCollator(layout[0], 3, rate, layout[1])(sample).inputs


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=["float32", "float64"])
def precise(request, monkeypatch) -> tuple[Esm2ForMaskedLM, str]:
    """The recipe's model, in its own FP32 and with all that it computes in FP32 made float64."""
    if request.param == "float32":
        yield make_model(), request.param
        return

    def inv_freq(config, dtype, device=None):
        return torch.tensor([10000.0 ** (-i / 6) for i in range(6)], dtype=torch.float64)

    monkeypatch.setattr(modeling_esm2, "rope_inv_freq", inv_freq)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model = make_model().double()
    torch.set_default_dtype(torch.float64)
    yield model, request.param
    torch.set_default_dtype(torch.float32)


# ---- forward and backward

LENGTHS, LONG = (17, 3, 96, 40, 5), (17, 3, 1024, 40)
# As parts of the largest value. FP32 has a rounding of 6e-8 in each of some dozen sums; float64 shows that nothing
# else is different.
FORWARD = {"float32": 2e-5, "float64": 1e-13}  # an angle of 1,023 radians is 3e-5 off in FP32
BACKWARD = {"float32": 1e-5, "float64": 1e-13}


@cache
@torch.no_grad()
def expected_outputs() -> tuple[Tensor, Tensor, float]:
    """Logits of all tokens, which of them have a label, and the loss."""
    weights, sequences = doubles(first_weights()[0]), masked(sample(LONG), 0.3)
    logits = torch.cat([reference.logits(tokens, weights, NUM_HEADS) for tokens, _ in sequences])
    is_labelled = torch.tensor([label is not None for _, labels in sequences for label in labels])
    loss = sum(reference.summed_loss(*sequence, weights, NUM_HEADS) for sequence in sequences)
    return logits, is_labelled, float(loss) / int(is_labelled.sum())


@LAYOUTS
@torch.no_grad()
def test_logits_and_loss(precise, layout):
    model, precision = precise
    inputs = inputs_of(sample(LONG), 0.3, layout)
    logits, is_labelled, loss = expected_outputs()
    output = model(**inputs)
    assert (output.labels != IGNORED).sum() == is_labelled.sum() < len(output.labels)  # and some to fill up
    assert error(output.logits[output.labels != IGNORED], logits[is_labelled]) < FORWARD[precision]
    assert output.loss.item() == pytest.approx(loss, rel=FORWARD[precision])
    present = slice(len(logits)) if layout[0] else inputs["attention_mask"].bool()
    del inputs["labels"]
    assert error(model(**inputs).logits[present], logits) < FORWARD[precision]


# Micro-batches of one step, with the rate of masks: few labels, many labels, none at all.
STEP = [(sample(LENGTHS), 0.3), (sample((30, 8), 1), 0.1), (sample((3,), 2), 1e-9), (sample((64, 21, 9), 3), 0.15)]


@cache
def expected_gradients() -> tuple[float, dict[str, Tensor], list]:
    sequences = [sequence for batch, rate in STEP for sequence in masked(batch, rate)]
    return *reference.loss_and_gradients(sequences, doubles(first_weights()[0]), NUM_HEADS), sequences


@LAYOUTS
def test_gradients_of_several_micro_batches(precise, layout):
    model, precision = precise
    loss, gradients, sequences = expected_gradients()
    num_labels = sum(label is not None for _, labels in sequences for label in labels)
    total = 0.0
    for batch, rate in STEP:
        part = model(**inputs_of(batch, rate, layout), counts={"labels": num_labels}).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss, rel=BACKWARD[precision])
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[name]) < BACKWARD[precision], name


@torch.no_grad()
def test_gradients_are_differences_of_the_loss():
    """Along a random direction in each parameter by itself, so that autograd is not the only witness."""
    weights, sequences = doubles(first_weights()[0]), masked(sample((12, 19)), 0.4)
    random = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        _, gradients = reference.loss_and_gradients(sequences, weights, NUM_HEADS)
    num_labels = sum(label is not None for _, labels in sequences for label in labels)

    def loss(name: str, moved: Tensor) -> float:
        return (
            sum(float(reference.summed_loss(*s, weights | {name: moved}, NUM_HEADS)) for s in sequences) / num_labels
        )

    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=random, dtype=torch.float64)
        # Off by the square of the step, 1e-10, and by the rounding of the loss over the step, 4e-16 / 1e-5.
        slope = (loss(name, weight + 1e-5 * direction) - loss(name, weight - 1e-5 * direction)) / 2e-5
        assert slope == pytest.approx(float((gradients[name] * direction).sum()), rel=1e-6, abs=1e-8), name


# ---- token dropout


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("token_dropout", [True, False])
def test_token_dropout_scales_each_sequence_by_itself(token_dropout, packed):
    """10 tokens with 3 masks, 4 with none, 25 with 1, 7 with 5; behind them pads."""
    embeddings = Embeddings(Esm2Config(**SHAPE, token_dropout=token_dropout))
    table = embeddings.word_embeddings.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    sequences = [[0] + [5] * (n - 2 - masks) + [32] * masks + [2] for n, masks in ((10, 3), (4, 0), (25, 1), (7, 5))]
    if packed:
        cu_seqlens = torch.tensor([0, 10, 14, 39, 46, 48], dtype=torch.int32)
        found = embeddings(torch.tensor(sum(sequences, []) + [1, 1]), None, cu_seqlens).split([10, 4, 25, 7, 2])[:4]
    else:
        inputs = torch.tensor([tokens + [1] * (32 - len(tokens)) for tokens in sequences])
        found = embeddings(inputs, inputs != 1, None)
        assert not found[inputs == 1].any()
    scales = (0.88 / (1 - 3 / 10), 0.88, 0.88 / (1 - 1 / 25), 0.88 / (1 - 5 / 7)) if token_dropout else (1, 1, 1, 1)
    for tokens, vectors, scale in zip(sequences, found, scales, strict=True):
        for token, vector in zip(tokens, vectors, strict=False):
            expected = 0 * table[32] if token == 32 and token_dropout else table[token] * scale
            torch.testing.assert_close(vector, expected, rtol=1e-6, atol=0)


# ---- whole runs


def write_texts(path: Path) -> list[str | None]:
    """19 rows, half of them to be cropped; with what is cleaned, and empty ones."""
    random = np.random.default_rng(4)
    texts = ["".join(random.choice(list("LAGVSERTIDPKQNFYMHWCXBUZO"), n)) for n in random.integers(4, 90, 14)]
    texts += ["", None, " lagv-sert.IDPK*QN*J1\n", "-*-", "M\u00e9tKKW"]
    pq.write_table(pa.table({"sequence": texts}), path)
    return pq.read_table(path).column("sequence").to_pylist()


# Five steps through 2 epochs and both ends of the schedule. eps is as large as the gradients are: only then does
# AdamW notice by how much they were clipped, and it does not blow up the rounding of those that are nearly 0.
ROWS = reference.Settings(
    seed=10, micro_batches_per_step=3, num_train_steps=5, max_grad_norm=0.5, micro_batch_size=2,
    token_micro_batch_size=None, max_seq_length=48, mlm_probability=0.25, window_rows=8, lr=0.05, betas=(0.8, 0.95),
    eps=2e-3, weight_decay=0.7, num_warmup_steps=2, num_training_steps=5, decay_fraction=0.8, min_lr_fraction=0.2,
    max_rows=17,
)  # fmt: skip
QUICK = [("train_ddp", "rows"), ("train_fsdp2", "tokens"), ("train_mfsdp", "rows")]
TOKENS = replace(ROWS, micro_batch_size=None, token_micro_batch_size=110, seed=11)
SECTIONS = {
    "dataset": ("micro_batch_size", "token_micro_batch_size", "max_seq_length", "mlm_probability", "window_rows"),
    "adamw_kwargs": ("lr", "betas", "eps", "weight_decay"),
    "lr_scheduler_kwargs": ("num_warmup_steps", "num_training_steps", "decay_fraction", "min_lr_fraction"),
    "validation": ("max_rows",),
}


def overrides(settings: reference.Settings) -> list[str]:
    sections = {key: f"{section}." for section, keys in SECTIONS.items() for key in keys}
    given = {
        key: list(v) if isinstance(v, tuple) else "null" if v is None else v for key, v in asdict(settings).items()
    }
    return [f"{sections.get(key, '')}{key}={value}".replace(" ", "") for key, value in given.items()]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with the proteins and the weights to start from."""
    folder = tmp_path_factory.mktemp("start")
    parameters, buffers = first_weights()
    save_native(parameters | buffers, Esm2Config(**SHAPE), folder / "weights")
    write_texts(folder / "proteins.parquet")
    return folder


@cache
def replay(settings: reference.Settings, file: Path) -> list[dict]:
    texts = pq.read_table(file).column("sequence").to_pylist()
    return reference.train(settings, texts, first_weights()[0], NUM_HEADS)


@pytest.mark.parametrize(
    ("settings", "trainer", "packed"),
    [
        pytest.param(
            settings, trainer, packed, id=f"{name}-{trainer}",
            marks=[] if (trainer, name) in QUICK else [pytest.mark.slow],
        )
        for name, settings in (("rows", ROWS), ("tokens", TOKENS))
        for trainer, packed in (("train_ddp", False), ("train_fsdp2", True), ("train_mfsdp", True))
    ],
)  # fmt: skip
def test_runs_are_those_of_the_reference(trainer, packed, settings, start, tmp_path):
    steps = replay(settings, start / "proteins.parquet")
    run_here(
        trainer, tmp_path, *overrides(settings), f"init_from={start}/weights", f"use_sequence_packing={packed}",
        f"dataset.load_dataset_kwargs.data_files={start}/proteins.parquet",
        f"validation.load_dataset_kwargs.data_files={start}/proteins.parquet", "validation.every_n_steps=2",
        f"checkpoint.ckpt_dir={tmp_path}/checkpoints", "checkpoint.save_every_n_steps=1",
        "checkpoint.max_to_keep=null",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = {line["step"]: line for line in lines if line["kind"] == "train"}
    validation = {line["step"]: line for line in lines if line["kind"] == "validation"}
    assert list(train) == [1, 2, 3, 4, 5] and list(validation) == [2, 4, 5]
    first, buffers = first_weights()
    for step, expected in enumerate(steps, start=1):
        line = train[step]
        assert expected["grad_norm"] > 1.2 * settings.max_grad_norm  # it is clipped
        assert line["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-12)
        # Sums of FP32 over a thousand tokens and 40,000 gradients were within 8e-7.
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=5e-6), (step, key)
        assert line["num_tokens"] == expected["num_tokens"]
        assert line["fill"] == pytest.approx(1.0 if packed else expected["padded_fill"], rel=1e-12)
        flops = sum(reference.flops(*size, 2, 48, 80, labels_only=True) for size in expected["micro_batches"])
        assert line["model_tflops"] * 1e12 * line["step_time_s"] == pytest.approx(flops, rel=1e-9)
        if step in validation:
            found, wanted = validation[step], expected["validation"]
            assert wanted["margin"] > 1e-3  # rounding changes no guess
            assert (found["num_labels"], found["accuracy"]) == (wanted["num_labels"], wanted["accuracy"])
            assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-6)
            assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
        weights = read_weights(tmp_path / "checkpoints" / f"step_{step}")
        assert weights.keys() == first.keys() | buffers.keys()
        for name, before in doubles(first).items():
            # How far it has come, as a part of the longest way: 5e-6, as the gradients in FP32 above.
            assert error(weights[name].double() - before, expected["weights"][name] - before) < 3e-5, (step, name)
        assert all(torch.equal(weights[name], buffers[name]) for name in buffers)


def test_hugging_faces_model_computes_all_of_its_last_layer(start, tmp_path):
    file = start / "proteins.parquet"
    run_here(
        "train_ddp", tmp_path, *overrides(ROWS), "model_tag=facebook/esm2_t6_8M_UR50D", f"init_from={start}/weights",
        f"dataset.load_dataset_kwargs.data_files={file}", "validation.load_dataset_kwargs=null",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, replay(ROWS, file), strict=True):
        flops = sum(reference.flops(*size, 2, 48, 80) for size in expected["micro_batches"])
        assert line["model_tflops"] * 1e12 * line["step_time_s"] == pytest.approx(flops, rel=1e-9)
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-6)


# ---- operations


def counts_of(seq_lens: list[int], num_labels: int) -> dict[str, int]:
    return {"labels": num_labels, "tokens": sum(seq_lens), "token_pairs": sum(length**2 for length in seq_lens)}


@pytest.mark.parametrize("layers, width, feed_forward", [(2, 48, 80), (5, 24, 7)])
@pytest.mark.parametrize("seq_lens, num_labels", [([3], 1), ([17, 5, 40], 11), ([1024, 1], 0)])
@pytest.mark.parametrize("backend", [None, "transformers", "te", "torch", "cpp"])
def test_operations_by_hand(layers, width, feed_forward, seq_lens, num_labels, backend):
    config = Esm2Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=feed_forward, num_attention_heads=4
    )
    expected = reference.flops(seq_lens, num_labels, layers, width, feed_forward, backend in ("torch", "cpp"))
    assert training_flops(config, counts_of(seq_lens, num_labels), backend) == pytest.approx(expected, rel=1e-12)
    assert training_flops(config, counts_of([], 0), backend) == 0


@LAYOUTS
def test_operations_are_those_of_forward_and_backward_pass(layout):
    """As PyTorch counts them: matrix products only, on all slots, those of attention only where it is not fused."""
    packed, multiple = layout
    model, batch = make_model(), sample((17, 5, 140))
    inputs = inputs_of(batch, 0.3, layout)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs).loss.backward()
    num_labels = len(inputs["selected"])
    assert num_labels == 64  # those that fill up are computed as if they had a label
    # The recipe counts tokens. What is padded costs more: every row up to the longest, or a last segment of pads.
    width = -(-140 // multiple) * multiple
    slots = ([17, 5, 140] + [-162 % multiple] * (multiple > 1)) if packed else [width] * 3
    # The plain layers' attention is of all tokens, also in the last one.
    beside = 3 * 4 * 48 * sum(length**2 for length in slots) * (1 - num_labels / sum(slots))
    found = counter.get_total_flops() - beside
    assert found == pytest.approx(training_flops(model.config, counts_of(slots, num_labels), "torch"), rel=1e-12)
