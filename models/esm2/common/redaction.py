# SPDX-License-Identifier: Apache-2.0
"""Values that nobody else may see: they are passed on, and never written, printed or sent."""

import re
from typing import Any


HIDDEN = "***"
# Names of keys whose text is secret; numbers and switches, as of pad_token_id, are not.
NAMES = re.compile(r"(^|[_.-])(tokens?|password|passwd|secrets?|keys?|credentials?|auth(orization)?)($|[_.-])", re.I)
SECTIONS = ("storage_options", "download_config")  # all text in them


def redacted(value: Any, name: str = "", inside: bool = False) -> Any:
    """The same with `***` for each secret, in sections and lists too; None stays None."""
    inside = inside or name in SECTIONS
    if isinstance(value, dict):
        hide = inside or bool(NAMES.search(name))
        return {key: redacted(item, str(key), hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name, inside) for item in value]
    return HIDDEN if isinstance(value, str) and (inside or NAMES.search(name)) else value


def redacted_command(words: list[str]) -> list[str]:
    """A command line, where `section.token=...` and the like say `***`."""
    found = []
    for word in words:
        key, sign, value = word.partition("=")
        names = key.lstrip("+~-").split(".")
        if sign and (NAMES.search(names[-1]) or set(names) & set(SECTIONS)):
            word = f"{key}={HIDDEN}"
        elif sign and "{" in value:  # a whole section
            word = re.sub(r"([\w.-]+)\s*:\s*([^,{}\[\]]+)",
                          lambda m: f"{m[1]}: {HIDDEN}" if NAMES.search(m[1]) else m[0], word)  # fmt: skip
        found.append(word)
    return found
