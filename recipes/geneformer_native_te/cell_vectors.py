# SPDX-License-Identifier: Apache-2.0
"""Vectors of cells by a model that is there: cells of an h5ad file as its tokens, a mean over genes or <cls>."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from cell_rows import Cut, TokenRows
from cells.dictionaries import read_tokens
from cells.token_cache import open_cells, options_of
from common.distributed import Distributed
from common.precision import Precision, agreed_precision
from pretrained import FAMILY, open_model
from tokens.encoding import open_encoder, token_vectors
from tokens.masked_lm import TokenModel
from vocabulary import FILE, PUBLISHED, Vocabulary, open_vocabulary


class Opened(NamedTuple):
    """A model and the cells of a file in its tokens; `job` tells them from others."""

    model: TokenModel
    precision: Precision
    vocabulary: Vocabulary
    rows: datasets.Dataset
    source: TokenRows
    by_cls: bool
    job: dict

    def cells(self, tokens: list[np.ndarray], apart: int | None = None) -> np.ndarray:
        """[cells, width]: of <cls>, or the mean over genes, `apart` from one of them; 0 for a cell without any."""
        found = []
        for row, vectors in zip(tokens, token_vectors(self.model, self.precision, tokens), strict=True):
            if self.by_cls:
                found.append(vectors[0])
                continue
            genes = ~np.isin(row, [*self.vocabulary.special, *([] if apart is None else [apart])])
            found.append(vectors[genes].mean(0) if genes.any() else np.zeros(vectors.shape[1], vectors.dtype))
        return np.stack(found)


def open_all(distributed: Distributed, options: argparse.Namespace, columns: list[str]) -> Opened:
    """What the command line names, on every rank; `columns` of obs come along. Raises ValueError for a mistake."""
    if options.tokens < 1:
        raise ValueError(f"--tokens={options.tokens} must be at least 1.")
    if Path(options.file).suffix != ".h5ad":
        raise ValueError(f"{options.file} is no h5ad file; its name must end with .h5ad.")
    model, weights = open_encoder(FAMILY, open_model, options.model, options.layer_backend, distributed.device)
    beside = Path(options.model) / FILE
    name = options.vocabulary or (str(beside) if beside.is_file() else model.config.vocabulary)
    vocabulary = open_vocabulary(name)
    if vocabulary.size > model.config.vocab_size or vocabulary.pad != model.config.pad_token_id:
        raise ValueError(f"--vocabulary={name} has {vocabulary.size} tokens, and is not that of {options.model}.")
    if options.cls and vocabulary.cls is None:
        raise ValueError(f"--cls: the vocabulary {name} has no <cls>; leave --cls out for the mean over genes.")
    longest = model.config.max_position_embeddings
    tokens = None if name in PUBLISHED else read_tokens("--vocabulary", name)
    if tokens is None:
        raise ValueError(f"--vocabulary: {name} is known by its numbers alone; give its file, gene to token.")
    keys = {"medians": options.medians, "gene_mapping": options.gene_mapping, "gene_column": options.gene_column,
            "layer": options.layer, "bad_cells": "leave_out", "obs_columns": columns}  # fmt: skip
    with distributed.main_first():
        asked = options_of("", tokens, longest, **keys)
        processes = max(1, (os.cpu_count() or 1) // distributed.num_local_ranks)
        rows, notes = open_cells("", {"path": "h5ad", "data_files": options.file}, asked, processes,
                                 not distributed.is_main)  # fmt: skip
    for note in notes:
        distributed.say(note.removeprefix(": "))
    source = TokenRows("", rows, "input_ids", vocabulary, longest)
    source.cut = Cut(vocabulary, longest)
    source.build_index(distributed)
    wide = model.config.hidden_size >= 256
    bits, _ = agreed_precision(distributed, options.precision, bf16_pays=wide)
    precision = Precision(distributed.device, bits, bf16_pays=wide)
    job = {"data": source.identity, "model": weights, "bf16": precision.dtype is not None, "cls": options.cls}
    return Opened(model, precision, vocabulary, rows, source, options.cls, job)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say which cells, which model and how."""
    parser.add_argument("file", help="an h5ad file with counts")
    parser.add_argument("model", help="a final model, a checkpoint, a run's folder, or a name on the hub")
    parser.add_argument("--medians", required=True, help="JSON or pickle: gene to median, of the model's vocabulary")
    parser.add_argument("--vocabulary", help="JSON or pickle: gene to token (default: the model's own file)")
    parser.add_argument("--cls", action="store_true", help="the vector of <cls>, not the mean over genes")
    parser.add_argument("--gene-mapping", help="JSON or pickle: other names, as symbols, to ids")
    parser.add_argument("--gene-column", help="var's column with the ids of genes")
    parser.add_argument("--layer", help="where counts are, if not in raw.X or X")
    parser.add_argument("--tokens", type=int, default=8192, help="how many go through the model at once")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--layer-backend", choices=("auto", "te", "cpp", "torch"), default="auto")
