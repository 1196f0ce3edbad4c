# SPDX-License-Identifier: Apache-2.0
"""What a run of Geneformer counts and reports."""

from tokens.masked_lm import BETTER, LOSS_NAME, UNIT, batch_sums, summary


__all__ = ["BETTER", "LOSS_NAME", "UNIT", "batch_sums", "summary"]
