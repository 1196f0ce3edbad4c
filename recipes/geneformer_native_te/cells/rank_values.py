# SPDX-License-Identifier: Apache-2.0
"""Rank-value tokens: a cell is its genes, those first that it has more of than is usual for them.

A gene's score is x / n * 10,000 / median, in float64 and in this order; x its count, n the cell's sum of counts: of
all genes (Geneformer), or of the vocabulary's (BioNeMo, of_known). Genes with a count go in falling order of their
score, equal ones in the order of the file's columns (duplicates count as the first of them). Of these the first
`longest` stay, special tokens counted: V2 has <cls> ... <eos>, BioNeMo [CLS] ....
Sources: transcriptome_tokenizer.py of Geneformer, singlecell/dataset.py of BioNeMo 2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cells.dictionaries import TARGET_SUM, Rule


class Block(NamedTuple):
    """Counts of cells that follow each other in a file, as rows of a sparse matrix; `first` is the first's number."""

    first: int
    indptr: np.ndarray  # [cells + 1]
    columns: np.ndarray
    values: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Of each entry the place of its cell in the block."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))


@dataclass(frozen=True)
class Genes:
    """A file's columns: `place[column]` is a gene's number or -1; tokens and medians are by that number.

    Numbers rise with the first column of each gene; `repeated` says that several columns are the same gene.
    """

    place: np.ndarray
    tokens: np.ndarray
    medians: np.ndarray
    repeated: bool


KINDS = {  # of cells that cannot be trained on, in the order in which they are looked for
    "nan": "{value} for gene {gene}", "negative": "a negative count, {value:g} of gene {gene}",
    "fraction": "{value:g} of gene {gene}, which is no whole count", "empty": "no counts",
    "unknown": "no gene of the vocabulary",
}  # fmt: skip


def faults(block: Block, genes: Genes, whole: bool = True) -> list[tuple[str, int, int]]:
    """(kind, cell, entry) of each cell of the block that cannot be ranked; entry -1 where it is the whole cell."""
    values, found = block.values, {}
    checks = [("nan", ~np.isfinite(values)), ("negative", values < 0)]
    if whole and values.dtype.kind == "f":
        checks.append(("fraction", values != np.floor(values)))
    for kind, bad in checks:
        if bad.any():
            entries = np.flatnonzero(bad)
            cells = np.searchsorted(block.indptr, entries, side="right") - 1
            for cell, at in zip(*np.unique(cells, return_index=True), strict=True):
                found.setdefault(int(cell), (kind, int(cell), int(entries[at])))
    cells, some = len(block.indptr) - 1, values > 0
    rows = block.rows
    counted = np.bincount(rows[some], minlength=cells)
    known = np.bincount(rows[some & (genes.place[block.columns] >= 0)], minlength=cells)
    for cell in np.flatnonzero(known == 0).tolist():
        found.setdefault(cell, ("unknown" if counted[cell] else "empty", cell, -1))
    return [found[cell] for cell in sorted(found)]


def scores(block: Block, genes: Genes, rule: Rule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each known gene's score in each cell, in the order of cells and of genes: (indptr, gene, score)."""
    cells, rows, places = len(block.indptr) - 1, block.rows, genes.place[block.columns]
    values = block.values.astype(np.float64)
    used = (places >= 0) & (values > 0)
    counted = used if rule.of_known else values > 0
    totals = np.bincount(rows[counted], values[counted], minlength=cells)
    rows, places, values = rows[used], places[used], values[used]
    following = (rows[1:] == rows[:-1]) if len(rows) else np.zeros(0, bool)
    if genes.repeated or (following & (places[1:] <= places[:-1])).any():
        flat, inverse = np.unique(rows * len(genes.tokens) + places, return_inverse=True)
        values = np.bincount(inverse, values, minlength=len(flat))
        rows, places = np.divmod(flat, len(genes.tokens))
    score = values / totals[rows] * TARGET_SUM / genes.medians[places]
    return np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=cells)))), places, score


def ranked(score: np.ndarray, most: int) -> np.ndarray:
    """The places of the `most` highest scores, falling, equal ones in their order."""
    falling = -score
    order = np.argsort(falling)  # several times faster than a stable one, which few cells need
    last = order[: most + 1]
    if (falling[last[1:]] == falling[last[:-1]]).any():
        order = np.argsort(falling, kind="stable")
    return order[:most]


def tokenize(block: Block, genes: Genes, rule: Rule, longest: int | None = None) -> list[np.ndarray]:
    """The tokens of each cell of the block; none of one without a known gene."""
    longest = longest or rule.longest
    room = longest - (rule.start is not None) - (rule.end is not None)
    indptr, places, score = scores(block, genes, rule)
    tokens, found = genes.tokens[places], []
    before, after = (np.array([] if one is None else [one], tokens.dtype) for one in (rule.start, rule.end))
    for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True):
        chosen = tokens[a:b][ranked(score[a:b], room)]
        found.append(np.concatenate((before, chosen, after)) if b > a else chosen)
    return found
