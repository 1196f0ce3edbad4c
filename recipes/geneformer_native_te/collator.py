# SPDX-License-Identifier: Apache-2.0
"""Which genes are masked, and by what; and batches of cells and genes with classes."""

from typing import Literal, NamedTuple

import numpy as np
import torch

from common.batch import Batch
from tokens import masked_batches
from tokens.layout import IGNORED, select_tokens
from vocabulary import Vocabulary


Masking = Literal["genes", "published"]


class Rule(NamedTuple):
    """Of the tokens drawn, `mask_share` become <mask>, `random_share` a random one, and the others stay.

    Drawn, and put in their place, are genes alone; as `published`, all but <pad> and <mask> are drawn, <cls> and <eos>
    too, and any token of the vocabulary may be put there.
    """

    vocabulary: Vocabulary
    masking: Masking = "genes"
    mask_share: float = 0.8
    random_share: float = 0.1

    def check(self, section: str) -> "Rule":
        """Itself. Raises ValueError for shares that are none."""
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError(
                f"{section}.mask_share={self.mask_share} and {section}.random_share={self.random_share} must be at "
                "least 0 and together at most 1: what is left stays as it is."
            )
        return self


def mask_tokens(
    tokens: np.ndarray, mlm_probability: float, rule: Rule, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What a model sees of these tokens, and what it has to tell of them."""
    vocabulary = rule.vocabulary
    if rule.masking == "published":
        can_be, others = ~np.isin(tokens, (vocabulary.pad, vocabulary.mask)), np.arange(vocabulary.size)
    else:
        others = np.array(vocabulary.genes)
        can_be = ~np.isin(tokens, vocabulary.special)
    chosen = can_be & (random.random(len(tokens)) < mlm_probability)
    labels = np.where(chosen, tokens, IGNORED)
    kind = random.random(len(tokens))
    replaced = np.where(chosen & (kind >= 1 - rule.random_share), random.choice(others, len(tokens)), tokens)
    return np.where(chosen & (kind < rule.mask_share), vocabulary.mask, replaced), labels


class MaskedLMCollator(masked_batches.MaskedLMCollator):
    """Batches of cells, masked by `rule`."""

    rule: Rule

    @property
    def pad_token(self) -> int:
        return self.rule.vocabulary.pad

    def mask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """By `mask_tokens`."""
        return mask_tokens(tokens, self.mlm_probability, self.rule, random)


class CellCollator(MaskedLMCollator):
    """Batches of cells as they are; the label of a cell's first token is its class."""

    def lengths(self, items: list) -> np.ndarray:
        return super().lengths([tokens for tokens, _ in items])

    def tokens_and_labels(self, items: list, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths(items)
        labels = np.full(lengths.sum(), IGNORED)
        labels[lengths.cumsum() - lengths] = [label for _, label in items]
        return np.concatenate([tokens for tokens, _ in items]).astype(np.int64), labels


class GeneCollator(MaskedLMCollator):
    """Batches of cells as they are; a gene's label is its class."""

    class_of_token: np.ndarray

    def mask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return tokens, self.class_of_token[tokens]


class LengthCollator(MaskedLMCollator):
    """Masked batches, with the first token of each cell and how many it has."""

    def __call__(self, sample: dict) -> Batch:
        batch = super().__call__(sample)
        lengths, inputs = self.lengths(sample["items"]), batch.inputs
        row = inputs["input_ids"].shape[-1]
        firsts = lengths.cumsum() - lengths if self.packed else np.arange(len(lengths)) * row
        asked = inputs["labels"].numpy().ravel().copy()
        asked[firsts] = 0
        inputs |= {"selected": torch.from_numpy(select_tokens(asked)), "firsts": torch.from_numpy(firsts),
                   "lengths": torch.from_numpy(lengths.astype(np.float32))}  # fmt: skip
        batch.counts["cells"] = len(lengths)
        return batch


COLLATORS = {"masked_lm": MaskedLMCollator, "cells": CellCollator, "genes": GeneCollator, "length": LengthCollator}
