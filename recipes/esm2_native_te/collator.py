# SPDX-License-Identifier: Apache-2.0
"""Which tokens are masked."""

import numpy as np

from tokens import masked_batches
from tokens.layout import IGNORED


PAD, MASK = 1, 32
FIRST_RESIDUE, NUM_RESIDUES = 4, 20  # the 20 amino acids are tokens 4 .. 23
FIRST_TOKEN_NOT_MASKED = 29  # tokens 4 .. 28 are residues, ambiguous ones included


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


class MaskedLMCollator(masked_batches.MaskedLMCollator):
    """Batches of ESM-2."""

    pad_token = PAD

    def mask(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """By `mask_tokens`."""
        return mask_tokens(tokens, self.mlm_probability, random)
