# SPDX-License-Identifier: Apache-2.0
"""Medians of genes over a corpus in one pass: a histogram for each gene, in bins 1/256 of a power of two wide.

A median found so is off by at most 1/512 of itself (0.2%), whatever the number of cells. Scaled counts lie between
2^-13 (one count of 82 million) and 2^14: a gene has 27 * 256 bins.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cells.dictionaries import Dictionary, Rule
from cells.genes import genes_of
from cells.rank_values import Block, Genes, faults, scores
from cells.token_cache import Options, Part, columns_of, sentence, sound
from common.sizes import save


LOWEST, HIGHEST = -13, 14
BINS = 256
WIDTH = (HIGHEST - LOWEST) * BINS
GENES = 1024  # of a block of histograms
BLOCKS = 5  # of cells, whose counts are added up at once
ALL_GENES = Rule("V1", 0)


def bins_of(values: np.ndarray) -> np.ndarray:
    """The bin of each scaled count."""
    mantissa, exponent = np.frexp(values)  # mantissa in [1/2, 1)
    found = (exponent - 1 - LOWEST) * BINS + ((2 * mantissa - 1) * BINS).astype(np.int64)
    return np.clip(found, 0, WIDTH - 1)


def middles() -> np.ndarray:
    """The middle of each bin."""
    power, part = np.divmod(np.arange(WIDTH), BINS)
    return np.ldexp(1 + (part + 0.5) / BINS, power + LOWEST)


def count(block: Block, genes: Genes) -> tuple[np.ndarray, np.ndarray]:
    """The bins of all genes, gene * WIDTH + bin, that have scaled counts of a block, rising; and how many."""
    _, places, score = scores(block, genes, ALL_GENES)
    bins, numbers = np.unique((places * WIDTH + bins_of(score)).astype(np.uint32), return_counts=True)
    return bins, numbers.astype(np.uint32)


def together(counted: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The same of several blocks."""
    bins = np.concatenate([bins for bins, _ in counted])
    order = np.argsort(bins, kind="stable")  # which merges what is sorted already
    bins = bins[order]
    first = np.flatnonzero(np.r_[True, bins[1:] != bins[:-1]][: len(bins)])
    numbers = np.concatenate([numbers for _, numbers in counted])[order]
    return bins[first], np.add.reduceat(numbers, first) if len(first) else numbers


def count_part(path: Path, part: Part, options: Options) -> int:
    """Count a part's cells, those that are bad apart, and save what is not 0; how many they are."""
    one, genes, names = columns_of(replace(part, first=0, stop=0), options)
    counted = [(np.zeros(0, np.uint32), np.zeros(0, np.uint32))]
    number = left_out = 0
    for block in one.blocks(part.first, part.stop):
        cells = len(block.indptr) - 1
        taken = np.ones(cells, bool)
        for kind, cell, entry in faults(block, genes):
            if options.bad_cells == "refuse" and kind != "empty":
                text = sentence(part, names, block, (kind, cell, entry))
                raise ValueError(f"{text}; --bad-cells=leave_out leaves such cells out.")
            taken[cell] = False
        left_out += int((~taken).sum())
        number += int(taken.sum())
        counted.append(count(sound(block, taken), genes))
        if len(counted) > BLOCKS:
            counted = [together(counted)]
    arrays = packed(*together(counted), genes_of(names, options.dictionary), number, left_out)
    save(path, lambda file: np.savez_compressed(file, **arrays))
    return number


def packed(bins: np.ndarray, numbers: np.ndarray, ids: list[str], cells: int, left_out: int = 0) -> dict:
    """What `Medians` adds up."""
    return {"gaps": np.diff(bins, prepend=np.uint32(0)), "counts": numbers, "ids": np.array(ids),
            "cells": np.array([cells, left_out])}  # fmt: skip


class Medians:
    """Histograms of all genes, added up part by part."""

    def __init__(self):
        self.places: dict[str, int] = {}
        self.blocks: list[np.ndarray] = []  # of [GENES, WIDTH]: to grow copies nothing
        self.cells = self.left_out = 0

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """What `count_part` has saved, as `packed` makes it."""
        place = [self.places.setdefault(name, len(self.places)) for name in arrays["ids"].tolist()]
        while len(self.places) > len(self.blocks) * GENES:
            self.blocks.append(np.zeros((GENES, WIDTH), np.uint32))
        gene, where = np.divmod(np.cumsum(arrays["gaps"], dtype=np.int64), WIDTH)
        borders = np.searchsorted(gene, np.arange(len(place) + 1))
        for one, first, stop in zip(place, borders[:-1], borders[1:], strict=True):
            self.of(one)[where[first:stop]] += arrays["counts"][first:stop]
        self.cells += int(arrays["cells"][0])
        self.left_out += int(arrays["cells"][1])

    def of(self, place: int) -> np.ndarray:
        """The histogram of a gene."""
        return self.blocks[place // GENES][place % GENES]

    def result(self, min_cells: int = 1) -> dict[str, float]:
        """The median of each gene that is expressed in at least `min_cells` cells, by id in their order."""
        values, found = middles(), {}
        for name in sorted(self.places):
            sums = np.cumsum(self.of(self.places[name]), dtype=np.int64)
            if sums[-1] >= min_cells:
                low, high = np.searchsorted(sums, [(sums[-1] + 1) // 2, sums[-1] // 2 + 1])
                found[name] = float((values[low] + values[high]) / 2)
        return found


def vocabulary_of(medians: dict[str, float], rule: str) -> dict[str, int]:
    """Tokens for these genes, with the special tokens of a published rule: V1, V2 or BioNeMo."""
    special = {"V1": ["<pad>", "<mask>"], "V2": ["<pad>", "<mask>", "<cls>", "<eos>"],
               "BioNeMo": ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]"]}[rule]  # fmt: skip
    return {name: token for token, name in enumerate([*special, *medians])}


def everything(names: dict[str, str] | None = None) -> Dictionary:
    """Every gene of a file, by its own id or the one that `names` has for it."""
    return Dictionary(names=names or {})
