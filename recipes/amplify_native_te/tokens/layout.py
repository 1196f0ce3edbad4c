# SPDX-License-Identifier: Apache-2.0
"""Token sequences laid out as one batch, padding-free (THD) or padded (BSHD), and what a model needs to know of them.

Shapes: B sequences, S padded length, T tokens laid end to end; W selected tokens.
"""

import numpy as np
import torch

from common.epoch_plan import Grouping


IGNORED = -100  # the label of a token that is not to be predicted
# W is a multiple of it, or all tokens: compiled products and graphs are made for each size, and so are found again;
# FP8 and MXFP8 take rows by 16 and 32; and W is never 0.
SELECTED_MULTIPLE = 64


def check_limits(section: str, shortest: str, max_seq_length: int, mlm_probability: float, window_rows: int) -> None:
    """Raise ValueError for a number that leaves nothing to learn from; `shortest` says what 3 tokens are."""
    if max_seq_length < 3:
        raise ValueError(f"{section}.max_seq_length={max_seq_length} must be at least {shortest}.")
    if not 0 < mlm_probability < 1:
        raise ValueError(f"{section}.mlm_probability={mlm_probability} must lie between 0 and 1.")
    if window_rows < 1:
        raise ValueError(f"{section}.window_rows={window_rows} must be at least 1.")


def token_grouping(
    section: str, micro_batch_size: int | None, token_micro_batch_size: int | None, max_seq_length: int
) -> Grouping:
    """How a configuration's section groups rows: so many, or up to a budget of tokens.

    Raises ValueError unless exactly one of the two is given and the budget takes the longest sequence.
    """
    if (micro_batch_size is None) == (token_micro_batch_size is None):
        raise ValueError(
            f"{section}.micro_batch_size={micro_batch_size} (rows) and {section}.token_micro_batch_size="
            f"{token_micro_batch_size} (tokens): set one of the two and give null for the other."
        )
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"{section}.micro_batch_size={micro_batch_size} must be at least 1.")
    if token_micro_batch_size is not None and token_micro_batch_size < max_seq_length:
        raise ValueError(
            f"{section}.token_micro_batch_size={token_micro_batch_size} is smaller than the longest sequence, "
            f"{section}.max_seq_length={max_seq_length}: raise the one or lower the other."
        )
    return Grouping(micro_batch_size, token_micro_batch_size)


def select_tokens(labels: np.ndarray) -> np.ndarray:
    """The numbers of all labelled tokens, and of the first unlabelled ones to fill up W, rising: int64 [W]."""
    unlabelled = labels.ravel() == IGNORED
    num_selected = max(1, -(-int((~unlabelled).sum()) // SELECTED_MULTIPLE)) * SELECTED_MULTIPLE
    return np.sort(np.argsort(unlabelled, kind="stable")[:num_selected])


def pack(tokens: np.ndarray, labels: np.ndarray, seq_lens: np.ndarray, multiple: int, pad_token: int) -> dict:
    """Padding-free: `input_ids` and `labels` [T], `cu_seqlens` (int32 [B + 1]), `max_seqlen`, `seq_lens`.

    T is filled up to what `multiple` divides, with a segment of its own behind the last sequence: it attends to
    itself, and nothing is learnt from it.
    """
    if extra := -len(tokens) % multiple:
        tokens = np.concatenate((tokens, np.full(extra, pad_token)))
        labels = np.concatenate((labels, np.full(extra, IGNORED)))
        seq_lens = np.append(seq_lens, extra)
    return {
        "input_ids": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "cu_seqlens": torch.from_numpy(np.concatenate(([0], np.cumsum(seq_lens))).astype(np.int32)),
        "max_seqlen": int(seq_lens.max()),
        "seq_lens": seq_lens.tolist(),
    }


def pad(tokens: np.ndarray, labels: np.ndarray, seq_lens: np.ndarray, multiple: int, pad_token: int) -> dict:
    """Padded: `input_ids`, `labels` and `attention_mask` [B, S]; `multiple` divides S."""
    width = int(seq_lens.max())
    width += -width % multiple
    present = np.arange(width) < seq_lens[:, None]
    padded_tokens, padded_labels = np.full(present.shape, pad_token), np.full(present.shape, IGNORED)
    padded_tokens[present], padded_labels[present] = tokens, labels
    return {
        "input_ids": torch.from_numpy(padded_tokens),
        "labels": torch.from_numpy(padded_labels),
        "attention_mask": torch.from_numpy(present.astype(np.int64)),
    }
