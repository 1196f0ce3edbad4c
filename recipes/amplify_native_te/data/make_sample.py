# SPDX-License-Identifier: Apache-2.0
"""Write `train.parquet` and `validation.parquet`, synthetic protein families that a small model learns in minutes.

python data/make_sample.py
"""

import argparse
import math
import random
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


SEED = 42
NUM_DOMAINS = 12
DOMAIN_LENGTHS = (24, 40)
NUM_FAMILIES = 240
TRAIN_PER_FAMILY = 15
VALIDATION_PER_FAMILY = 1

# Percent of the residues of UniProtKB/Swiss-Prot.
BACKGROUND = {
    "A": 8.25, "R": 5.53, "N": 4.06, "D": 5.46, "C": 1.38, "Q": 3.93, "E": 6.72, "G": 7.07, "H": 2.27, "I": 5.91,
    "L": 9.65, "K": 5.80, "M": 2.41, "F": 3.86, "P": 4.74, "S": 6.64, "T": 5.36, "W": 1.10, "Y": 2.92, "V": 6.86,
}  # fmt: skip

# The substitutions that BLOSUM62 scores best.
SIMILAR = {
    "A": "SGV", "R": "KQ", "N": "DSH", "D": "EN", "C": "AS", "Q": "EKR", "E": "DQK", "G": "ASN", "H": "NYQ",
    "I": "VLM", "L": "IMV", "K": "RQE", "M": "LIV", "F": "YLW", "P": "AST", "S": "TAN", "T": "SVA", "W": "YF",
    "Y": "FHW", "V": "ILA",
}  # fmt: skip

LINKER_RESIDUES = "GSPETAKQ"
LINKER_LENGTHS = (3, 8)

# (quantile, length): proteins of UniRef90, straight lines between.
LENGTH_QUANTILES = (
    (0.00, 28), (0.05, 71), (0.10, 95), (0.25, 163), (0.50, 278), (0.75, 400), (0.90, 566), (0.95, 739), (0.98, 1089),
    (0.99, 1361), (1.00, 2400),
)  # fmt: skip

# The chance that a position shows its consensus residue; the other times mostly a similar one.
CONSERVED, TOLERANT = 0.96, 0.65
CONSERVED_SHARE = 0.8
SIMILAR_SHARE = 0.8
INDEL_RATE = 0.005


def draw_residues(rng: random.Random, num_residues: int) -> list[str]:
    """Draw residues with the background's frequencies."""
    return rng.choices(list(BACKGROUND), list(BACKGROUND.values()), k=num_residues)


def make_domain(rng: random.Random) -> list[tuple[str, float]]:
    """Draw a domain's profile: for each position the consensus residue and the chance to see it."""
    consensus = draw_residues(rng, rng.randint(*DOMAIN_LENGTHS))
    return [(residue, CONSERVED if rng.random() < CONSERVED_SHARE else TOLERANT) for residue in consensus]


def make_linker(rng: random.Random) -> list[tuple[str, float]]:
    """Draw a flexible stretch between two domains, the same in all members of a family."""
    return [(residue, TOLERANT) for residue in rng.choices(LINKER_RESIDUES, k=rng.randint(*LINKER_LENGTHS))]


def make_family(rng: random.Random, domains: list, length: int) -> list[tuple[str, float]]:
    """Draw a family's profile: one to three domains in a row, repeated up to `length` positions."""
    architecture = rng.sample(domains, rng.randint(1, 3))
    profile = [("M", 1.0)]
    while len(profile) < length:
        for domain in architecture:
            profile += domain + make_linker(rng)
    return profile[:length]


def draw_member(rng: random.Random, profile: list[tuple[str, float]]) -> str:
    """Draw one protein of a family: substitutions by the profile, then single insertions and deletions."""
    member = []
    for residue, conservation in profile:
        if rng.random() >= conservation:
            similar = rng.random() < SIMILAR_SHARE
            residue = rng.choice(SIMILAR[residue]) if similar else draw_residues(rng, 1)[0]
        indel = rng.random() / INDEL_RATE if len(member) > 0 else math.inf
        if indel < 0.5:
            continue
        member.append(residue)
        if indel < 1.0:
            member += draw_residues(rng, 1)
    return "".join(member)


def family_length(quantile: float) -> int:
    """Read a length off `LENGTH_QUANTILES`."""
    for (q0, length0), (q1, length1) in pairwise(LENGTH_QUANTILES):
        if quantile <= q1:
            return round(length0 + (length1 - length0) * (quantile - q0) / (q1 - q0))
    raise ValueError(f"quantile {quantile} is not between 0 and 1")


def make_sample(seed: int) -> dict[str, list[dict[str, str]]]:
    """Draw all rows of both parts, in random order."""
    rng = random.Random(seed)
    domains = [make_domain(rng) for _ in range(NUM_DOMAINS)]
    parts = {"train": [], "validation": []}
    for i in range(NUM_FAMILIES):
        profile = make_family(rng, domains, family_length((i + 0.5) / NUM_FAMILIES))
        for j in range(TRAIN_PER_FAMILY + VALIDATION_PER_FAMILY):
            part = "train" if j < TRAIN_PER_FAMILY else "validation"
            parts[part].append({"id": f"family{i:03d}_member{j:02d}", "sequence": draw_member(rng, profile)})
    for rows in parts.values():
        rng.shuffle(rows)
    return parts


def unigram_entropy(sequences: list[str]) -> float:
    """Return, in nats, the loss of a model that knows the residues' frequencies and nothing else."""
    counts = Counter("".join(sequences))
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def describe(sequences: list[str]) -> str:
    """Return one line of statistics."""
    lengths = sorted(map(len, sequences))
    return (
        f"{len(lengths)} rows, {sum(lengths)} residues, length {lengths[0]} to {lengths[-1]}, "
        f"mean {statistics.mean(lengths):.0f}, median {statistics.median(lengths):.0f}, "
        f"p99 {lengths[int(0.99 * len(lengths))]}, unigram entropy {unigram_entropy(sequences):.3f} nats"
    )


def main() -> None:
    """Write both files and print their statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    for part, rows in make_sample(args.seed).items():
        pq.write_table(pa.Table.from_pylist(rows), args.out / f"{part}.parquet", compression="zstd")
        print(f"{part}: {describe([row['sequence'] for row in rows])}")


if __name__ == "__main__":
    main()
