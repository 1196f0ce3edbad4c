# SPDX-License-Identifier: Apache-2.0
"""Write `train.parquet`, `oas.parquet`, `scop.parquet` and `validation.parquet`: synthetic proteins of three kinds.

python data/make_mixture.py
"""

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from make_sample import CONSERVED, SEED, TOLERANT, describe, draw_member, draw_residues, make_domain, make_sample


NUM_ROWS = {"train": 1500, "oas": 300, "scop": 300}  # for training; a tenth of it for validation
# Of an antibody's chain: framework, loop, framework, ..., in residues (about those of human heavy and light chains).
HEAVY = (25, 8, 17, 8, 38, 13, 11)
LIGHT = (26, 6, 17, 3, 36, 9, 10)


def make_chain(rng: random.Random, lengths: tuple[int, ...]) -> list[tuple[str, float]]:
    """Draw a chain's profile: frameworks are conserved, loops hardly."""
    profile = []
    for i, length in enumerate(lengths):
        profile += [(residue, CONSERVED if i % 2 == 0 else 0.3) for residue in draw_residues(rng, length)]
    return profile


def make_mixture(seed: int) -> dict[str, list[dict[str, str]]]:
    """Draw the rows of all files: proteins of many domains, antibodies as `heavy|light`, and single domains."""
    rng, proteins = random.Random(seed), make_sample(seed)
    heavy, light = ([make_chain(rng, lengths) for _ in range(3)] for lengths in (HEAVY, LIGHT))
    domains = [make_domain(rng) + [(r, TOLERANT) for r in draw_residues(rng, rng.randint(30, 120))] for _ in range(40)]

    def rows(kind: str, number: int, part: str) -> list[dict[str, str]]:
        if kind == "train":
            sequences = [row["sequence"] for row in proteins[part][:number]]
        elif kind == "oas":
            pairs = [(rng.choice(heavy), rng.choice(light)) for _ in range(number)]
            sequences = ["|".join(draw_member(rng, chain) for chain in pair) for pair in pairs]
        else:
            sequences = [draw_member(rng, rng.choice(domains)) for _ in range(number)]
        return [{"name": f"{kind}_{part}{i:04d}", "sequence": s} for i, s in enumerate(sequences)]

    files = {kind: rows(kind, number, "train") for kind, number in NUM_ROWS.items()}
    files["validation"] = [row for kind, number in NUM_ROWS.items() for row in rows(kind, number // 10, "validation")]
    rng.shuffle(files["validation"])
    return files


def main() -> None:
    """Write the files and print their statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    for name, rows in make_mixture(args.seed).items():
        pq.write_table(pa.Table.from_pylist(rows), args.out / f"{name}.parquet", compression="zstd")
        print(f"{name}: {describe([row['sequence'].replace('|', '') for row in rows])}")


if __name__ == "__main__":
    main()
