# SPDX-License-Identifier: Apache-2.0
"""Token arrays to a masked batch, padded (BSHD) or padding-free (THD)."""

import numpy as np
import torch

from common.batch import Batch
from common.distributed import Distributed
from tokens.layout import IGNORED, pack, pad, select_tokens


class MaskedLMCollator:
    """Masks and lays out a micro-batch; low precision wants a token count that `pad_to_multiple_of` divides.

    Masks are drawn over the sequences laid end to end, before the layout is chosen: both layouts mask the same
    residues. With context parallelism this is rank `part` of the `num_parts` that share the tokens.
    """

    pad_token: int  # a recipe's, as `mask` is

    def __init__(self, packed: bool, seed: int, mlm_probability: float, pad_to_multiple_of: int = 1,
                 part: int = 0, num_parts: int = 1):  # fmt: skip
        self.packed, self.seed, self.mlm_probability = packed, seed, mlm_probability
        self.multiple, self.part, self.num_parts = pad_to_multiple_of, part, num_parts

    @classmethod
    def on(cls, distributed: Distributed, *options) -> "MaskedLMCollator":
        """For one rank among others; the options are the collator's first."""
        return cls(*options, distributed.group_rank, distributed.group_size)

    def mask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees of these tokens, and their labels."""
        raise NotImplementedError

    def tokens_and_labels(self, items: list, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Of all sequences, laid end to end."""
        return self.mask(np.concatenate(items).astype(np.int64), random)

    def lengths(self, items: list) -> np.ndarray:
        """Tokens of each sequence."""
        return np.array([len(tokens) for tokens in items])

    def __call__(self, sample: dict) -> Batch:
        """`inputs` as `ForMaskedLM` takes them; counts `labels`, `tokens` and `token_pairs` (within sequences)."""
        seq_lens = self.lengths(sample["items"])
        random = np.random.default_rng((self.seed, *sample["name"]))
        tokens, labels = self.tokens_and_labels(sample["items"], random)
        lay_out = pack if self.packed else pad
        inputs = lay_out(tokens, labels, seq_lens, self.multiple, self.pad_token)
        own_labels = inputs["labels"].numpy().reshape(self.num_parts, -1)[self.part]
        inputs["selected"] = torch.from_numpy(select_tokens(own_labels))
        counts = {
            "labels": int((labels != IGNORED).sum()),
            "tokens": int(seq_lens.sum()),
            "token_pairs": int((seq_lens**2).sum()),
        }
        return Batch(inputs, sample["name"], counts, inputs["input_ids"].numel())
