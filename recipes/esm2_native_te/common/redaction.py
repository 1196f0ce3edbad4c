# SPDX-License-Identifier: Apache-2.0
"""Values that nobody else may see: they are passed on, and never written, printed or sent."""

import re
from collections.abc import Sequence
from typing import Any

import yaml


HIDDEN = "***"
# Names of keys whose text is secret; numbers and switches, as of pad_token_id, are not, nor what labels are called.
NAMES = re.compile(
    r"(^|[_.-])(tokens?|password|passwd|secrets?|(?<!label_)keys?|credentials?|auth(orization)?)($|[_.-])", re.I
)
SECTIONS = ("storage_options", "download_config")  # all text in them


def redacted(value: Any, name: str = "", inside: bool = False) -> Any:
    """The same with `***` for each secret, in sections, lists and addresses too; None stays None."""
    inside = inside or name in SECTIONS
    if isinstance(value, dict):
        hide = inside or bool(NAMES.search(name))
        return {key: redacted(item, str(key), hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name, inside) for item in value]
    if not isinstance(value, str):
        return value
    if inside or NAMES.search(name):
        return HIDDEN
    value = re.sub(r"://[^/@\s]+@", f"://{HIDDEN}@", value)
    return re.sub(r"(://[^?\s]*\?)[^\s=&]+=\S*", rf"\1{HIDDEN}", value)  # a link that is signed lets anybody in


def without_hidden(config: dict, read: Sequence[str] = (), is_read: bool = False) -> dict:
    """What a run wrote down without the secrets, which the environment may have.

    In the sections that are `read` an address with a secret in it stays, for `refuse_hidden` to ask for.
    """
    shown = {}
    for key, value in config.items():
        if isinstance(value, dict):
            shown[key] = without_hidden(value, read, is_read or key in read)
        elif value != HIDDEN and (is_read or HIDDEN not in str(value)):
            shown[key] = value
    return shown


def refuse_hidden(values: dict[str, Any], way: str) -> None:
    """Raise ValueError, with the `way` to give it anew, for a value that a run did not write down; by dotted keys."""
    for key, value in values.items():
        if HIDDEN in str(value):
            raise ValueError(f"{key}={value}: {HIDDEN} stands for what no run writes down; {way}.")


def redacted_command(words: list[str]) -> list[str]:
    """A command line, where `section.token=...` and the like say `***`; what has no secret in it is as it was."""
    found = []
    for word in words:
        key, sign, text = word.partition("=")
        names = key.lstrip("+~-").split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        shown = redacted(value, names[-1], bool(set(names) & set(SECTIONS)))
        found.append(f"{key}={shown}" if sign and shown != value else word)
    return found
