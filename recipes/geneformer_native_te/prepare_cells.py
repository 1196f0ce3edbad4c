# SPDX-License-Identifier: Apache-2.0
r"""Cells of h5ad files or SCDL folders as tokens in Arrow files, for trainings elsewhere and for other programs.

    python prepare_cells.py 'my_cells/*.h5ad' --vocabulary my_genes/vocabulary.json --medians my_genes/medians.json \
        --out tokens
    python train_ddp.py --config-name my_cells dataset.load_dataset_kwargs.path=arrow \
        'dataset.load_dataset_kwargs.data_files=tokens/*.arrow' model_kwargs.vocabulary=my_genes/vocabulary.json

Training with path=h5ad or path=scdl does the same by itself, and keeps the result in the cache of `datasets`. Columns:
`input_ids`, `length`, `source`, `cell` (the row in its file), and those of obs that are asked for. An interrupted
command continues when it is started again.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import get_args

from cells.dictionaries import read_all, read_tokens
from cells.token_cache import Options, Policy, convert, found_cells, kind_of, stamp
from common.command import command, writing


def main(words: list[str]) -> None:
    """Read the command line, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="h5ad files, or SCDL folders; folders of them, patterns")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument(
        "--vocabulary", required=True, help="JSON or pickle: gene to token; says whose rule is followed"
    )
    parser.add_argument("--medians", required=True, help="JSON or pickle: gene to median")
    parser.add_argument("--max-seq-length", type=int, help="tokens of a cell; default: the rule's, 2,048 or V2 4,096")
    parser.add_argument("--gene-column", help="var's column with the ids of genes")
    parser.add_argument("--gene-mapping", help="JSON or pickle: other names, as symbols, to ids")
    parser.add_argument("--layer", help="where counts are, if not in raw.X or X")
    parser.add_argument("--bad-cells", choices=get_args(Policy), default="refuse")
    parser.add_argument("--obs-columns", nargs="*", default=[], help="columns of obs to keep")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args(words)
    kind = kind_of(asked.files[0]) or "h5ad"
    files = found_cells("", {"path": kind, "data_files": asked.files})
    dictionary = read_all("", read_tokens("--vocabulary", asked.vocabulary), asked.medians, asked.gene_mapping)
    longest = dictionary.rule.longest if asked.max_seq_length is None else asked.max_seq_length
    if longest < 3:
        raise ValueError(f"--max-seq-length={longest} must be at least 3.")
    options = Options(
        "", dictionary, asked.gene_column, asked.layer, asked.bad_cells, tuple(asked.obs_columns), longest
    )
    job = sha256(repr(([stamp(file) for file in files], options.key)).encode()).hexdigest()
    with writing(asked.out):
        asked.out.mkdir(parents=True, exist_ok=True)
        begun = asked.out / "job.txt"
        if begun.exists() and begun.read_text() != job:
            raise ValueError(f"{asked.out} was begun with other files or options; remove it to start anew.")
        begun.write_text(job)
        convert(asked.out, files, kind, options, asked.processes, quiet=False)
    done = json.loads((asked.out / "done.json").read_text())
    number = sum(json.loads(file.read_text())["cells"] for file in sorted(asked.out.glob("[0-9]*.json")))
    print(*done["notes"], sep="\n")
    for one in done["wrong"].values():
        print(f"{one['count']:,} cells left out, the first: {one['text']}")
    print(f"{number:,} cells by the rule of {dictionary.rule.name}: {asked.out}/*.arrow")


if __name__ == "__main__":
    with command():
        main(sys.argv[1:])
