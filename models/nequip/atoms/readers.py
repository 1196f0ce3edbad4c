# SPDX-License-Identifier: Apache-2.0
"""Structures from files: everything ASE reads, ASE databases, npz, HDF5, Parquet and data sets of the hub.

A file is cut into parts that processes read on their own: blocks of an extxyz, stretches of a database.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from atoms.label_names import Options
from atoms.structures import row, unit_factors


PART, PART_BYTES = 2000, 1 << 25  # frames that a process reads at once, at most, and of an extxyz bytes
DATABASES = (".db", ".aselmdb")
PICKLED = (".lmdb", ".pkl", ".pckl", ".pickle", ".pt", ".pth")


@dataclass(frozen=True)
class Part:
    """A stretch of a file: frames `first` to `stop`, `place` being where an extxyz's block begins and its bytes."""

    file: str
    kind: str
    first: int = 0
    stop: int | None = None
    place: tuple[int, int] | None = None


def kind_of(file: Path) -> str:
    """How a file is read."""
    name = file.name.lower()
    if name.endswith(PICKLED):
        raise ValueError(
            f"{file}: files of this kind hold Python objects, which could run code as they are read; write the "
            "structures as extxyz, ASE-DB (.aselmdb) or Parquet."
        )
    endings = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".parquet": "parquet", ".extxyz": "extxyz",
               ".xyz": "extxyz", ".traj": "traj"} | dict.fromkeys(DATABASES, "database")  # fmt: skip
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), "ase")


def parts_of(file: str) -> list[Part]:
    """A file's parts, in order. Raises ValueError for a file that cannot be read."""
    kind = kind_of(Path(file))
    if kind == "extxyz":
        with sentence_for(file):
            return extxyz_blocks(file)
    if kind == "database":
        total = len(open_database(file)[1])
    elif kind == "traj":
        from ase.io.trajectory import Trajectory

        with sentence_for(file):
            total = len(Trajectory(file))
    elif kind == "parquet":
        import pyarrow.parquet as pq

        with sentence_for(file):
            total = pq.ParquetFile(file).metadata.num_rows
    else:
        return [Part(file, kind)]
    return [Part(file, kind, first, min(first + PART, total)) for first in range(0, total, PART)]


def extxyz_blocks(file: str) -> list[Part]:
    """Blocks of an extxyz, found by its counts of atoms. Raises ValueError at a frame that is cut short."""
    blocks, frame, first, start = [], 0, 0, 0
    with open(file, "rb") as lines:
        while line := lines.readline():
            if not line.strip():
                if not lines.read(1 << 16).strip():  # empty lines at the end
                    break
                raise ValueError(f"{file}: an empty line where frame {frame} should begin with its number of atoms.")
            try:
                num_atoms = int(line)
            except ValueError as error:
                text = line.decode(errors="replace").strip()[:40]
                raise ValueError(
                    f"{file}: frame {frame} should begin with its number of atoms, not {text!r}."
                ) from error
            got = sum(1 for _ in islice(lines, num_atoms + 1))
            if got < num_atoms + 1:
                raise ValueError(
                    f"{file}: frame {frame}, the last, is cut short: {max(got - 1, 0)} of its {num_atoms} atoms are "
                    "there; take it out, or copy the file again."
                )
            frame, end = frame + 1, lines.tell()
            if frame - first == PART or end - start > PART_BYTES:
                blocks.append(Part(file, "extxyz", first, frame, (start, end - start)))
                first, start = frame, end
        if frame > first:
            blocks.append(Part(file, "extxyz", first, frame, (start, end - start)))
    return blocks


class sentence_for:
    """What a reader raises in the block becomes a ValueError of one sentence that names the file and frame."""

    def __init__(self, file: str):
        self.file, self.frame = file, None

    def __enter__(self) -> "sentence_for":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Exception) and not str(error).startswith(self.file):
            where = "" if self.frame is None else f", frame {self.frame}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
            if "could not assign tuple of length" in reason:  # ASE's
                reason = f"a line has {reason.split()[6]} columns, not {reason.split()[-2]}; was the file cut short"
            raise ValueError(f"{self.file}{where} cannot be read: {reason}.".replace("..", ".")) from error


def read(part: Part, options: Options) -> Iterator[dict]:
    """The rows of a part. Raises ValueError for what cannot be read."""
    readers = {"npz": read_npz, "hdf5": read_hdf5, "parquet": read_parquet, "database": read_database}
    with sentence_for(part.file) as where:
        where.frame = part.first
        for number, one in readers.get(part.kind, read_ase)(part, options):
            yield row(**one, source=Path(part.file).name, key=str(number))
            where.frame = number + 1 if isinstance(number, int) else number
        if where.frame == 0 == part.first:
            raise ValueError(f"{part.file} has no structures, or none that ASE finds; it goes by name and contents")


# ---- what ASE reads


def read_ase(part: Part, options: Options) -> Iterator[tuple[int, dict]]:
    """Any format of ASE, by its name and contents."""
    import ase.io

    if part.kind == "extxyz":
        with open(part.file, "rb") as file:
            file.seek(part.place[0])
            text = io.StringIO(file.read(part.place[1]).decode())
        frames = ase.io.iread(text, index=":", format="extxyz")
    elif part.kind == "traj":
        frames = ase.io.iread(part.file, index=slice(part.first, part.stop), format="traj")
    else:
        with open(part.file, "rb") as file:
            is_aims = b"FHI-aims" in file.read(4096)  # ASE takes any .out for one of Quantum ESPRESSO
        frames = ase.io.iread(part.file, index=":", format="aims-output" if is_aims else None)
    factors = unit_factors(options.section, options.units)
    for number, atoms in enumerate(frames, part.first):
        yield number, of_ase(atoms, options, factors)


def of_ase(atoms, options: Options, factors: dict[str, float], more: dict | None = None) -> dict:
    """What `row` takes, of ASE's Atoms: labels from its calculator, which holds them as computed, or by name.

    Not by `get_forces`, which would set those of fixed atoms to zero.
    """
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    values = {**(more or {}), **atoms.info, **atoms.arrays, **results}
    cell = atoms.cell.array * factors["length"]
    labels = options.labels(values, factors, abs(np.linalg.det(cell)))
    return {"numbers": atoms.numbers, "positions": atoms.positions * factors["length"], "cell": cell, "pbc": atoms.pbc,
            **labels}  # fmt: skip


def open_database(file: str):
    """An ASE database and the ids of its rows."""
    import ase.db

    with sentence_for(file):
        try:
            database = ase.db.connect(file)
        except (KeyError, ImportError, AttributeError, ValueError) as error:
            if not file.endswith(".aselmdb"):
                raise
            raise ValueError(f"{file} needs the package ase-db-backends: pip install ase-db-backends.") from error
        return database, list(
            getattr(database, "ids", None) or (one.id for one in database.select(include_data=False))
        )


def read_database(part: Part, options: Options) -> Iterator[tuple[int, dict]]:
    """Rows of an ASE database by their ids."""
    database, ids = open_database(part.file)
    factors = unit_factors(options.section, options.units)
    for number in ids[part.first : part.stop]:
        one = database.get(int(number))
        yield int(number), of_ase(one.toatoms(), options, factors, {**one.key_value_pairs, **(one.data or {})})


# ---- arrays by name


def frames_of(values: dict, options: Options, factors: dict[str, float], what: str) -> Iterator[dict]:
    """What `row` takes, of arrays with a frame an entry; what all frames have in common may stand once."""
    names = {label: options.find(label, values) for label in ("numbers", "positions", "cell", "pbc")}
    for needed in ("numbers", "positions"):
        if names[needed] is None:
            raise ValueError(f"{what} has no {needed} among {', '.join(sorted(values))}")
    positions, numbers = np.asarray(values[names["positions"]]), np.asarray(values[names["numbers"]])
    if numbers.dtype.kind in "SUO":
        from atoms.structures import NUMBERS

        numbers = np.vectorize(lambda symbol: NUMBERS[symbol.decode() if isinstance(symbol, bytes) else symbol])(
            numbers
        )
    if positions.ndim == 2:
        positions = positions[None]
    total = len(positions)
    labels = {}
    for label in ("energy", "forces", "gradient", "stress", "virial", "charge", "spin"):
        name = options.find(label, values)
        if name is not None:
            array = np.asarray(values[name])
            if label == "forces" or label == "gradient":
                array = array.reshape(total, -1, 3)
            elif (
                array.ndim
                and len(array) != total
                and array.size not in ((6, 9) if label in ("stress", "virial") else (1,))
            ):
                raise ValueError(f"{what}: {name} has {len(array)} entries, and there are {total} structures")
            labels[name] = array
    for i in range(total):
        one = numbers if numbers.ndim == 1 else numbers[i]
        used = one > 0  # pads of arrays with structures of several sizes
        cell = _of_frame(values, names["cell"], i, total, 9)
        pbc = _of_frame(values, names["pbc"], i, total, 3)
        cell = (
            None
            if cell is None
            else (np.diag(cell) if np.size(cell) == 3 else np.reshape(cell, (3, 3))) * factors["length"]
        )
        pbc = cell is not None and bool(np.any(cell)) if pbc is None else pbc
        here = {}
        for name, array in labels.items():
            value = array[i] if array.ndim and len(array) == total else array
            here[name] = value[used] if np.ndim(value) == 2 and len(value) == len(used) else value
        volume = 0.0 if cell is None else abs(np.linalg.det(cell))
        yield {"numbers": one[used], "positions": positions[i][used] * factors["length"], "cell": cell, "pbc": pbc,
               **options.labels(here, factors, volume)}  # fmt: skip


def _of_frame(values: dict, name: str | None, i: int, total: int, size: int):
    """The entry of a frame, or what stands once for all."""
    if name is None:
        return None
    array = np.asarray(values[name])
    return array if array.size in (3, size) and not (array.ndim > 1 and len(array) == total != 3) else array[i]


def read_npz(part: Part, options: Options) -> Iterator[tuple[int, dict]]:
    """RMD17 (nuclear_charges, coords, energies, forces; kcal/mol), sGDML (z, R, E, F; with its units), or alike."""
    with np.load(part.file, allow_pickle=False) as arrays:
        names = set(arrays.files)
        values = {name: arrays[name] for name in names if not name.startswith("old_") and arrays[name].dtype != object}
    found = {"energy": _text(values.get("e_unit")), "length": _text(values.get("r_unit"))}
    if {"nuclear_charges", "coords", "energies"} <= names or ({"z", "R", "E", "F"} <= names and not found["energy"]):
        found = {"energy": "kcal/mol", "length": "Ang"}
    yield from enumerate(frames_of(values, options, unit_factors(options.section, options.units, **found), part.file))


def _text(value) -> str | None:
    if value is None:
        return None
    value = np.asarray(value).reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def read_hdf5(part: Part, options: Options) -> Iterator[tuple[int | str, dict]]:
    """Groups at any depth with numbers and positions, of one frame or many, as ANI, SPICE and MACE write them."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{part.file} needs the package h5py: pip install h5py.") from error
    with h5py.File(part.file) as file:
        groups, found = [file], False
        while groups:
            group = groups.pop()
            values = {name: one for name, one in group.items() if isinstance(one, h5py.Dataset)}
            if isinstance(group.get("properties"), h5py.Group):  # MACE's
                values |= {name: one for name, one in group["properties"].items() if isinstance(one, h5py.Dataset)}
            if all(options.find(label, values) for label in ("numbers", "positions")):
                units = {}
                for kind, label in (
                    ("energy", "energy"),
                    ("length", "positions"),
                    ("forces", "forces"),
                    ("forces", "gradient"),
                ):
                    if (name := options.find(label, values)) and "units" in values[name].attrs:
                        units[kind] = _text(values[name].attrs["units"])
                factors, found = unit_factors(options.section, options.units, **units), True
                arrays = {name: _plain(one[()]) for name, one in values.items()}
                arrays = {name: one for name, one in arrays.items() if one is not None}
                for number, one in enumerate(frames_of(arrays, options, factors, f"{part.file}{group.name}")):
                    yield f"{group.name.lstrip('/')}/{number}".lstrip("/"), one
            else:
                groups += [one for _, one in sorted(group.items(), reverse=True) if isinstance(one, h5py.Group)]
    if not found:
        raise ValueError(f"{part.file} has no group with numbers and positions")


def _plain(value):
    return None if isinstance(value, bytes | str) and value in (b"None", "None") else value


def read_parquet(part: Part, options: Options) -> Iterator[tuple[int, dict]]:
    """Rows with columns by the usual names."""
    import pyarrow.parquet as pq

    file, seen = pq.ParquetFile(part.file), 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if seen + size > part.first and seen < part.stop:
            place = seen
            for batch in file.iter_batches(1000, row_groups=[group]):
                for one in batch.to_pylist():
                    if part.first <= place < part.stop:
                        yield place, of_columns(one, options)
                    place += 1
        seen += size


def of_columns(one: dict, options: Options) -> dict:
    """What `row` takes, of a record with the usual names."""
    values = {
        name: np.array(value) if isinstance(value, list) else value for name, value in one.items() if value is not None
    }
    if "positions" in values:  # flat, as our own rows are
        values["positions"] = np.reshape(values["positions"], (-1, 3))
    single = {name: value for name, value in values.items() if not isinstance(value, str)}
    wrapped = {name: np.asarray(value)[None] for name, value in single.items()}
    factors = unit_factors(options.section, options.units)
    found = next(frames_of(wrapped, options, factors, "a row"))
    return found | ({"data_set": str(values[name])} if (name := options.label_keys.get("data_set")) in values else {})
