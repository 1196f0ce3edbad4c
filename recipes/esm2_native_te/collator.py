# SPDX-License-Identifier: Apache-2.0
"""Token arrays to a masked batch, padded (BSHD) or padding-free (THD).

Masks are drawn over the sequences laid end to end, before the layout is chosen: both layouts mask the same residues.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch


PAD, MASK = 1, 32
FIRST_RESIDUE, NUM_RESIDUES = 4, 20  # the 20 amino acids are tokens 4 .. 23
FIRST_TOKEN_NOT_MASKED = 29  # tokens 4 .. 28 are residues, ambiguous ones included
IGNORED = -100


@dataclass
class Batch:
    """What the model takes (`inputs`), and what the loop counts. N sequences of T tokens in all.

    `inputs`: `input_ids` and `labels` (-100 where no label) are [N, S] with `attention_mask` [N, S], or [T] with
    `cu_seqlens` [N + 1] and `max_seqlen`.
    """

    inputs: dict
    name: tuple
    seq_lens: list[int]
    num_labels: int
    num_slots: int  # tokens and padding

    @property
    def num_tokens(self) -> int:
        return sum(self.seq_lens)

    # From a worker as numpy, through a pipe: each tensor would open a file in shared memory and a connection.
    def __getstate__(self) -> dict:
        arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return self.__dict__ | {"inputs": arrays}

    def __setstate__(self, state: dict) -> None:
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state["inputs"].items()}
        self.__dict__ = state | {"inputs": tensors}

    def to(self, device: torch.device) -> "Batch":
        moved = {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in self.inputs.items()
        }
        return replace(self, inputs=moved)

    def pin_memory(self) -> "Batch":
        pinned = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=pinned)

    def without_labels(self) -> "Batch":
        """The same batch with nothing to learn from: for a rank that has no rows left but must take part."""
        return replace(
            self, inputs=self.inputs | {"labels": torch.full_like(self.inputs["labels"], IGNORED)}, num_labels=0
        )


def mask_tokens(
    tokens: np.ndarray, mlm_probability: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking: of the residues drawn, 80% become <mask>, 10% a random amino acid, 10% stay."""
    is_residue = (tokens >= FIRST_RESIDUE) & (tokens < FIRST_TOKEN_NOT_MASKED)
    chosen = is_residue & (random.random(len(tokens)) < mlm_probability)
    labels = np.where(chosen, tokens, IGNORED)
    kind = random.random(len(tokens))
    others = random.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES, len(tokens))
    masked = np.where(chosen & (kind < 0.8), MASK, np.where(chosen & (kind >= 0.9), others, tokens))
    return masked, labels


class MaskedLMCollator:
    """Masks and lays out a micro-batch; low precision wants a token count that `pad_to_multiple_of` divides."""

    def __init__(self, packed: bool, seed: int, mlm_probability: float, pad_to_multiple_of: int = 1):
        self.packed, self.seed, self.mlm_probability = packed, seed, mlm_probability
        self.multiple = pad_to_multiple_of

    def __call__(self, sample: dict) -> Batch:
        seq_lens = [len(tokens) for tokens in sample["tokens"]]
        random = np.random.default_rng((self.seed, *sample["name"]))
        tokens, labels = mask_tokens(np.concatenate(sample["tokens"]).astype(np.int64), self.mlm_probability, random)
        layout = self._pack if self.packed else self._pad
        inputs = layout(tokens, labels, np.array(seq_lens))
        num_labels = int((labels != IGNORED).sum())
        return Batch(inputs, sample["name"], seq_lens, num_labels, inputs["input_ids"].numel())

    def _pack(self, tokens: np.ndarray, labels: np.ndarray, seq_lens: np.ndarray) -> dict:
        if extra := -len(tokens) % self.multiple:
            # A segment of its own behind the last sequence: it attends to itself, and nothing is learnt from it.
            tokens = np.concatenate((tokens, np.full(extra, PAD)))
            labels = np.concatenate((labels, np.full(extra, IGNORED)))
            seq_lens = np.append(seq_lens, extra)
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "cu_seqlens": torch.from_numpy(np.concatenate(([0], np.cumsum(seq_lens))).astype(np.int32)),
            "max_seqlen": int(seq_lens.max()),
        }

    def _pad(self, tokens: np.ndarray, labels: np.ndarray, seq_lens: np.ndarray) -> dict:
        width = int(seq_lens.max())
        width += -width % self.multiple
        present = np.arange(width) < seq_lens[:, None]
        padded_tokens, padded_labels = np.full(present.shape, PAD), np.full(present.shape, IGNORED)
        padded_tokens[present], padded_labels[present] = tokens, labels
        return {
            "input_ids": torch.from_numpy(padded_tokens),
            "labels": torch.from_numpy(padded_labels),
            "attention_mask": torch.from_numpy(present.astype(np.int64)),
        }
