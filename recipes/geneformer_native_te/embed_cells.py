# SPDX-License-Identifier: Apache-2.0
"""Embeddings of cells: into the obsm of copies of their h5ad files, or into a parquet file; and a picture of them.

    python embed_cells.py my_cells.h5ad MODEL embedded.h5ad --medians medians.json --color-by cell_type
    torchrun --nproc_per_node=2 embed_cells.py my_folder MODEL embedded --medians medians.json --cls
    python embed_cells.py scdl/train MODEL vectors.parquet --medians medians.json
    python embed_cells.py my_tokens.parquet MODEL vectors.parquet

A cell's vector is the mean of its genes' after the last layer, or that of <cls>. The last name says what is written:
an h5ad file, the copy of one with `obsm["X_geneformer"]`; a folder, a copy of each h5ad file that there is; or a
parquet file, for cells of any kind, with a row for each: `source` and `cell` (the file and the row there), or `row` in
a table of tokens, columns that tell cells apart, and `embedding`. Invalid cells are counted, and have NaN in an h5ad
file. A picture beside it shows the cells along their first two principal components. An interrupted command
continues when it is started again.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cell_rows import LABELS, TokenRows
from cell_vectors import PLACES, Encoder, add_arguments, one_kind, open_all, open_source
from cells.h5ad import index_of
from cells.token_cache import found_cells
from common.command import command
from common.distributed import Distributed, end_of_process, process_group
from common.parts import Parts
from tokens.encoding import batches


KEY = "X_geneformer"
CELLS_PER_PART = 512  # of what is written at once, and not computed again after an interruption
PARTS = 10_000  # at most, of larger ones
SHOWN = 50_000  # cells of the picture


class Embedded(NamedTuple):
    """Parts of vectors on their way to a file; of cells in order every `step`th is in the picture."""

    source: TokenRows
    width: int
    per_part: int
    step: int
    shown: list[np.ndarray]

    def tables(self, files: list[Path]) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """The table of each part, and its vectors."""
        self.shown.clear()
        for number, file in enumerate(files):
            table = pq.read_table(file)
            vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, self.width)
            self.shown.append(vectors[-number * self.per_part % self.step :: self.step].copy())
            yield table, vectors

    def write_parquet(self, files: list[Path], target: Path) -> None:
        """All parts in their order."""
        with pq.ParquetWriter(target, pq.read_schema(files[0])) as writer:
            for table, _ in self.tables(files):
                writer.write_table(table)

    def write_h5ad(self, original: str, job: str, files: list[Path], target: Path) -> None:
        """A copy of the file with the vectors in its obsm, part by part."""
        shutil.copyfile(original, target)
        with h5py.File(target, "r+") as file:
            obsm = file.require_group("obsm")
            obsm.attrs["encoding-type"], obsm.attrs["encoding-version"] = "dict", "0.1.0"
            if KEY in obsm:
                del obsm[KEY]
            obs = file["obs"]
            cells = len(obs) if isinstance(obs, h5py.Dataset) else len(obs[index_of(obs)])
            out = obsm.create_dataset(KEY, (cells, self.width), np.float32, fillvalue=np.nan)
            out.attrs["encoding-type"], out.attrs["encoding-version"], out.attrs["job"] = "array", "0.2.0", job
            for table, vectors in self.tables(files):
                out[table["cell"].to_numpy()] = vectors  # rows of a file rise


def job_of(path: Path) -> str | None:
    """What a copy's vectors were made by."""
    with h5py.File(path) as file:
        return file[f"obsm/{KEY}"].attrs.get("job") if f"obsm/{KEY}" in file else None


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

    whole = np.isfinite(vectors).all(1)
    labels = labels and [label for label, is_whole in zip(labels, whole, strict=True) if is_whole]
    places, shares = components(vectors[whole].astype(np.float64))
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


def outputs(data: list[str], target: Path) -> list[tuple[list[str], Path]]:
    """Which cells go into which file. Raises ValueError where they cannot."""
    kind = one_kind(data)
    if target.suffix == ".parquet":
        return [(data, target)]
    if kind != "h5ad":
        what = "SCDL" if kind else "tokens"
        raise ValueError(f"{target}: vectors of {what} go into a parquet file; give a name that ends with .parquet.")
    files = found_cells("", {"path": kind, "data_files": data})
    if target.suffix == ".h5ad" and len(files) == 1:
        return [(files, target)]
    if target.suffix:
        ways = "that ends with .h5ad or .parquet" if len(files) == 1 else "of a folder, or one that ends with .parquet"
        raise ValueError(f"{target}: give a name {ways}, for the vectors of {len(files)} h5ad file(s).")
    above = os.path.commonpath([Path(file).parent for file in files])
    return [([file], target / Path(file).relative_to(above)) for file in dict.fromkeys(files)]


def labels_of(rows: datasets.Dataset, some: np.ndarray, color_by: str | None, numbered: bool) -> dict:
    """Columns that say which cells these are; `numbered`: first their rows."""
    names = [name for name in dict.fromkeys([*PLACES, *LABELS, color_by]) if name in rows.column_names]
    place = {"row": pa.array(some)} if numbered else {}
    table = rows.select_columns(names).with_format("arrow")[some] if names else pa.table({})
    return place | {name: table[name] for name in names}


def embed(distributed: Distributed, options: argparse.Namespace) -> None:
    """All of it."""
    with distributed.fail_together():
        files = outputs(options.data, Path(options.target))
        if len(files) == 1 and files[0][1].exists():
            raise ValueError(f"{files[0][1]} exists; move it away or give another name.")
        encoder = open_all(distributed, options)
    for number, (data, target) in enumerate(files):
        embed_into(distributed, options, encoder, data, target, f"{number + 1}/{len(files)}" if len(files) > 1 else "")


def embed_into(distributed: Distributed, options: argparse.Namespace, encoder: Encoder, data: list[str], target: Path,
               which: str) -> None:  # fmt: skip
    """One file of vectors, whose parts the ranks share; `which` of several it is, and such a one may be there."""
    width = encoder.model.config.hidden_size
    with distributed.fail_together():
        rows, source = open_source(distributed, options, data, encoder, {"--color-by": options.color_by})
        per_part = max(CELLS_PER_PART, -(-len(source) // PARTS))
        job = encoder.job | {"data": source.identity, "cells_per_part": per_part, "color_by": options.color_by}
        digest = sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
        if which and target.exists() and job_of(target) == digest:
            distributed.say(f"{target} is there already.")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        parts = Parts(distributed, target, job)
    count, is_table = -(-len(source) // per_part), one_kind(data) is None
    done = Embedded(source, width, per_part, -(-len(source) // SHOWN), [])
    with tqdm(total=len(source), unit=" cells", unit_scale=True, desc=which, disable=not distributed.is_main) as bar:
        for number, is_there in parts.mine(count):
            some = np.arange(number * per_part, min((number + 1) * per_part, len(source)))
            if not is_there:
                sizes, found = source.sizes(some, 0), np.full((len(some), width), np.nan, np.float32)
                for batch in batches(sizes, options.tokens):
                    found[batch] = encoder.vectors(source.read(some[batch], 0))
                flat = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), width)
                parts.save(number, pa.table({**labels_of(rows, some, options.color_by, is_table), "embedding": flat}))
            bar.update(min(len(some) * distributed.num_ranks, len(source) - bar.n))
    if target.suffix == ".parquet":
        parts.join(count, done.write_parquet)
    else:
        parts.join(count, partial(done.write_h5ad, data[0], digest))
    if distributed.is_main:
        labels = None
        if options.color_by:
            shown = np.arange(0, len(source), done.step)
            labels = [str(one) for one in rows.data.column(options.color_by).take(shown).to_pylist()]
        picture(target.with_suffix(".png"), np.concatenate(done.shown), labels, options.color_by or "")
    distributed.say(f"{len(source):,} cells, {width} numbers each: {target}, {target.with_suffix('.png')}")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("target", help="what to write: NAME.h5ad, NAME.parquet, or a folder")
    parser.add_argument("--color-by", metavar="COLUMN", help="of obs or the table, for the picture")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """In a process group of its own."""
    options = parse(words)
    with process_group(seed=0) as distributed:
        embed(distributed, options)


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
