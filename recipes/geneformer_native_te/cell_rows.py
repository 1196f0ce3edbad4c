# SPDX-License-Identifier: Apache-2.0
"""Cells as rows of tokens that exist already: genes by falling rank, one list of numbers a row."""

from functools import cached_property
from hashlib import sha256
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa

from cells.dictionaries import setting
from common.distributed import Distributed
from common.open_data import Column
from common.sizes import cache_of, size_index
from vocabulary import Vocabulary


AT_ONCE = 2_000  # rows whose tokens are held while all are measured
LABELS = ("cell_id", "barcode", "cell_type")  # columns that say which cell a row is


class Cut:
    """The rule for cells of more than `max_seq_length` tokens: the first of them, which have the highest ranks.

    Where a cell ends with the vocabulary's token of the end, so does what is left of it.
    """

    def __init__(self, vocabulary: Vocabulary, max_seq_length: int):
        self.end, self.max_seq_length = vocabulary.eos, max_seq_length

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) <= self.max_seq_length:
            return tokens
        kept = tokens[: self.max_seq_length]
        if self.end is not None and tokens[-1] == self.end:
            kept = kept.copy()
            kept[-1] = self.end
        return kept


class TokenRows:
    """Each row is a cell, the column `input_ids` its tokens."""

    def __init__(self, section: str, rows: datasets.Dataset, column: str, vocabulary: Vocabulary, max_seq_length: int):
        self.section, self.max_seq_length, self.vocabulary = section, max_seq_length, vocabulary
        self.column, self.index, self.cut = Column(rows, column), None, Cut(vocabulary, max_seq_length)
        kind = rows.data.column(column).type
        if not pa.types.is_integer(getattr(kind, "value_type", kind)) or pa.types.is_integer(kind):
            raise ValueError(
                f"{setting(section, 'input_ids_column')}={column}: the column holds {kind}, not lists of whole "
                "numbers."
            )

    def __len__(self) -> int:
        return len(self.column)

    def tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """All tokens of these rows."""
        lists = self.column[rows].combine_chunks().cast(pa.large_list(pa.int64()))
        borders, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
        return [flat[start:end] for start, end in pairwise(borders)]

    def build_index(self, distributed: Distributed) -> None:
        """Measure and check all rows, or find what an earlier run has measured; all ranks call it."""
        rows, key = self.column.rows, None
        if rows.cache_files:  # else they are held in memory
            rule = (rows._fingerprint, self.column.name, self.vocabulary.size, "cells")
            key = sha256(repr(rule).encode()).hexdigest()[:32]
        self.index = size_index(distributed, self.section or "cells", key, len(self), self.measure, cache_of(rows))

    def measure(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        """Tokens of each row. Raises ValueError for one that is no token of the vocabulary."""
        sizes = []
        for some in np.array_split(rows, max(1, -(-len(rows) // AT_ONCE))):
            tokens = self.tokens(some)
            sizes.append(np.array([len(x) for x in tokens], dtype=np.int32))
            flat = np.concatenate(tokens) if tokens else np.empty(0, np.int64)
            wrong = (flat < 0) | (flat >= self.vocabulary.size)
            if wrong.any():
                at = int(wrong.argmax())
                row = some[np.searchsorted(np.cumsum(sizes[-1]), at, side="right")]
                raise ValueError(
                    f"{setting(self.section, 'input_ids_column')}={self.column.name}: row {row} has the token "
                    f"{flat[at]}, and the vocabulary 0 to {self.vocabulary.size - 1}; give that of the cells."
                )
        return np.concatenate(sizes), None

    @property
    def max_size(self) -> int:
        return self.max_seq_length

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Tokens of each row, at most `max_seq_length`."""
        return np.minimum(self.index.sizes[rows], self.max_seq_length)

    def read(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """The rows' tokens, cut to the longest there may be."""
        return [self.cut(tokens) for tokens in self.tokens(rows)]

    @cached_property
    def identity(self) -> dict:
        """What tells this data from other data, wherever it lies: sizes of all rows, and what some of them hold."""
        some = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        content = sha256(b"".join(x.astype(np.int64).tobytes() for x in self.tokens(some))).hexdigest()[:16]
        return {"num_rows": len(self), "sizes": self.index.digest, "content": content}

    def describe(self, rows: np.ndarray, epoch: int) -> list[str]:
        """A line a row: the first genes by name, where the vocabulary has names, and what says which cell it is."""
        names = {number: token for token, number in (self.vocabulary.tokens or {}).items()}
        table = self.column.rows.with_format(None)[rows]
        others = [k for k in table if k in (*LABELS, "source", "cell")]
        lines = []
        for i, tokens in enumerate(self.tokens(rows)):
            shown = " ".join(names.get(int(t), str(t)) for t in tokens[:5])
            labels = "".join(f"  {k}={table[k][i]}" for k in others if table[k][i] is not None)
            lines.append(f"{len(tokens)} tokens: {shown}{' ...' if len(tokens) > 5 else ''}{labels}")
        return lines

    @property
    def amount(self) -> str:
        """How much it is."""
        total = cut = 0
        for first in range(0, len(self), 1_000_000):
            sizes = self.index.sizes[first : first + 1_000_000]
            total += int(np.minimum(sizes, self.max_seq_length).sum(dtype=np.int64))
            cut += int((sizes > self.max_seq_length).sum())
        more = f", {cut:,} of them cut to {self.max_seq_length} tokens" if cut else ""
        return f"{len(self):,} cells, {total:,} tokens{more}"
