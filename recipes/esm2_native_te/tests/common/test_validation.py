# SPDX-License-Identifier: Apache-2.0
"""Validation counts every row once, and its numbers are those of a direct count, on any number of ranks."""

import math
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from common.contract.ranks import call_on_ranks
from common.loader import read
from common.validation import Validator
from dataset import VOCABULARY, open_validation
from tokens.masked_lm import MaskedLMOutput


class Guesser(torch.nn.Module):
    """Guesses from the token that stands there, by a fixed table, and remembers the sequences it has seen."""

    def __init__(self):
        super().__init__()
        self.table = torch.randn(33, 33, generator=torch.Generator().manual_seed(0))
        self.seen: list[list[str]] = []  # in each pass

    def forward(self, input_ids, labels, selected, counts, attention_mask=None, cu_seqlens=None, max_seqlen=None,
                seq_lens=None):  # fmt: skip
        assert not self.training and not torch.is_grad_enabled()
        logits, labels_W = self.table[input_ids.flatten()[selected]], labels.flatten()[selected]
        tokens = torch.where(labels != -100, labels, input_ids)
        sequences = tokens if cu_seqlens is None else tokens.split(seq_lens)
        residues = ["".join(VOCABULARY[t] for t in sequence.tolist() if t > 3) for sequence in sequences]
        self.seen.append([*filter(None, residues)])  # what pads to a multiple has none
        loss = F.cross_entropy(logits, labels_W, reduction="sum") / counts["labels"]
        return MaskedLMOutput(loss=loss, logits=logits, labels=labels_W)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """53 rows, 3 of them empty."""
    random = np.random.default_rng(0)
    proteins = ["".join(random.choice(list("LAGVSERTIDPKQNFYMHWC"), random.integers(30, 90))) for _ in range(53)]
    proteins[4], proteins[20], proteins[50] = "", "-", None
    path = tmp_path_factory.mktemp("validation") / "proteins.parquet"
    pq.write_table(pa.table({"sequence": proteins}), path)
    return path


def make_validator(distributed, file: Path, packed: bool = True, multiple: int = 1, **options) -> Validator:
    kwargs = {"path": "parquet", "data_files": str(file), "split": "train"} | options.pop("load_dataset_kwargs", {})
    defaults = {"micro_batch_size": 4, "max_seq_length": 128, "window_rows": 20}
    return open_validation(distributed, packed, multiple, load_dataset_kwargs=kwargs, **defaults | options)


def validate(distributed, *arguments, **options) -> tuple[dict, list[list[str]]]:
    model = Guesser()
    result = make_validator(distributed, *arguments, **options).run(model, nullcontext)
    assert model.training
    return result, model.seen


def count(seen: list[list[str]]) -> Counter:
    return Counter(chain.from_iterable(seen))


def proteins_in(file: Path) -> list[str]:
    return [s for s in pq.read_table(file).column("sequence").to_pylist() if s and s != "-"]


def test_numbers_are_those_of_a_direct_count(distributed, file):
    validator = make_validator(distributed, file)
    losses, hits = [], []
    for micro_batch in validator.plan.epoch(0):
        inputs = validator.collate(read(validator.plan.source, micro_batch)).inputs
        for token, label in zip(inputs["input_ids"], inputs["labels"], strict=True):
            if label != -100:
                logits = Guesser().table[token].double()
                losses.append(float(logits.logsumexp(0) - logits[label]))
                hits.append(int(logits.argmax()) == label)
    result = validator.run(Guesser(), nullcontext)
    assert result["num_labels"] == len(losses) == pytest.approx(0.15 * sum(map(len, proteins_in(file))), rel=0.15)
    assert result["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
    assert result["accuracy"] == sum(hits) / len(hits)


def test_each_row_is_seen_once_and_the_same_every_time(distributed, file):
    first = validate(distributed, file)
    assert count(first[1]) == Counter(proteins_in(file))
    assert validate(distributed, file) == first


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("grouping", [{}, {"micro_batch_size": None, "token_micro_batch_size": 300}])
def test_layouts_agree(distributed, file, multiple, grouping):
    packed, padded = (validate(distributed, file, p, multiple, **grouping) for p in (True, False))
    assert count(packed[1]) == count(padded[1]) == Counter(proteins_in(file))
    assert packed[0] == pytest.approx(padded[0], rel=1e-6)


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory, file) -> list:
    return call_on_ranks(tmp_path_factory.mktemp("ranks"), validate, 3, file)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, file) -> list:
    return call_on_ranks(tmp_path_factory.mktemp("ranks"), validate, 2, file)


@pytest.mark.parametrize("ranks, num_passes", [("two_ranks", 7), ("three_ranks", 5)])
def test_ranks_share_the_rows_and_agree(request, distributed, file, ranks, num_passes):
    alone, micro_batches = validate(distributed, file)
    assert len(micro_batches) == 13  # divides neither by 2 nor by 3
    results = request.getfixturevalue(ranks)
    own = [seen[: len(range(rank, 13, len(results)))] for rank, (_, seen) in enumerate(results)]
    assert count(chain.from_iterable(own)) == Counter(proteins_in(file))
    for numbers, seen in results:
        assert len(seen) == num_passes  # the same on each, or a sharded model would wait for ever
        assert numbers["num_labels"] == alone["num_labels"]
        assert numbers["accuracy"] == alone["accuracy"]
        assert numbers == pytest.approx(alone, rel=1e-12)


def test_at_most_so_many_rows(distributed, file):
    assert count(validate(distributed, file, max_rows=15)[1]) == Counter(proteins_in(file)[:14])  # one is empty
    assert count(validate(distributed, file, max_rows=1000)[1]) == Counter(proteins_in(file))
    streamed = validate(distributed, file, max_rows=15, load_dataset_kwargs={"streaming": True})
    assert streamed == validate(distributed, file, max_rows=15)


@pytest.mark.parametrize(
    "every, due", [(None, [10]), (4, [4, 8, 10]), (5, [5, 10]), (1, list(range(1, 11))), (20, [10])]
)
def test_when_it_is_due(distributed, file, every, due):
    validator = make_validator(distributed, file, every_n_steps=every)
    assert [step for step in range(1, 11) if validator.is_due(step, 10)] == due


def test_no_data_means_never(distributed):
    validator = open_validation(distributed, True, 1, load_dataset_kwargs=None, every_n_steps=1)
    assert not any(validator.is_due(step, 10) for step in range(1, 11))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"load_dataset_kwargs": {"data_files": "/none.parquet"}}, "validation.load_dataset_kwargs.data_files=/none"),
        ({"load_dataset_kwargs": {"split": None}}, "validation.load_dataset_kwargs.split"),
        ({"load_dataset_kwargs": {"streaming": True}}, "validation.max_rows"),
        ({"sequence_column": "seq"}, "validation.sequence_column=seq"),
        ({"every_n_steps": 0}, "validation.every_n_steps=0"),
        ({"max_rows": 0}, "validation.max_rows=0"),
        ({"window_rows": 0}, "validation.window_rows=0"),
        ({"token_micro_batch_size": 300}, "validation.micro_batch_size=4"),
        ({"micro_batch_size": None, "token_micro_batch_size": 100}, "validation.token_micro_batch_size=100"),
    ],
)
def test_mistakes_are_named(distributed, file, options, message):
    with pytest.raises(ValueError) as error:
        make_validator(distributed, file, **options)
    assert message in str(error.value)


def test_a_file_of_empty_rows_is_named(distributed, tmp_path):
    pq.write_table(pa.table({"sequence": ["", "-", "*"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"validation: the sequences are all empty.*validation\.sequence_column"):
        make_validator(distributed, tmp_path / "x.parquet")
