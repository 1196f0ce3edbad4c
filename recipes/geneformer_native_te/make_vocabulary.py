# SPDX-License-Identifier: Apache-2.0
"""A vocabulary and medians of your own cells, in one pass: what training from scratch needs to know of a corpus.

    python make_vocabulary.py 'my_cells/*.h5ad' --out my_genes
    python make_vocabulary.py scdl/train --out my_genes --rule BioNeMo --min-cells 100

Writes vocabulary.json (gene to token) and medians.json (gene to the median of its counts, scaled to 10,000 a cell,
over the cells that express it; the error is at most 0.2%). Files are h5ad, SCDL folders, folders of either, or
patterns. An interrupted command continues when it is started again.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from cells.dictionaries import read_names
from cells.medians import Medians, count_part, everything, vocabulary_of
from cells.token_cache import Options, Policy, found_cells, in_parts, kind_of, parts_of, stamp
from common.command import command, writing
from common.sizes import read_chunk, save


def main(words: list[str]) -> None:
    """Read the command line, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="h5ad files, SCDL folders, folders of either, patterns")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--rule", choices=("V1", "V2", "BioNeMo"), default="V2", help="whose special tokens")
    parser.add_argument("--min-cells", type=int, default=1, help="genes that fewer cells express are left out")
    parser.add_argument("--gene-column", help="var's column with the ids of genes")
    parser.add_argument("--gene-mapping", help="JSON: other names, as symbols, to ids")
    parser.add_argument("--layer", help="where counts are, if not in raw.X or X")
    parser.add_argument("--bad-cells", choices=get_args(Policy)[:2], default="refuse")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args(words)
    files = [(file, kind) for pattern in asked.files for kind in [kind_of(pattern) or "h5ad"]
             for file in found_cells("", {"path": kind, "data_files": pattern})]  # fmt: skip
    names = read_names("--gene-mapping", asked.gene_mapping) if asked.gene_mapping else None
    options = Options("", everything(names), asked.gene_column, asked.layer, asked.bad_cells)
    key = sha256(repr(([stamp(file) for file, _ in files], options.key)).encode()).hexdigest()[:16]
    work = asked.out / f".parts_{key}"
    with writing(asked.out):
        work.mkdir(parents=True, exist_ok=True)
        parts = [part for file, kind in files for part in parts_of(file, kind, options, work, quiet=False)[0]]
        paths = [work / f"{i:06d}.npz" for i in range(len(parts))]
        tasks = [(path, part, options) for path, part in zip(paths, parts, strict=True) if not path.exists()]
        in_parts(count_part, tasks, asked.processes, "counts of genes", False, len(parts))
        found = Medians()
        for path in tqdm(paths, desc="sums", unit=" parts", disable=not sys.stderr.isatty(), leave=False):
            found.add(read_chunk(path))
        medians = found.result(asked.min_cells)
        if not medians:
            raise ValueError(
                f"--min-cells {asked.min_cells}: no gene is expressed in so many of {found.cells:,} cells."
            )
        tokens = vocabulary_of(medians, asked.rule)
        for name, values in (("vocabulary", tokens), ("medians", medians)):
            text = json.dumps(values, indent=0)
            save(asked.out / f"{name}.json", lambda file, text=text: file.write(text.encode()))
        shutil.rmtree(work)
    print(f"{len(medians):,} genes from {found.cells:,} cells: {asked.out}/vocabulary.json, {asked.out}/medians.json")
    if found.left_out:
        print(f"{found.left_out:,} cells left out: they are empty or invalid")


if __name__ == "__main__":
    with command():
        main(sys.argv[1:])
