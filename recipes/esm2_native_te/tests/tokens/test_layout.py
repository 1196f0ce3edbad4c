# SPDX-License-Identifier: Apache-2.0
"""How token sequences are laid out, what of them the model computes, and how rows are grouped."""

import numpy as np
import pytest
import torch

from tokens.layout import IGNORED, SELECTED_MULTIPLE, pack, pad, select_tokens, token_grouping


# ---- grouping


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ((None, None, 64), ["dataset.micro_batch_size=None", "dataset.token_micro_batch_size=None"]),
        ((4, 128, 64), ["dataset.micro_batch_size=4", "dataset.token_micro_batch_size=128"]),
        ((0, None, 64), ["dataset.micro_batch_size=0"]),
        ((None, 63, 64), ["dataset.token_micro_batch_size=63", "dataset.max_seq_length=64"]),
    ],
)
def test_mistakes_are_named(arguments, parts):
    with pytest.raises(ValueError) as error:
        token_grouping("dataset", *arguments)
    assert all(part in str(error.value) for part in parts)


def test_budget_of_just_the_longest_sequence():
    assert len(token_grouping("dataset", None, 64, 64)(np.array([64, 64, 3]), None)) == 3


def test_rows_in_equal_numbers():
    groups = token_grouping("dataset", 2, None, 64)(np.array([64, 0, 64, 3]), None)
    assert [group.tolist() for group in groups] == [[0, 2], [3]]


# ---- selected tokens


@pytest.mark.parametrize("shape", [(300,), (3, 100)])
@pytest.mark.parametrize("num_labels", [0, 1, 63, 64, 65, 128, 299, 300])
def test_labelled_tokens_and_the_first_others_are_selected(shape, num_labels):
    labels = np.full(300, IGNORED)
    labelled = np.sort(np.random.default_rng(0).permutation(300)[:num_labels])
    labels[labelled] = 5
    selected = select_tokens(labels.reshape(shape))
    assert selected.dtype == np.int64 and (np.diff(selected) > 0).all()
    assert len(selected) == min(300, -(-max(num_labels, 1) // SELECTED_MULTIPLE) * SELECTED_MULTIPLE)
    assert set(labelled) <= set(selected)
    others = [i for i in selected if labels[i] == IGNORED]
    assert others == np.flatnonzero(labels == IGNORED)[: len(others)].tolist()


def test_fewer_tokens_than_the_multiple_are_all_selected():
    assert select_tokens(np.full((2, 3), IGNORED)).tolist() == [0, 1, 2, 3, 4, 5]


# ---- layouts

LENGTHS = np.array([3, 1, 4])
TOKENS, LABELS = np.arange(10, 18), np.array([IGNORED, 5, IGNORED, 6, 7, IGNORED, IGNORED, 8])


@pytest.mark.parametrize("multiple, extra", [(1, 0), (8, 0), (5, 2), (16, 8)])
def test_packed(multiple, extra):
    laid_out = pack(TOKENS, LABELS, LENGTHS, multiple, pad_token=1)
    assert laid_out["input_ids"].tolist() == TOKENS.tolist() + [1] * extra
    assert laid_out["labels"].tolist() == LABELS.tolist() + [IGNORED] * extra
    assert laid_out["seq_lens"] == [3, 1, 4] + [extra] * (extra > 0)
    assert laid_out["cu_seqlens"].dtype == torch.int32
    assert laid_out["cu_seqlens"].tolist() == np.cumsum([0, *laid_out["seq_lens"]]).tolist()
    assert laid_out["max_seqlen"] == max(4, extra)


@pytest.mark.parametrize("multiple, width", [(1, 4), (4, 4), (3, 6)])
def test_padded(multiple, width):
    laid_out = pad(TOKENS, LABELS, LENGTHS, multiple, pad_token=1)
    mask = laid_out["attention_mask"]
    assert mask.shape == (3, width) and mask.sum(1).tolist() == LENGTHS.tolist()
    assert (mask.diff(dim=1) <= 0).all()  # pads stand behind the tokens
    for key, values, filled in (("input_ids", TOKENS, 1), ("labels", LABELS, IGNORED)):
        assert laid_out[key][mask.bool()].tolist() == values.tolist()
        assert (laid_out[key][~mask.bool()] == filled).all()
