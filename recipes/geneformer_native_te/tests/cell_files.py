# SPDX-License-Identifier: Apache-2.0
"""Cells in files as people have them, for tests; and how tokens are made of them, in plain loops."""

from pathlib import Path

import numpy as np

from cells import written


GENES = [f"ENSG{number:011d}" for number in range(100, 140)]


def counts(cells: int = 30, genes: int = 40, seed: int = 0) -> np.ndarray:
    """Whole counts, two thirds of them 0, no cell empty."""
    random = np.random.default_rng(seed)
    found = random.poisson(2.0, (cells, genes)) * (random.random((cells, genes)) < 0.35)
    found[:, 0] += found.sum(1) == 0
    return found.astype(np.float32)


def write_h5ad(path: Path, dense: np.ndarray, form: str = "csr", names: list[str] | None = None, **more) -> Path:
    """With Ensembl ids, if no names are given."""
    return written.write_h5ad(path, dense, names or GENES[: dense.shape[1]], form, **more)


def write_scdl(folder: Path, dense: np.ndarray, names: list[str] | None = None, header: bool = False) -> Path:
    """With Ensembl ids, if no names are given."""
    return written.write_scdl(folder, dense, names or GENES[: dense.shape[1]], header)


def tokens_in_loops(dense: np.ndarray, names: list[str], tokens: dict[str, int], medians: dict[str, float],
                    rule: str, longest: int) -> list[list[int]]:  # fmt: skip
    """The published rules, one number at a time: V1, V2, BioNeMo."""
    found = []
    for cell in dense.astype(float).tolist():
        summed: dict[str, float] = {}
        total = 0.0
        for name, value in zip(names, cell, strict=True):
            gene = name.split(".")[0]
            known = gene in tokens and gene in medians
            if rule != "BioNeMo" or known:
                total += value
            if known:
                summed[gene] = summed.get(gene, 0.0) + value
        scored = [(value / total * 10_000 / medians[gene], gene) for gene, value in summed.items() if value > 0]
        order = sorted(range(len(scored)), key=lambda i: (-scored[i][0], i))
        ranked = [tokens[scored[i][1]] for i in order]
        if rule == "V2":
            ranked = [tokens["<cls>"], *ranked[: longest - 2], tokens["<eos>"]]
        elif rule == "BioNeMo":
            ranked = [tokens["[CLS]"], *ranked[: longest - 1]]
        found.append(ranked[:longest] if scored else [])
    return found
