# SPDX-License-Identifier: Apache-2.0
"""In-silico perturbation: how far cells move when a gene is deleted, or expressed most of all.

    python perturb.py cells.h5ad MODEL shifts.csv --medians medians.json --genes ENSG00000141510 ENSG00000136997
    python perturb.py cells.h5ad MODEL shifts.csv --medians medians.json --action overexpress --where cell_type=T

Deleting removes a gene from a cell's ranks; overexpressing puts it first. A cell's shift is 1 minus the cosine between
its vectors with and without the change: the mean over its other genes, or <cls>. Deletion is measured in the cells
that express the gene, overexpression in all. Without --genes, every gene that the cells express is taken in turn.
Cells are of any kind that embed_cells.py takes. Columns: gene, num_cells, cosine_shift (their mean), deviation. Ranks
share the genes; an interrupted command continues when it is started again.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from cell_rows import TokenRows
from cell_vectors import Encoder, add_arguments, open_all, open_source
from cells.dictionaries import Dictionary
from common.command import command
from common.distributed import Distributed, end_of_process, process_group
from common.parts import Parts
from tokens.encoding import batches
from vocabulary import Vocabulary


ACTIONS = ("delete", "overexpress")


def perturbed(tokens: np.ndarray, gene: int, action: str, first: int, longest: int, end: int | None) -> np.ndarray:
    """A cell's tokens without the gene, or with it at the place `first`; of at most `longest`, an `end` stays last."""
    left = tokens[tokens != gene]
    if action == "delete":
        return left
    found = np.concatenate((left[:first], [gene], left[first:]))
    if len(found) > longest:
        found = found[:longest]
        if end is not None and tokens[-1] == end:
            found[-1] = end
    return found


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row of one with that of the other."""
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1, dtype=np.float64) / np.maximum(sizes, 1e-30)


def shifts(encoder: Encoder, cells: list[np.ndarray], gene: int, action: str, most: int) -> np.ndarray:
    """1 - cosine of each cell that the gene can be perturbed in; `most` tokens go through the model at once."""
    vocabulary, longest = encoder.vocabulary, encoder.longest
    begins = vocabulary.cls is not None and bool(cells) and cells[0][0] == vocabulary.cls
    special = [*vocabulary.special]
    before = [cell for cell in cells if (action == "overexpress" or (cell == gene).any())
              and (~np.isin(cell, [gene, *special])).any()]  # fmt: skip
    after = [perturbed(cell, gene, action, int(begins), longest, vocabulary.eos) for cell in before]
    found = np.zeros(len(before))
    for some in batches(np.array([len(cell) + 1 for cell in before], dtype=np.int64), max(1, most // 2)):
        old = encoder.vectors([before[i] for i in some], gene)
        found[some] = 1 - cosines(old, encoder.vectors([after[i] for i in some], gene))
    return found


def genes_asked(vocabulary: Vocabulary, wanted: list[str], cells: list[np.ndarray]) -> list[tuple[str, int]]:
    """Names and tokens. Raises ValueError for a gene that the vocabulary does not have."""
    known = vocabulary.tokens or {str(token): token for token in vocabulary.genes}
    if not wanted:
        names = {token: name for name, token in known.items()}
        used = np.unique(np.concatenate(cells)).tolist()
        return [(names[token], token) for token in used if token not in vocabulary.special]
    dictionary = Dictionary(known)
    found = [(name, dictionary.gene(name)) for name in wanted]
    if unknown := [name for name, gene in found if gene is None]:
        kind = "ids" if vocabulary.tokens else "numbers, or by --vocabulary a file with names"
        raise ValueError(f"--genes {unknown[0]}: the vocabulary has no such gene; give {kind}.")
    return [(gene, known[gene]) for _, gene in found]


def cells_asked(rows: datasets.Dataset, source: TokenRows, options: argparse.Namespace) -> np.ndarray:
    """The numbers of rows, those where obs is as asked. Raises ValueError where there is none."""
    if not options.where:
        return spread(len(source), options.max_cells)
    name, _, value = options.where.partition("=")
    column = rows.data.column(name).cast(pa.string())
    found = np.flatnonzero(pc.fill_null(pc.equal(column, value), False).to_numpy())
    if not len(found):
        some = [str(one) for one in pc.unique(column).to_pylist()[:10]]
        raise ValueError(f"--where {options.where}: there is no such cell; {name} is one of {', '.join(some)}.")
    return found[spread(len(found), options.max_cells)]


def spread(count: int, most: int) -> np.ndarray:
    """Numbers below `count`, all or `most` of them, evenly."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def perturb(distributed: Distributed, options: argparse.Namespace) -> None:
    """All of it; every rank takes its share of the genes."""
    target = Path(options.target)
    with distributed.fail_together():
        if options.where and "=" not in options.where:
            raise ValueError(f"--where {options.where}: give COLUMN=VALUE, as cell_type=fibroblast.")
        if options.max_cells < 1:
            raise ValueError(f"--max-cells={options.max_cells} must be at least 1.")
        encoder = open_all(distributed, options)
        columns = {"--where": options.where and options.where.partition("=")[0]}
        rows, source = open_source(distributed, options, options.data, encoder, columns)
        cells = [tokens.astype(np.int64) for tokens in source.read(cells_asked(rows, source, options), 0)]
        genes = genes_asked(encoder.vocabulary, options.genes, cells)
        asked = {"action": options.action, "where": options.where, "max_cells": options.max_cells, "genes": genes}
        job = encoder.job | {"data": source.identity} | {k: str(v) for k, v in asked.items()}
        parts = Parts(distributed, target, job)
    with tqdm(total=len(genes), unit=" genes", disable=not distributed.is_main) as bar:
        for number, is_there in parts.mine(len(genes)):
            if not is_there:
                name, gene = genes[number]
                found = shifts(encoder, cells, gene, options.action, options.tokens)
                mean, deviation = (found.mean(), found.std()) if len(found) else (None, None)
                parts.save(number, pa.table({"gene": [name], "num_cells": [len(found)],
                                             "cosine_shift": pa.array([mean], pa.float64()),
                                             "deviation": pa.array([deviation], pa.float64())}))  # fmt: skip
            bar.update(min(distributed.num_ranks, len(genes)))
    parts.join(len(genes), write_table)
    distributed.say(f"{len(genes):,} genes in {len(cells):,} cells, those that move them most first: {target}")


def write_table(files: list[Path], target: Path) -> None:
    """All genes as CSV, the largest shift first."""
    whole = pa.concat_tables([pq.read_table(file) for file in files])
    pa.csv.write_csv(whole.sort_by([("cosine_shift", "descending")]), target)


def main(words: list[str]) -> None:
    """In a process group of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("target", help="the CSV file to write")
    parser.add_argument("--action", choices=ACTIONS, default="delete")
    parser.add_argument("--genes", nargs="+", help="ids; default: all that the cells express")
    parser.add_argument("--where", metavar="COLUMN=VALUE", help="cells with this in obs; default: all")
    parser.add_argument("--max-cells", type=int, default=1000, help="so many of them, spread evenly (default 1000)")
    options = parser.parse_args(words)
    with process_group(seed=0) as distributed:
        perturb(distributed, options)


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
