# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of genes: their tokens, their medians, and other names; and the rule that goes with a vocabulary.

JSON, or Geneformer's pickles, of which nothing is run.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from common.safe_reading import read_plain


TARGET_SUM = 10_000
VERSION = re.compile(r"^(ENS[A-Z]*\d+)\.\d+$", re.IGNORECASE)


def setting(section: str, key: str) -> str:
    """A key of the configuration, or without a section the option of a command."""
    return f"{section}.{key}" if section else f"--{key.replace('_', '-')}"


def read_dictionary(key: str, path: str | Path) -> dict:
    """What a JSON or pickle file holds. Raises ValueError, which names `key`, for anything but a dictionary."""
    path = Path(path).expanduser()
    try:
        found = read_plain(path) if path.suffix in (".pkl", ".pickle") else json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{key}={path}: {error.strerror}.") from error
    except Exception as error:  # bytes that are no pickle raise whatever they happen to mean
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{key}={path} is no dictionary in JSON or a pickle: {reason}.") from error
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{key}={path} is no dictionary of names.")
    return found


def _values(key: str, path: str | Path, found: dict, fits: Callable, what: str) -> dict:
    """The same, unless a value is not as it should be."""
    if wrong := next((name for name, value in found.items() if not fits(value)), None):
        raise ValueError(f"{key}={path}: {wrong} has {found[wrong]!r}, not {what}.")
    return found


def read_tokens(key: str, path: str | Path) -> dict[str, int]:
    """Gene id to token; of BioNeMo's {vocab, gene_to_ens} the genes by their Ensembl ids."""
    found = read_dictionary(key, path)
    if isinstance(vocab := found.get("vocab"), dict):
        names = found.get("gene_to_ens") or {}
        found = {names.get(name, name): token for name, token in vocab.items()}
    return _values(key, path, found, lambda value: isinstance(value, int) and value >= 0, "a token")


def read_medians(key: str, path: str | Path) -> dict[str, float]:
    """Gene id to the median of its scaled counts where it is expressed."""
    found = {name: float(value) if isinstance(value, int | float) else value
             for name, value in read_dictionary(key, path).items()}  # fmt: skip
    return _values(key, path, found, lambda v: isinstance(v, float) and math.isfinite(v) and v > 0, "a number above 0")


def read_names(key: str, path: str | Path) -> dict[str, str]:
    """Other names of genes, as symbols or withdrawn ids, to the ids of a vocabulary."""
    return _values(key, path, read_dictionary(key, path), lambda value: isinstance(value, str), "the id of a gene")


@dataclass(frozen=True)
class Rule:
    """How a vocabulary's publishers make tokens of a cell; see `cells/rank_values.py`."""

    name: str
    longest: int  # tokens of a cell, special ones counted
    start: int | None = None
    end: int | None = None
    of_known: bool = False  # counts are divided by the sum over the genes of the vocabulary, not over all


def rule_of(tokens: dict[str, int]) -> Rule:
    """The rule that goes with a vocabulary: BioNeMo's has `[CLS]`, Geneformer's V2 `<cls>` and `<eos>`, V1 neither."""
    if "[CLS]" in tokens:
        return Rule("BioNeMo", 2048, start=tokens["[CLS]"], of_known=True)
    if "<cls>" in tokens and "<eos>" in tokens:
        return Rule("V2", 4096, start=tokens["<cls>"], end=tokens["<eos>"])
    return Rule("V1", 2048)


@dataclass(frozen=True, eq=False)
class Dictionary:
    """All that turns the genes of a file into tokens; `tokens` None stands for every gene, `medians` None for 1."""

    tokens: dict[str, int] | None = None
    medians: dict[str, float] | None = None
    names: dict[str, str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def rule(self) -> Rule:
        return Rule("V1", 2048) if self.tokens is None else rule_of(self.tokens)

    @cached_property
    def known(self) -> dict[str, tuple[int, float]]:
        """Of each gene that can be ranked its token and median."""
        medians = self.medians if self.medians is not None else dict.fromkeys(self.tokens, 1.0)
        return {name: (token, medians[name]) for name, token in self.tokens.items()
                if name in medians and name[:1] not in "<["}  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """Tells it from others."""
        parts = [
            sorted(part.items()) if part is not None else None for part in (self.tokens, self.medians, self.names)
        ]
        return sha256(repr(parts).encode()).hexdigest()[:32]

    def gene(self, name: str) -> str | None:
        """The vocabulary's id of a gene that a file calls so: as it is, without version, by its other names."""
        name = name.strip()
        bare = VERSION.sub(r"\1", name)
        for form in (name, bare, bare.upper()):
            for one in (form, self.names.get(form)):
                if one is not None and self.tokens is not None and one in self.known:
                    return one
        return self.names.get(bare, self.names.get(name, bare)) if self.tokens is None else None


def read_all(section: str, tokens: dict[str, int] | None, medians: str | None, gene_mapping: str | None) -> Dictionary:
    """The dictionaries that keys of a section name. Raises ValueError for what is missing, or fits nothing."""
    if tokens is None:
        raise ValueError(
            "model_kwargs.vocabulary is not set to a file: counts become tokens by the names of its genes; give a "
            "published token dictionary, or one that make_vocabulary.py writes."
        )
    if medians is None:
        raise ValueError(
            f"{setting(section, 'medians')} is not set: ranks need each gene's median; give the file published "
            "with the vocabulary, or one that make_vocabulary.py writes."
        )
    names = read_names(setting(section, "gene_mapping"), gene_mapping) if gene_mapping else {}
    found = Dictionary(tokens, read_medians(setting(section, "medians"), medians), names)
    if not found.known:
        raise ValueError(
            f"{setting(section, 'medians')}={medians} has none of the vocabulary's genes; give the pair of one model."
        )
    return found
