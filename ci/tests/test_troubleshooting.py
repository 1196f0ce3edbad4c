# SPDX-License-Identifier: Apache-2.0
"""The messages that docs/troubleshooting.md explains are those that the recipes give."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"CUDA out of memory", "Address already in use"}  # PyTorch's own
NUMBER = {"the loss is nan; first in the": "first in the"}


def test_messages_are_given():
    files = [*ROOT.glob("recipes/*/*.py"), *ROOT.glob("recipes/*/*/*.py")]
    code = "\n".join(path.read_text() for path in files if "tests" not in path.parts)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences of several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    told = {message for words in first for message in re.findall(r"`([^`]+)`", words)} - ELSEWHERE
    assert len(told) > 20
    assert [message for message in told if NUMBER.get(message, message) not in code] == []
