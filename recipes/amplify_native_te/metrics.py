# SPDX-License-Identifier: Apache-2.0
"""What a run of AMPLIFY counts and reports."""

from tokens.masked_lm import LOSS_NAME, UNIT, batch_sums, summary


__all__ = ["LOSS_NAME", "UNIT", "batch_sums", "summary"]
