# SPDX-License-Identifier: Apache-2.0
"""Embeddings of cells, into the obsm of a copy of their h5ad file, and a picture of them.

    python embed_cells.py my_cells.h5ad MODEL embedded.h5ad --medians medians.json --color-by cell_type
    torchrun --nproc_per_node=2 embed_cells.py my_cells.h5ad MODEL embedded.h5ad --medians medians.json --cls

A cell's vector is the mean of its genes' after the last layer, or that of <cls>: `obsm["X_geneformer"]`, NaN for cells
that cannot be right, which are counted. The picture, `embedded.png`, has the cells along their first two principal
components. Stopped, the same command goes on.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cell_vectors import add_arguments, open_all
from cells.h5ad import index_of
from common.command import command
from common.distributed import Distributed, end_of_process, process_group
from common.parts import Parts
from tokens.encoding import batches


KEY = "X_geneformer"
CELLS_PER_PART = 512  # of what is written at once, and not computed again after an interruption
SHOWN = 50_000  # cells of the picture


def write_h5ad(source: Path, width: int, files: list[Path], target: Path) -> None:
    """A copy of the file with the vectors in its obsm, part by part."""
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        obsm = file.require_group("obsm")
        obsm.attrs["encoding-type"], obsm.attrs["encoding-version"] = "dict", "0.1.0"
        if KEY in obsm:
            del obsm[KEY]
        obs = file["obs"]
        cells = len(obs) if isinstance(obs, h5py.Dataset) else len(obs[index_of(obs)])
        out = obsm.create_dataset(KEY, (cells, width), np.float32, fillvalue=np.nan)
        out.attrs["encoding-type"], out.attrs["encoding-version"] = "array", "0.2.0"
        for part in files:
            table = pq.read_table(part)
            if len(table):  # rows of a file rise
                vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
                out[table["cell"].to_numpy()] = vectors


def chosen(target: Path, cells: np.ndarray) -> np.ndarray:
    """The vectors of these cells, which rise; no more than some thousands of others are in memory."""
    with h5py.File(target) as file:
        vectors, found = file["obsm"][KEY], []
        for first in range(0, len(vectors), 8192):
            here = cells[(cells >= first) & (cells < first + 8192)]
            found.append(vectors[first : first + 8192][here - first])
    return np.concatenate(found)


def components(vectors: np.ndarray, number: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the first principal components, and their shares of the variance."""
    centred = vectors - vectors.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred)
    values, axes = values[::-1], axes[:, ::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])  # else their signs are chance
    return centred @ axes[:, :number], values[:number] / max(values.sum(), 1e-30)


def picture(path: Path, vectors: np.ndarray, labels: list[str] | None, name: str) -> None:
    """Cells along two components, coloured by a column of obs: by its values, or as numbers if there are many."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    places, shares = components(vectors.astype(np.float64))
    figure, axis = plt.subplots(figsize=(7.5, 6))
    size = max(2.0, min(30.0, 20_000 / max(1, len(places))))
    kinds = sorted(set(labels or []))
    palette = plt.colormaps["tab10" if len(kinds) <= 10 else "tab20"]
    if labels is not None and len(kinds) > 20 and all(_is_number(kind) for kind in kinds):
        points = axis.scatter(*places.T, s=size, c=[float(label) for label in labels], linewidths=0)
        figure.colorbar(points, label=name)
    else:
        for number, kind in enumerate(kinds or [""]):
            some = np.array([label == kind for label in labels]) if labels else np.ones(len(places), bool)
            axis.scatter(*places[some].T, s=size, color=palette(number % palette.N), label=kind, linewidths=0)
        if kinds and len(kinds) <= 40:
            axis.legend(title=name, fontsize=8, markerscale=2, bbox_to_anchor=(1.02, 1), loc="upper left")
    axis.set(xlabel=f"component 1 ({shares[0]:.0%} of the variance)", ylabel=f"component 2 ({shares[1]:.0%})")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def embed(distributed: Distributed, options: argparse.Namespace) -> None:
    """All of it; every rank takes its share of the parts."""
    target = Path(options.target)
    with distributed.fail_together():
        if target.suffix != ".h5ad":
            raise ValueError(f"{target}: give a name that ends with .h5ad.")
        opened = open_all(distributed, options, [options.color_by] if options.color_by else [])
        parts = Parts(distributed, target, opened.job | {"cells_per_part": CELLS_PER_PART})
    source, rows = opened.source, opened.rows
    sizes, count = source.sizes(np.arange(len(source)), 0), -(-len(source) // CELLS_PER_PART)
    width = opened.model.config.hidden_size
    with tqdm(total=len(source), unit=" cells", unit_scale=True, disable=not distributed.is_main) as bar:
        for number, is_there in parts.mine(count):
            some = np.arange(number * CELLS_PER_PART, min((number + 1) * CELLS_PER_PART, len(source)))
            if not is_there:
                found = np.zeros((len(some), width), np.float32)
                for batch in batches(sizes[some], options.tokens):
                    found[batch] = opened.cells(source.read(some[batch], 0))
                flat = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), width)
                parts.save(number, pa.table({"cell": rows.data.column("cell").take(some), "embedding": flat}))
            bar.update(len(some) * min(distributed.num_ranks, count))
    parts.join(count, partial(write_h5ad, Path(options.file), width))
    if distributed.is_main:
        shown = np.unique(np.linspace(0, len(source) - 1, SHOWN).astype(np.int64))
        cells = rows.data.column("cell").take(shown).to_numpy()
        vectors = chosen(target, cells)
        labels = rows.data.column(options.color_by).take(shown).to_pylist() if options.color_by else None
        picture(target.with_suffix(".png"), vectors, labels, options.color_by or "")
    distributed.say(f"{len(source):,} cells, {width} numbers each: {target}, {target.with_suffix('.png')}")


def main(words: list[str]) -> None:
    """In a process group of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("target", help="the h5ad file to write")
    parser.add_argument("--color-by", metavar="COLUMN", help="of obs, for the picture")
    options = parser.parse_args(words)
    with process_group(seed=0) as distributed:
        embed(distributed, options)


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
