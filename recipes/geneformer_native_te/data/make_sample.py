#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the bundled sample: made-up cells of four types, as tokens by falling rank.

    python data/make_sample.py

Each type expresses a programme of marker genes above what all types share; depth differs from cell to cell, and what
is expressed little is often not seen, as in real data. train.parquet, validation.parquet and vocabulary.json go beside
this file. No gene of it exists.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


SEED, NUM_GENES, NUM_MARKERS = 7, 600, 60
SPECIAL = ("<pad>", "<mask>", "<cls>", "<eos>")
TYPES = ("alpha", "beta", "gamma", "delta")
NUM_CELLS = {"train": 800, "validation": 80}


def make_sample(seed: int = SEED) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Rows of both files, and the vocabulary."""
    random = np.random.default_rng(seed)
    usual = np.exp(random.normal(0, 1.2, NUM_GENES))
    programmes = np.ones((len(TYPES), NUM_GENES))
    for programme in programmes:
        programme[random.choice(NUM_GENES, NUM_MARKERS, replace=False)] = np.exp(random.normal(2.5, 0.5, NUM_MARKERS))
    rates = usual * programmes
    rates /= rates.sum(1, keepdims=True)
    kinds = random.integers(len(TYPES), size=sum(NUM_CELLS.values()))
    depths = np.exp(random.normal(6.2, 0.4, len(kinds)))
    counts = random.poisson(random.gamma(2.0, rates[kinds] * depths[:, None] / 2.0))
    scaled = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    medians = np.array([np.median(x[x > 0]) if (x > 0).any() else 1.0 for x in scaled.T])
    rows = []
    for kind, values in zip(kinds, scaled / medians, strict=True):
        genes = np.argsort(-values, kind="stable")[: int((values > 0).sum())]
        tokens = [SPECIAL.index("<cls>"), *(genes + len(SPECIAL)).tolist(), SPECIAL.index("<eos>")]
        rows.append({"input_ids": tokens, "length": len(tokens), "cell_type": TYPES[kind]})
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {f"GENE{gene:05}": gene + len(SPECIAL) for gene in range(NUM_GENES)}
    train = NUM_CELLS["train"]
    return {"train": rows[:train], "validation": rows[train:]}, vocabulary


def main() -> None:
    """Write the files."""
    folder = Path(__file__).parent
    files, vocabulary = make_sample()
    for name, rows in files.items():
        schema = {"input_ids": pa.list_(pa.int32()), "length": pa.int32(), "cell_type": pa.string()}
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema)), folder / f"{name}.parquet", compression="zstd")
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary) + "\n")


if __name__ == "__main__":
    main()
