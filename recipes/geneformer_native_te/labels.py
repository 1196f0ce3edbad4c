# SPDX-License-Identifier: Apache-2.0
"""What cells and genes are told apart by: classes from a column, or from a file of gene sets."""

import json
from pathlib import Path

import datasets
import numpy as np

from collator import COLLATORS, MaskedLMCollator, Rule
from common.distributed import Distributed
from common.open_data import Column, check_column
from tokens.layout import IGNORED
from vocabulary import Vocabulary


GENE_SETS = "a JSON file of {class: [names of genes]}"


def class_names(rows: datasets.Dataset | datasets.IterableDataset, label_column: str) -> list[str]:
    """The classes in a column, sorted. Raises ValueError where they are none."""
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError("dataset.load_dataset_kwargs.streaming=true cannot be combined with model_kwargs.task=cells.")
    check_column("dataset", "label_column", label_column, rows.column_names)
    found = sorted(str(value) for value in rows.unique(label_column) if value is not None)
    if not 2 <= len(found) <= 10_000:
        raise ValueError(f"dataset.label_column={label_column} has {len(found)} different values; give 2 to 10,000.")
    return found


def check_column_is_named(section: str, label_column: str | None) -> None:
    """Raise ValueError where it is not."""
    if label_column is None:
        raise ValueError(f"{section}.label_column is not set; model_kwargs.task=cells needs the classes' column.")


def gene_sets(section: str, path: str | None) -> dict[str, list[str]]:
    """The sets in a file. Raises ValueError where there is none, and for a gene in two of them."""
    setting = f"{section}.gene_classes={path}"
    if path is None:
        raise ValueError(f"{section}.gene_classes is not set; model_kwargs.task=genes needs {GENE_SETS}.")
    try:
        found = json.loads(Path(path).read_text())
        sets = {str(name): [str(gene) for gene in genes] for name, genes in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{setting}: this is not {GENE_SETS}.") from error
    genes = [gene for some in sets.values() for gene in some]
    if len(sets) < 2 or len({*genes}) != len(genes):
        raise ValueError(f"{setting}: it needs at least two classes, and each gene in only one of them.")
    return sets


def class_of_token(section: str, path: str | None, classes: list[str], vocabulary: Vocabulary) -> np.ndarray:
    """The class of each token, IGNORED for those in no set. Raises ValueError where no gene is known."""
    sets = gene_sets(section, path)
    if vocabulary.tokens is None:
        raise ValueError(
            f"{section}.gene_classes={path} needs the names of genes: give model_kwargs.vocabulary, a JSON file of "
            "{token: number}."
        )
    if unknown := sorted({*sets} - {*classes}):
        raise ValueError(f"{section}.gene_classes={path}: the model has no class {unknown[0]}; it has {classes}.")
    found = np.full(vocabulary.size, IGNORED)
    for name, genes in sets.items():
        numbers = [vocabulary.tokens[gene] for gene in genes if gene in vocabulary.tokens]
        found[numbers] = classes.index(name)
    if (found == IGNORED).all():
        raise ValueError(f"{section}.gene_classes={path}: the vocabulary has none of its genes.")
    return found


def build_collator(
    section: str, task: str, classes: list[str] | None, gene_classes: str | None, rule: Rule, distributed: Distributed,
    *options,
) -> MaskedLMCollator:  # fmt: skip
    """The collator of a task; the options are every collator's."""
    collate = COLLATORS[task].on(distributed, *options)
    collate.rule = rule
    if task == "genes":
        collate.class_of_token = class_of_token(section, gene_classes, list(classes), rule.vocabulary)
    return collate


class LabelledCells:
    """A source of cells with the class of each, IGNORED where a cell has none.

    Raises ValueError for a class that the model does not have.
    """

    def __init__(self, source, rows: datasets.Dataset, column: str | None, classes: list[str]):
        check_column_is_named(source.section, column)
        check_column(source.section, "label_column", column, rows.column_names)
        self.source, self.column, self.classes = source, Column(rows, column), list(classes)
        if unknown := sorted({str(value) for value in rows.unique(column) if value is not None} - {*classes}):
            raise ValueError(
                f"{source.section}.label_column={column} has the class {unknown[0]}, and the model "
                f"{', '.join(classes[:20])}."
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, rows: np.ndarray, epoch: int) -> list[tuple[np.ndarray, int]]:
        """Tokens and class of each."""
        number = {name: i for i, name in enumerate(self.classes)}
        labels = [IGNORED if value is None else number[str(value)] for value in self.column[rows].to_pylist()]
        return list(zip(self.source.read(rows, epoch), labels, strict=True))

    def baseline(self) -> str:
        """What a model reaches that says the most frequent class of all cells; of the first ones."""
        first = self.column[np.arange(min(len(self), 10_000))].to_pylist()
        names = [str(value) for value in first if value is not None]
        most = max((names.count(name) for name in {*names}), default=0) / max(1, len(names))
        return f"{len(self.classes)} classes; the most frequent has {most:.1%} of the cells: the accuracy to be above"
