# SPDX-License-Identifier: Apache-2.0
"""h5ad files and SCDL folders become tokens in Arrow once, part by part in several processes.

A part that is written is not read again, also after a kill; no process holds more than a block of a file. Rows:
`input_ids`, `length`, `source` (the file), `cell` (its row there), and columns of obs that are asked for.
"""

import json
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import glob
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypedDict

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from cells.dictionaries import Dictionary, read_all, setting
from cells.genes import match
from cells.h5ad import H5ad, choose_layer
from cells.rank_values import KINDS, Block, Genes, faults, tokenize
from cells.scdl import FILES, Scdl, scdl_folders
from common.conversion import found_files, in_processes, part_of
from common.open_data import plain
from common.sizes import save, writable


VERSION = 1  # of what is written; another makes old parts count for nothing
PART = 20_000  # cells that one process converts at once
NAMED = 5  # rows that a sentence names
LONGEST = 4096  # tokens of a cell
PATHS = ("h5ad", "scdl")
Policy = Literal["refuse", "leave_out", "keep"]


class Counts(TypedDict, total=False):
    """The keys below `counts`, in words in `hydra_config/defaults.yaml`."""

    medians: str | None
    gene_mapping: str | None
    gene_column: str | None
    layer: str | None
    bad_cells: Policy
    obs_columns: list[str]


@dataclass(frozen=True)
class Options:
    """How cells are read; `section` is where its keys stand, nothing for a command."""

    section: str
    dictionary: Dictionary
    gene_column: str | None = None
    layer: str | None = None
    bad_cells: Policy = "refuse"
    obs_columns: tuple[str, ...] = ()
    longest: int | None = None  # tokens that are kept of a cell
    asked_by: tuple[tuple[str, str], ...] = ()  # columns of obs, and the key of each that is not one of `obs_columns`

    @property
    def key(self) -> tuple:
        """What tells the result from others'."""
        keep = self.bad_cells == "keep"
        return self.dictionary.digest, self.gene_column, self.layer, keep, self.obs_columns, self.longest


@dataclass(frozen=True)
class Part:
    """Cells `first` to `stop` of a file that have the same columns."""

    path: str
    kind: str
    first: int
    stop: int
    stretch: int = 0
    layer: str | None = None
    by_rows: Path | None = None

    def open(self) -> H5ad | Scdl:
        """Its file."""
        return H5ad(self.path, self.layer, self.by_rows) if self.kind == "h5ad" else Scdl(self.path)


def options_of(section: str, tokens: dict[str, int] | None, max_seq_length: int, *, medians: str | None = None,
               gene_mapping: str | None = None, gene_column: str | None = None, layer: str | None = None,
               bad_cells: Policy = "refuse", obs_columns: Sequence[str] = (),
               asked_by: Mapping[str, str] = MappingProxyType({})) -> Options:  # fmt: skip
    """What keys ask for; of a cell as many tokens are kept as any published rule keeps, for other lengths to come.

    `asked_by` are columns of obs that another key or option asks for, with its name.
    """
    dictionary = read_all(section, tokens, medians, gene_mapping)
    longest = max(LONGEST, max_seq_length)
    columns = tuple(dict.fromkeys([*obs_columns, *asked_by]))
    return Options(section, dictionary, gene_column, layer, bad_cells, columns, longest, tuple(asked_by.items()))


def h5ad_files(path: Path) -> list[Path]:
    """A file, or all of that kind in a folder and below."""
    return [path] if path.is_file() else sorted(path.rglob("*.h5ad"))


def found_cells(section: str, kwargs: dict) -> list[str]:
    """The files or folders that `data_files` names."""
    inside = h5ad_files if kwargs["path"] == "h5ad" else scdl_folders
    with in_words_of_a_command(section):
        return found_files(section, kwargs, "cells", inside)


@contextmanager
def in_words_of_a_command(section: str = ""):
    """Without a section, the ValueErrors of the block name options instead of keys."""
    try:
        yield
    except ValueError as error:
        if section:
            raise
        text = re.sub(r"^\.load_dataset_kwargs(\.data_files|\.path)?(=|: )", "", str(error))
        raise ValueError(re.sub(r"^\.(\w+)", lambda found: setting("", found[1]), text)) from error


def kind_of(name: str) -> str | None:
    """What is in a file, a folder or what a pattern matches: h5ad, scdl, or None for neither."""
    path = Path(name).expanduser()
    for place in [path] if path.exists() else map(Path, sorted(glob(str(path), recursive=True))):
        if place.is_dir() and next(place.rglob(FILES["ROWPTR"]), None):
            return "scdl"
        if place.suffix == ".h5ad" or (place.is_dir() and next(place.rglob("*.h5ad"), None)):
            return "h5ad"
    return "h5ad" if path.suffix == ".h5ad" else None


def stamp(path: str) -> tuple:
    """Tells a file or folder from what it was before."""
    files = [Path(path)] if Path(path).is_file() else sorted(file for file in Path(path).rglob("*") if file.is_file())
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def parts_of(path: str, kind: str, options: Options, folder: Path, quiet: bool = True) -> tuple[list[Part], str]:
    """A file's parts, and a note on it. Raises ValueError for a file that cannot be read, or has no gene we know."""
    name = Path(path).name
    if kind == "h5ad":
        layer = choose_layer(path, options.section, options.layer, options.bad_cells != "keep")
        one: H5ad | Scdl = H5ad(path, layer)
        one.check()
        stretches, said = [one.shape[0]], f"{name}: counts of {layer}"
    else:
        one, layer = Scdl(path), None
        one.check()
        stretches, said = one.stretches, f"{name}: "
    by_rows = transposed(one, folder, options.section, quiet) if kind == "h5ad" and one.form == "csc" else None
    parts, first, notes = [], 0, []
    for number, end in enumerate(stretches):
        columns = one.columns() if kind == "h5ad" else one.columns(number)
        mixed = options.bad_cells != "refuse"
        notes.append(match(path, options.section, columns, options.gene_column, options.dictionary, mixed)[2])
        for a in range(first, end, PART):
            parts.append(Part(path, kind, a, min(a + PART, end), number, layer, by_rows))
        first = end
    if missing := [column for column in options.obs_columns if one.obs(column, 0, 1) is None]:
        key = dict(options.asked_by).get(missing[0], setting(options.section, "obs_columns"))
        raise ValueError(f"{key}: {path} has no column {missing[0]} in obs.")
    return parts, f"{said}{', ' if layer else ''}{'; '.join(dict.fromkeys(notes))}"


def transposed(one: H5ad, folder: Path, section: str, quiet: bool) -> Path:
    """The folder with a matrix by rows, which is made if it is not there."""
    target = folder / f"by_rows_{sha256(f'{one.path} {one.layer}'.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        with writable(section or "cells", target):
            partial.mkdir(parents=True)
            total = len(one.matrix["data"])
            with tqdm(total=total, unit=" counts", unit_scale=True, desc=f"{one.path.name}: from columns to rows",
                      disable=quiet or not sys.stderr.isatty(), leave=False) as bar:  # fmt: skip
                one.transpose(partial, bar.update)
            partial.rename(target)
    return target


@lru_cache(maxsize=4)  # of a process: parts of a file follow each other
def columns_of(part: Part, options: Options) -> tuple[H5ad | Scdl, Genes, list[str]]:
    """An open file, its genes and their names; `part` is the file's first."""
    one = part.open()
    columns = one.columns() if part.kind == "h5ad" else one.columns(part.stretch)
    genes, names, _ = match(part.path, options.section, columns, options.gene_column, options.dictionary, mixed=True)
    return one, genes, names


def in_parts(work: Callable, tasks: list[tuple], num_processes: int, note: str, quiet: bool, total: int) -> None:
    """`work(*task)` for all of them, in processes; files that are open in this one are closed again."""
    try:
        for _ in in_processes(work, tasks, num_processes, note, quiet, total):
            pass
    finally:
        columns_of.cache_clear()


def sentence(part: Part, names: list[str], block: Block, fault: tuple[str, int, int]) -> str:
    """What is wrong with a cell."""
    kind, cell, entry = fault
    value, gene = (block.values[entry], names[int(block.columns[entry])]) if entry >= 0 else (0, "")
    return f"{part.path}: row {block.first + cell} has {KINDS[kind].format(value=value, gene=gene)}"


def schema(options: Options) -> pa.Schema:
    """Of the rows."""
    tokens = options.dictionary.tokens or {}
    kind = pa.uint16() if max(tokens.values(), default=0) < 2**16 else pa.int32()
    return pa.schema([("input_ids", pa.list_(kind)), ("length", pa.int32()), ("source", pa.string()),
                      ("cell", pa.int64()), *((name, pa.string()) for name in options.obs_columns)])  # fmt: skip


def write_part(path: Path, part: Part, options: Options) -> int:
    """Write a part as an Arrow stream, whole or not at all, and beside it what is wrong with cells; how many it has.

    Raises ValueError at the first bad cell, if they are refused.
    """
    one, genes, names = columns_of(replace(part, first=0, stop=0), options)
    rule = options.dictionary.rule
    passed = one.obs("filter_pass", part.first, part.stop) if rule.name in ("V1", "V2") else None
    obs = {name: one.obs(name, part.first, part.stop) for name in options.obs_columns}
    wrong: dict[str, dict] = {}
    filtered, cells_at, found, lengths = 0, [], [], []
    partial, form = path.with_name(f".{path.name}.{uuid.uuid4().hex}"), schema(options)
    for block in one.blocks(part.first, part.stop):
        if len(block.columns) and int(block.columns.max()) >= len(genes.place):
            raise ValueError(
                f"{part.path} is damaged: a cell has gene number {block.columns.max():,} of {len(genes.place):,}."
            )
        cells = len(block.indptr) - 1
        taken = np.ones(cells, bool)
        if passed is not None:
            marks = passed[block.first - part.first : block.first - part.first + cells]
            taken &= np.array([mark in ("1", "1.0", "True") for mark in marks])
            filtered += cells - int(taken.sum())
        for fault in faults(block, genes, options.bad_cells != "keep"):
            kind, cell, _ = fault
            if not taken[cell]:
                continue
            taken[cell] = False
            text = sentence(part, names, block, fault)
            if options.bad_cells == "refuse":
                raise ValueError(f"{text}; {setting(options.section, 'bad_cells')}=leave_out leaves such cells out.")
            here = wrong.setdefault(kind, {"count": 0, "rows": [], "text": text})
            here["count"] += 1
            here["rows"] += [block.first + cell] if len(here["rows"]) < NAMED else []
        with np.errstate(invalid="ignore", divide="ignore"):
            tokens = tokenize(sound(block, taken), genes, rule, options.longest)
        tokens = [some for some, good in zip(tokens, taken, strict=True) if good]
        lengths += map(len, tokens)
        found.append(np.concatenate([*tokens, np.zeros(0, genes.tokens.dtype)]))
        cells_at.append(np.flatnonzero(taken) + block.first)
    at, sizes = np.concatenate([*cells_at, np.zeros(0, np.int64)]), np.array(lengths, dtype=np.int32)
    flat = np.concatenate([*found, np.zeros(0, genes.tokens.dtype)])
    lists = pa.ListArray.from_arrays(
        np.concatenate(([0], np.cumsum(sizes))).astype(np.int32), pa.array(flat, form.field(0).type.value_type)
    )
    more = [pa.array([column[i - part.first] for i in at], pa.string()) for column in obs.values()]
    source = pa.array([Path(part.path).name] * len(at), pa.string())
    batch = pa.RecordBatch.from_arrays([lists, pa.array(sizes), source, pa.array(at), *more], schema=form)
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, form) as writer:
            writer.write_batch(batch)  # one: whoever opens the file has to know where each begins
        left = {"cells": len(at), "filtered": filtered, "wrong": wrong}
        save(path.with_suffix(".json"), lambda out: out.write(json.dumps(left).encode()))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(at)


def sound(block: Block, taken: np.ndarray) -> Block:
    """The same without the entries of cells that are not taken."""
    if taken.all():
        return block
    kept = taken[block.rows]
    sizes = np.diff(block.indptr) * taken
    return Block(block.first, np.concatenate(([0], np.cumsum(sizes))), block.columns[kept], block.values[kept])


def convert(folder: Path, files: list[str], kind: str, options: Options, num_processes: int, quiet: bool) -> None:
    """Write what is not there yet, part by part, and last `done.json`. Raises ValueError at what cannot be read."""
    with writable(options.section or "cells", folder):
        folder.mkdir(parents=True, exist_ok=True)
        parts, notes = [], []
        for file in files:
            some, note = parts_of(file, kind, options, folder, quiet)
            parts += some
            notes.append(note)
        if not parts:
            raise ValueError(f"{', '.join(files)}: there are no cells.")
        paths = [folder / f"{i:06d}.arrow" for i in range(len(parts))]
        tasks = [(path, part, options) for path, part in zip(paths, parts, strict=True) if not path.exists()]
        in_parts(write_part, tasks, num_processes, "cells to tokens", quiet, len(parts))
        found = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
        if filtered := sum(one["filtered"] for one in found):
            notes.append(f"{filtered:,} cells left out whose filter_pass is not 1")
        done = {"num_parts": len(parts), "notes": notes, "wrong": all_wrong(found)}
        for part in parts:
            if part.by_rows and part.by_rows.is_dir():
                for file in part.by_rows.iterdir():
                    file.unlink()
                part.by_rows.rmdir()
        save(folder / "done.json", lambda file: file.write(json.dumps(done, indent=1).encode()))


def all_wrong(parts: list[dict]) -> dict[str, dict]:
    """What is wrong in all parts, added up; texts are of the first."""
    found: dict[str, dict] = {}
    for part in parts:
        for kind, here in part["wrong"].items():
            one = found.setdefault(kind, {"count": 0, "text": here["text"]})
            one["count"] += here["count"]
    return found


def open_cells(section: str, load_dataset_kwargs: dict, options: Options, num_processes: int = 1,
               quiet: bool = False) -> tuple[datasets.Dataset, list[str]]:  # fmt: skip
    """Rows of tokens, memory-mapped, and what is to be said of them. Raises ValueError for a user's mistake."""
    kwargs = plain(load_dataset_kwargs)
    files = found_cells(section, kwargs)
    rule = (VERSION, kwargs["path"], [stamp(file) for file in files], *options.key)
    key = sha256(repr(rule).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "cells" / key
    if not (folder / "done.json").exists():
        convert(folder, files, kwargs["path"], options, num_processes, quiet)
    done = json.loads((folder / "done.json").read_text())
    if done["wrong"] and options.bad_cells == "refuse":
        text = next(iter(done["wrong"].values()))["text"]
        raise ValueError(f"{text}; {setting(section, 'bad_cells')}=leave_out leaves such cells out.")
    found, notes = rows_of(folder, done["num_parts"]), [*done["notes"]]
    notes += [f"{one['count']:,} cells left out, the first: {one['text']}" for one in done["wrong"].values()]
    if not len(found):
        raise ValueError(f"{'; '.join([f'{section}: no cell is left'.removeprefix(': '), *notes])}.")
    found._fingerprint = key
    return part_of(section, found, kwargs), [f"{section}: {note}".removeprefix(": ") for note in notes]


def rows_of(folder: Path, num_parts: int) -> datasets.Dataset:
    """What is in all parts."""
    return datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(folder / f"{i:06d}.arrow")) for i in range(num_parts)]
    )
