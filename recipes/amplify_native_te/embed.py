# SPDX-License-Identifier: Apache-2.0
"""Embeddings of proteins: one vector a protein, and with --per-residue one a residue, as a parquet file.

    python embed.py my.fasta MODEL out.parquet
    torchrun --nproc_per_node=2 embed.py my.fasta MODEL out.parquet --per-residue

MODEL is a final model, a checkpoint, a run's folder, or a name on the hub. A protein's vector is the mean of its
residues' after the last layer. Interrupted, the same command continues. Columns: `row` in the file, `id` (or name,
accession, entry) where there is one, `num_residues`, `embedding`, `residue_embeddings`; rows as in the file, null
where a sequence is empty.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from common.command import command
from common.distributed import Distributed, end_of_process, process_group
from common.parts import Parts
from common.precision import Precision, agreed_precision
from dataset import SequenceRows
from pretrained import FAMILY, open_model, trained_length
from tokens.encoding import batches, open_encoder, token_vectors
from tokens.masked_lm import TokenModel
from tokens.protein_rows import LABELS, open_proteins


FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
ROWS_PER_PART = 512  # of what is written at once, and not computed again after an interruption
LONGEST = 2**31 - 1


def open_sequences(distributed: Distributed, file: str, column: str) -> tuple[datasets.Dataset, SequenceRows]:
    """The rows of a file, FASTA unless its name says otherwise, and where their sequences are."""
    kind = FORMATS.get(Path(file.removesuffix(".gz")).suffix, "fasta")
    column = "sequence" if kind == "fasta" else column
    with distributed.main_first():
        rows = open_proteins("data", {"path": kind, "data_files": file, "split": "train"}, column)
    source = SequenceRows("data", rows, column, LONGEST, seed=0)
    source.build_index(distributed)
    return rows, source


def vectors(model: TokenModel, precision: Precision, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Of each protein, given with the tokens of start and end, a vector for each residue, [residues, width]."""
    return [some[1:-1] for some in token_vectors(model, precision, tokens)]


def table(rows: np.ndarray, ids: list | None, found: dict[int, np.ndarray], width: int, per_residue: bool, half: bool):
    """The columns of some rows; `found` are the vectors of residues by row."""
    kind, dtype = (pa.float16(), np.float16) if half else (pa.float32(), np.float32)
    columns = {"row": pa.array(rows, pa.int64())}
    if ids is not None:
        columns["id"] = pa.array(ids, pa.string())
    empty = np.zeros((0, width), dtype)
    each = [found.get(int(row), empty) for row in rows]
    columns["num_residues"] = pa.array([len(one) for one in each], pa.int32())
    absent = pa.array([len(one) == 0 for one in each])
    means = np.stack([one.mean(0) if len(one) else np.zeros(width) for one in each]).astype(dtype)
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(means.ravel(), kind), width, mask=absent)
    if per_residue:
        flat = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(each).astype(dtype).ravel(), kind), width)
        offsets = pa.array(np.cumsum([0, *map(len, each)]), pa.int64())
        columns["residue_embeddings"] = pa.LargeListArray.from_arrays(offsets, flat, mask=absent)
    return pa.table(columns)


def embed(distributed: Distributed, options: argparse.Namespace) -> None:
    """All of it; every rank takes its share of the parts."""
    target, device = Path(options.target), distributed.device
    with distributed.fail_together():
        if target.exists():
            raise ValueError(f"{target} exists; move it away or give another name.")
        if options.tokens < 1:
            raise ValueError(f"--tokens={options.tokens} must be at least 1.")
        rows, source = open_sequences(distributed, options.file, options.column)
        model, weights = open_encoder(FAMILY, open_model, options.model, options.layer_backend, device)
        wide = model.config.hidden_size >= 256
        bits, _ = agreed_precision(distributed, options.precision, bf16_pays=wide)
        precision = Precision(device, bits, bf16_pays=wide)
        job = {"data": source.identity, "model": weights, "per_residue": options.per_residue, "half": options.half}
        job |= {"column": options.column, "bf16": precision.dtype is not None, "rows_per_part": ROWS_PER_PART}
        parts = Parts(distributed, target, job)
    sizes, count = source.sizes(np.arange(len(source)), 0), -(-len(source) // ROWS_PER_PART)
    longest, trained = int(sizes.max(initial=0)), trained_length(model.config)
    if longest > trained:
        distributed.say(
            f"{int((sizes > trained).sum()):,} of {len(source):,} proteins are longer than the {trained:,} tokens "
            f"that the model was trained on, up to {longest - 2:,} residues: they are embedded whole."
        )
    mine = {number: np.arange(number * ROWS_PER_PART, min((number + 1) * ROWS_PER_PART, len(source)))
            for number, is_there in parts.mine(count) if not is_there}  # fmt: skip
    ranks, left = min(distributed.num_ranks, count), sum(int(sizes[some].sum()) for some in mine.values())
    with tqdm(total=left * ranks, unit=" tokens", unit_scale=True, disable=not distributed.is_main) as bar:
        for number, some in mine.items():
            found: dict[int, np.ndarray] = {}
            for batch in batches(sizes[some], options.tokens):
                tokens = source.read(some[batch], 0)
                found |= zip(some[batch].tolist(), vectors(model, precision, tokens), strict=True)
                bar.update(int(sizes[some[batch]].sum()) * ranks)
            names = next((name for name in LABELS if name in rows.column_names), None)
            ids = [str(name) for name in rows[some][names]] if names else None
            done = table(some, ids, found, model.config.hidden_size, options.per_residue, options.half)
            parts.save(number, done)
    parts.join(count)
    distributed.say(f"{len(source):,} proteins, {model.config.hidden_size} numbers each: {target}")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="FASTA, also .gz; or .parquet, .csv, .tsv, .json, .arrow")
    parser.add_argument("model")
    parser.add_argument("target", help="the parquet file to write")
    parser.add_argument("--per-residue", action="store_true", help="a vector for each residue as well")
    parser.add_argument("--half", action="store_true", help="16-bit numbers instead of 32")
    parser.add_argument("--column", default="sequence", help="where sequences are, if the file is no FASTA")
    parser.add_argument("--tokens", type=int, default=8192, help="how many go through the model at once")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--layer-backend", choices=("auto", "te", "cpp", "torch"), default="auto")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """In a process group of its own."""
    options = parse(words)
    with process_group(seed=0) as distributed:
        embed(distributed, options)


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
