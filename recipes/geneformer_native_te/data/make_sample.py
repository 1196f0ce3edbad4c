# SPDX-License-Identifier: Apache-2.0
"""Write the sample: synthetic cells of six types, their counts as h5ad and SCDL, their tokens, medians and vocabulary.

    python data/make_sample.py

A gene's mean follows a log-normal law over genes. Each type raises its own marker programme; all types share
programmes that are on to a degree of the cell's own, as the cell cycle is; a cell's depth is log-normal, its counts
gamma-Poisson, and weakly expressed genes drop out. `baseline.json` has the losses of what knows less than a model
should: how often each gene is expressed, and how often at each rank.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
from cells.dictionaries import Dictionary  # noqa: E402
from cells.genes import match  # noqa: E402
from cells.medians import Medians, count, packed, vocabulary_of  # noqa: E402
from cells.rank_values import Block, tokenize  # noqa: E402
from cells.written import csr, write_h5ad, write_scdl  # noqa: E402


SEED = 7
CELLS = {"train": 600, "validation": 80}
NUM_GENES = 400
TYPES = ("T cell", "B cell", "monocyte", "fibroblast", "endothelial cell", "cardiomyocyte")
MARKERS, MARKER_FOLD = 30, 12.0
STATES, STATE_GENES, STATE_FOLD = 4, 25, 8.0
DEPTH, DEPTH_SPREAD, DISPERSION, DROPOUT = 420, 0.3, 0.35, 0.25
NEAR = 4  # ranks on either side that a rank's frequencies are counted over


def names() -> list[str]:
    """Ids as Ensembl writes them, of no real gene."""
    return [f"ENSG99{number:09d}" for number in range(1, NUM_GENES + 1)]


def make_counts(num_cells: int, random: np.random.Generator, genes: dict) -> tuple[np.ndarray, list[str]]:
    """Counts [cells, genes] and each cell's type."""
    kinds = random.choice(len(TYPES), num_cells, p=genes["shares"])
    activity = random.beta(0.4, 0.8, (num_cells, STATES))
    means = genes["base"] * np.exp(genes["programmes"][kinds] + activity @ genes["states"])
    means *= random.lognormal(np.log(DEPTH), DEPTH_SPREAD, num_cells)[:, None] / means.sum(1, keepdims=True)
    found = random.poisson(means * random.gamma(1 / DISPERSION, DISPERSION, means.shape))
    found[random.random(means.shape) < DROPOUT * np.exp(-means)] = 0
    return found.astype(np.float32), [TYPES[kind] for kind in kinds]


def make_genes(random: np.random.Generator) -> dict:
    """What all cells share: usual expression, the types' programmes, the states'."""
    order = random.permutation(NUM_GENES)
    markers = order[: len(TYPES) * MARKERS].reshape(len(TYPES), MARKERS)
    programmes, states = np.zeros((len(TYPES), NUM_GENES)), np.zeros((STATES, NUM_GENES))
    for kind, chosen in enumerate(markers):
        programmes[kind, chosen] = np.log(MARKER_FOLD) * random.uniform(0.5, 1.2, MARKERS)
    for state in states:
        state[random.choice(order[len(TYPES) * MARKERS :], STATE_GENES, replace=False)] = np.log(STATE_FOLD)
    shares = random.dirichlet(np.full(len(TYPES), 8.0))
    return {"base": random.lognormal(0, 1.1, NUM_GENES), "programmes": programmes, "states": states, "shares": shares}


def baselines(train: list[np.ndarray], validation: list[np.ndarray], size: int) -> dict[str, float]:
    """Mean of -log p over the genes of the validation: p the gene's frequency, and its frequency near that rank."""
    longest = max(map(len, [*train, *validation]))
    table = np.zeros((longest, size))
    for cell in train:
        table[np.arange(len(cell)), cell] += 1
    overall = table.sum(0) + 1e-3
    overall /= overall.sum()
    sums = np.concatenate((np.zeros((1, size)), np.cumsum(table, 0)))
    ends = np.clip(np.arange(longest)[:, None] + [-NEAR, NEAR + 1], 0, longest)
    near = sums[ends[:, 1]] - sums[ends[:, 0]] + 50 * overall  # as if 50 more had been seen anywhere
    near /= near.sum(1, keepdims=True)
    ranks = np.concatenate([np.arange(len(cell)) for cell in validation])
    genes = np.concatenate(validation)
    return {"frequency_loss": float(-np.log(overall[genes]).mean()),
            "rank_position_loss": float(-np.log(near[ranks, genes]).mean())}  # fmt: skip


def main(folder: Path = FOLDER) -> None:
    """Write all of it."""
    random = np.random.default_rng(SEED)
    genes, ids = make_genes(random), names()
    cells = {name: make_counts(number, random, genes) for name, number in CELLS.items()}
    everything, *_ = match("sample", "", {"index": ids}, None, Dictionary())
    medians = Medians()
    medians.add(packed(*count(Block(0, *csr(cells["train"][0])), everything), ids, CELLS["train"]))
    values = medians.result()
    dictionary = Dictionary(vocabulary_of(values, "V2"), values)
    known, *_ = match("sample", "", {"index": ids}, None, dictionary)
    tokens = {}
    for name, (dense, kinds) in cells.items():
        tokens[name] = tokenize(Block(0, *csr(dense)), known, dictionary.rule)
        write_h5ad(folder / f"{name}.h5ad", dense, ids, obs={"cell_type": kinds})
        table = pa.table({"input_ids": pa.array(tokens[name], pa.list_(pa.uint16())),
                          "length": pa.array(map(len, tokens[name]), pa.int32()), "cell_type": kinds})  # fmt: skip
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    shutil.rmtree(folder / "scdl", ignore_errors=True)
    write_scdl(folder / "scdl" / "validation", cells["validation"][0], ids, header=True)
    inner = {name: [cell[1:-1] for cell in some] for name, some in tokens.items()}
    found = baselines(inner["train"], inner["validation"], len(dictionary.tokens))
    for name, what in (("vocabulary", dictionary.tokens), ("medians", values), ("baseline", found)):
        (folder / f"{name}.json").write_text(json.dumps(what, indent=1) + "\n")


if __name__ == "__main__":
    main()
