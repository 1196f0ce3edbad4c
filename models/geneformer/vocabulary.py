# SPDX-License-Identifier: Apache-2.0
"""Which token is which: the published vocabularies by their numbers, or a JSON file of tokens."""

import json
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

from common.safe_reading import read_plain


FILE = "vocabulary.json"  # beside a model's weights
PARTS = {"pad": ("<pad>", "[PAD]"), "mask": ("<mask>", "[MASK]"), "cls": ("<cls>", "[CLS]"), "eos": ("<eos>", "[SEP]")}


class Vocabulary(NamedTuple):
    """Numbers of tokens: `cls` and `eos` may be None; `special` are all that are no gene; `tokens` has the names."""

    size: int
    pad: int
    mask: int
    cls: int | None
    eos: int | None
    special: tuple[int, ...]
    tokens: dict[str, int] | None = None

    @property
    def genes(self) -> list[int]:
        """The numbers of all genes, rising."""
        return sorted({*range(self.size)} - {*self.special})


# Of the published dictionaries. Genes come after the special tokens.
PUBLISHED = {
    "V1": Vocabulary(25426, pad=0, mask=1, cls=None, eos=None, special=(0, 1)),
    "V2": Vocabulary(20275, pad=0, mask=1, cls=2, eos=3, special=(0, 1, 2, 3)),
    "BioNeMo": Vocabulary(25429, pad=2, mask=1, cls=0, eos=3, special=(0, 1, 2, 3, 4)),
}


def name_of_size(vocab_size: int) -> str | None:
    """The published vocabulary of so many tokens, if there is one."""
    return next((name for name, known in PUBLISHED.items() if known.size == vocab_size), None)


@cache
def open_vocabulary(name: str) -> Vocabulary:
    """A published vocabulary by name, or that of a JSON file or a pickle: {token: number}, also inside of `vocab`.

    Names of special tokens begin with < or [. Raises ValueError for what is neither, and for a file that lacks one of
    the two that training needs or numbers that do not run from 0 on.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    path, how = Path(name).expanduser(), "a JSON file of {token: number}"
    if not path.is_file():
        raise ValueError(f"vocabulary={name}: no such file, and none of {', '.join(PUBLISHED)}; give {how}.")
    try:
        tokens = read_plain(path) if path.suffix in (".pkl", ".pickle") else json.loads(path.read_text())
        tokens = tokens.get("vocab", tokens)
        numbered = sorted(tokens.values()) == list(range(len(tokens)))
    except (ValueError, AttributeError, TypeError, UnpicklingError) as error:
        raise ValueError(f"vocabulary={name}: this is not a JSON dictionary of tokens; give {how}.") from error
    if not numbered:
        raise ValueError(f"vocabulary={name}: its numbers must be 0 to {len(tokens) - 1}, each once.")
    found = {part: next((tokens[t] for t in names if t in tokens), None) for part, names in PARTS.items()}
    if missing := [PARTS[part][0] for part in ("pad", "mask") if found[part] is None]:
        raise ValueError(f"vocabulary={name}: it has no {' and no '.join(missing)}; add what is missing.")
    special = tuple(sorted(number for token, number in tokens.items() if token[:1] in ("<", "[")))
    return Vocabulary(len(tokens), **found, special=special, tokens=tokens)
