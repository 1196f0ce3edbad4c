# SPDX-License-Identifier: Apache-2.0
"""What every recipe shares, whatever it trains; imports the standard library, pinned packages and this folder only."""

from pathlib import Path


RECIPE = Path(__file__).resolve().parents[1]  # the folder of the recipe around this one
