# SPDX-License-Identifier: Apache-2.0
"""Which tokens are masked: amino acids only, or as AMPLIFY was trained."""

from typing import Literal

import numpy as np

from tokens import masked_batches
from tokens.layout import IGNORED


VOCABULARY = ["<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "|", *"LAGVSERTIDPKQNFYMHWCB"]
PAD, MASK = VOCABULARY.index("<pad>"), VOCABULARY.index("<mask>")
NEVER_MASKED = [VOCABULARY.index(token) for token in ("<pad>", "<bos>", "<eos>")]
FIRST_RESIDUE, NUM_RESIDUES = VOCABULARY.index("L"), 20  # the 20 amino acids; behind them is B

Masking = Literal["amino_acids", "published"]


def mask_tokens(
    tokens: np.ndarray, mlm_probability: float, masking: Masking, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking: of the tokens drawn, 80% become <mask>, 10% a random one, 10% stay.

    Drawn, and put in their place, are amino acids alone; as published, all but <pad>, <bos> and <eos> are drawn, and
    any of the 27 tokens may be put there.
    """
    if masking == "published":
        can_be, first, number = ~np.isin(tokens, NEVER_MASKED), 0, len(VOCABULARY)
    else:
        first, number = FIRST_RESIDUE, NUM_RESIDUES
        can_be = (tokens >= first) & (tokens < first + number)
    chosen = can_be & (random.random(len(tokens)) < mlm_probability)
    labels = np.where(chosen, tokens, IGNORED)
    kind = random.random(len(tokens))
    others = random.integers(first, first + number, len(tokens))
    masked = np.where(chosen & (kind < 0.8), MASK, np.where(chosen & (kind >= 0.9), others, tokens))
    return masked, labels


class MaskedLMCollator(masked_batches.MaskedLMCollator):
    """Batches of AMPLIFY, by `masking`."""

    pad_token = PAD
    masking: Masking = "amino_acids"

    def mask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """By `mask_tokens`."""
        return mask_tokens(tokens, self.mlm_probability, self.masking, random)
