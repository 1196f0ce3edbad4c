# SPDX-License-Identifier: Apache-2.0
"""What commands on cells share: a model that is there, cells of any source as its tokens, and their vectors."""

import argparse
import os
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from cell_rows import LABELS, TokenRows
from cells.dictionaries import read_tokens
from cells.token_cache import PATHS, in_words_of_a_command, kind_of, open_cells, options_of
from common.distributed import Distributed
from common.open_data import open_rows, saved_to_disk
from common.precision import Precision, agreed_precision
from pretrained import FAMILY, open_model
from tokens.encoding import open_encoder, token_vectors
from tokens.masked_lm import TokenModel
from vocabulary import FILE, PUBLISHED, Vocabulary, open_vocabulary


FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
PLACES = ("source", "cell")  # columns of cells that were counts: the file, and the row there


class Encoder(NamedTuple):
    """A model and its vocabulary, of this name; `job` tells it and how it is used from others."""

    model: TokenModel
    precision: Precision
    vocabulary: Vocabulary
    name: str
    by_cls: bool
    job: dict

    @property
    def longest(self) -> int:
        """Tokens of a cell, at most."""
        return self.model.config.max_position_embeddings

    def vectors(self, tokens: list[np.ndarray], apart: int | None = None) -> np.ndarray:
        """[cells, width]: of <cls>, or the mean over genes, `apart` from one of them; NaN for a cell without any."""
        found = []
        for row, vectors in zip(tokens, token_vectors(self.model, self.precision, tokens), strict=True):
            if self.by_cls:
                found.append(vectors[0])
                continue
            genes = ~np.isin(row, [*self.vocabulary.special, *([] if apart is None else [apart])])
            found.append(vectors[genes].mean(0) if genes.any() else np.full(vectors.shape[1], np.nan, vectors.dtype))
        return np.stack(found)


def open_all(distributed: Distributed, options: argparse.Namespace) -> Encoder:
    """The model that the command line names, on every rank. Raises ValueError for a mistake."""
    if options.tokens < 1:
        raise ValueError(f"--tokens={options.tokens} must be at least 1.")
    model, weights = open_encoder(FAMILY, open_model, options.model, options.layer_backend, distributed.device)
    beside = Path(options.model) / FILE
    name = options.vocabulary or (str(beside) if beside.is_file() else model.config.vocabulary)
    try:
        vocabulary = open_vocabulary(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if vocabulary.size > model.config.vocab_size or vocabulary.pad != model.config.pad_token_id:
        raise ValueError(f"--vocabulary={name} has {vocabulary.size} tokens, and is not that of {options.model}.")
    if options.cls and vocabulary.cls is None:
        raise ValueError(f"--cls: the vocabulary {name} has no <cls>; leave --cls out for the mean over genes.")
    wide = model.config.hidden_size >= 256
    bits, _ = agreed_precision(distributed, options.precision, bf16_pays=wide)
    precision = Precision(distributed.device, bits, bf16_pays=wide)
    job = {"model": weights, "bf16": precision.dtype is not None, "cls": options.cls}
    return Encoder(model, precision, vocabulary, name, options.cls, job)


def one_kind(data: Sequence[str]) -> str | None:
    """What kind of cells all of these are: h5ad, scdl, or None for tables of tokens. Raises ValueError for several."""
    kinds = {kind_of(name): name for name in data}
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(kinds.values())} are of two kinds; give them to two commands.")
    return next(iter(kinds))


def open_source(distributed: Distributed, options: argparse.Namespace, data: Sequence[str], encoder: Encoder,
                columns: dict[str, str | None]) -> tuple[datasets.Dataset, TokenRows]:  # fmt: skip
    """Rows of cells, and their tokens, on every rank; `columns` by the option that names them come along.

    Raises ValueError for a user's mistake.
    """
    kind, asked_by = one_kind(data), {column: option for option, column in columns.items() if column}
    with distributed.main_first(), in_words_of_a_command():
        if kind in PATHS:
            tokens = None if encoder.name in PUBLISHED else read_tokens("--vocabulary", encoder.name)
            if tokens is None:
                raise ValueError(
                    f"--vocabulary: {encoder.name} is known by its numbers alone, and counts become tokens by the "
                    "names of genes; give its file, gene to token."
                )
            keys = {"medians": options.medians, "gene_mapping": options.gene_mapping, "layer": options.layer,
                    "gene_column": options.gene_column, "bad_cells": "leave_out", "asked_by": asked_by}  # fmt: skip
            asked = options_of("", tokens, encoder.longest, **keys)
            processes = max(1, (os.cpu_count() or 1) // distributed.num_local_ranks)
            rows, notes = open_cells("", {"path": kind, "data_files": [*data]}, asked, processes,
                                     not distributed.is_main)  # fmt: skip
        else:
            rows, notes = open_table(data, options.input_ids_column, asked_by), []
    for note in notes:
        distributed.say(note)
    source = TokenRows("", rows, options.input_ids_column if kind is None else "input_ids", encoder.vocabulary,
                       encoder.longest)  # fmt: skip
    source.build_index(distributed)
    return rows, source


def open_table(data: Sequence[str], column: str, asked_by: Mapping[str, str]) -> datasets.Dataset:
    """Rows of tokens that exist already, with columns that options ask for.

    Raises ValueError for a file that is none, and a column that is not there.
    """
    folder = Path(data[0]).expanduser()
    if folder.is_dir() and saved_to_disk(folder):
        if len(data) > 1:
            raise ValueError(f"{data[0]} is a folder of save_to_disk: give it alone, or parquet files.")
        kwargs = {"path": str(folder)}
    else:
        files = [file for name in data for file in tables(name)]
        formats = {FORMATS.get(Path(file).suffix): file for file in files}
        if None in formats or len(formats) > 1:
            wrong = formats.get(None, " and ".join(map(str, formats.values())))
            raise ValueError(
                f"{wrong}: cells are read from h5ad files, SCDL folders, or tables of tokens of one kind: "
                f"{', '.join(FORMATS)}, or a folder of save_to_disk."
            )
        kwargs = {"path": next(iter(formats)), "data_files": files}
    labels = tuple(dict.fromkeys([*PLACES, *LABELS, *asked_by]))
    rows = open_rows("", kwargs | {"split": "train"}, {"input_ids_column": column}, labels)
    if missing := [name for name in asked_by if name not in rows.column_names]:
        raise ValueError(
            f"{asked_by[missing[0]]}: {data[0]} has no column {missing[0]}; it has {', '.join(rows.column_names)}."
        )
    return rows


def tables(name: str) -> list[str]:
    """A file or pattern as it is, or the tables of a folder, of one format. Raises ValueError where there is none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not folder.exists() and not glob(str(folder), recursive=True):
            raise ValueError(f"{name}: no such file; give a full path or one from {Path.cwd()}.")
        return [name]
    found = [sorted(map(str, folder.rglob(f"*{ending}"))) for ending in FORMATS]
    return next((files for files in found if files), [name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say which cells, which model and how."""
    parser.add_argument("data", nargs="+", help="h5ad files, SCDL folders, or tables of tokens; folders, patterns")
    parser.add_argument("model", help="a final model, a checkpoint, a run's folder, or a name on the hub")
    parser.add_argument("--medians", help="of counts: JSON or pickle, gene to median, of the model's vocabulary")
    parser.add_argument("--vocabulary", help="JSON or pickle: gene to token (default: the model's own file)")
    parser.add_argument("--cls", action="store_true", help="the vector of <cls>, not the mean over genes")
    parser.add_argument("--gene-mapping", help="JSON or pickle: other names, as symbols, to ids")
    parser.add_argument("--gene-column", help="var's column with the ids of genes")
    parser.add_argument("--layer", help="where counts are, if not in raw.X or X")
    parser.add_argument("--input-ids-column", default="input_ids", help="where tokens are, in a table of them")
    parser.add_argument("--tokens", type=int, default=8192, help="how many go through the model at once")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--layer-backend", choices=("auto", "te", "cpp", "torch"), default="auto")
