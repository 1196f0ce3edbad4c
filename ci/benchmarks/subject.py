# SPDX-License-Identifier: Apache-2.0
"""Which recipe a benchmark measures (`--recipe recipes/NAME`, or RECIPE in the environment), and what is its own.

Imported first: it puts the recipe's files where they can be imported. Imports nothing heavy. A new entry of SUBJECTS
needs a pair of marks for its table in docs/speed.md.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[2]


class Shape(NamedTuple):
    """A size, as far as memory depends on it."""

    model_tag: str
    num_parameters: float
    num_layers: int
    width: int


PARQUET = {"parquet": (".parquet",)}
PROTEINS = {"fasta": (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz"), **PARQUET}


class Subject(NamedTuple):
    """A model's name in tables, its sizes by their names there, which of them are taken unless asked for, its data."""

    title: str
    sizes: dict[str, Shape]
    quick: str  # one that takes seconds
    usual: str
    on_gpus: tuple[str, ...]
    rows: str = "proteins"
    max_seq_length: int = 1024
    # By the name of their format to `datasets.load_dataset`; the column is the recipe's own.
    file_endings: Mapping[str, tuple[str, ...]] = MappingProxyType(PROTEINS)
    give: str = "FASTA, or parquet with a column `sequence`"
    real: str = "proteins_8k.parquet"  # taken if it lies in shared/data beside the repository
    # What a peer's memory depends on beside the shape.
    vocab_size: int = 33
    head_dim_of_dropout: int | None = None  # channels of a head, if weights of attention are dropped

    def tag(self, size: str) -> str:
        """The `model_tag` of a size."""
        return self.sizes[size].model_tag


SUBJECTS = {
    "esm2_native_te": Subject(
        "ESM-2",
        {
            "1M": Shape("esm2_t4_1M", 0.8e6, 4, 128),
            "8M": Shape("esm2_t6_8M_UR50D", 7.5e6, 6, 320),
            "35M": Shape("esm2_t12_35M_UR50D", 33.5e6, 12, 480),
            "150M": Shape("esm2_t30_150M_UR50D", 148e6, 30, 640),
            "650M": Shape("esm2_t33_650M_UR50D", 651e6, 33, 1280),
            "3B": Shape("esm2_t36_3B_UR50D", 2840e6, 36, 2560),
        },
        quick="1M",
        usual="8M",
        on_gpus=("150M", "650M", "3B"),
    ),
    "amplify_native_te": Subject(
        "AMPLIFY",
        {
            "1M": Shape("AMPLIFY_1M", 0.8e6, 4, 128),
            "10M": Shape("AMPLIFY_10M", 10.6e6, 6, 384),
            "120M": Shape("AMPLIFY_120M", 118e6, 24, 640),
            "350M": Shape("AMPLIFY_350M", 354e6, 32, 960),
        },
        quick="1M",
        usual="10M",
        on_gpus=("120M", "350M"),
    ),
    "geneformer_native_te": Subject(
        "Geneformer",
        {
            "1M": Shape("geneformer_1M", 4.1e6, 4, 128),
            "10M": Shape("Geneformer-V1-10M", 10.3e6, 6, 256),
            "30M": Shape("gf-12L-30M-i2048", 39.6e6, 12, 512),
        },
        quick="1M",
        usual="10M",
        on_gpus=("10M", "30M"),
        rows="cells",
        max_seq_length=2048,
        file_endings=PARQUET,
        give="parquet with a column `input_ids`",
        real="single_cells_400.parquet",
        vocab_size=25_426,
        head_dim_of_dropout=64,
    ),
}


def recipe_folder() -> Path:
    """Of the command line, else of the environment, where it is noted for the processes that this one starts."""
    words = sys.argv[1:]
    given = next((word.partition("=")[2] for word in words if word.startswith("--recipe=")), None)
    if "--recipe" in words[:-1]:
        given = words[words.index("--recipe") + 1]
    name = Path(given or os.environ.get("RECIPE") or "recipes/esm2_native_te").name
    if name not in SUBJECTS:
        known = ", ".join(f"recipes/{one}" for one in SUBJECTS)
        sys.exit(f"error: --recipe {given or os.environ['RECIPE']}: speed is measured of {known}.")
    os.environ["RECIPE"] = f"recipes/{name}"
    return ROOT / "recipes" / name


def suffix(recipe: str) -> str:
    """What the names of files and tables of this recipe have at their end; those of the first one have nothing."""
    return "" if recipe == next(iter(SUBJECTS)) else f"_{recipe}"


RECIPE = recipe_folder()
SUBJECT = SUBJECTS[RECIPE.name]
if str(RECIPE) not in sys.path:
    sys.path.insert(0, str(RECIPE))
if __name__ == "__main__":  # for ci/gpu.sh
    print(*SUBJECT.on_gpus, sep=",")
