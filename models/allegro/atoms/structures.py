# SPDX-License-Identifier: Apache-2.0
"""Structures as Arrow rows, and many of them as arrays laid end to end.

Lengths are in A, energies in eV, forces in eV/A, stress in eV/A^3 with ASE's sign, +dE/d(strain)/V. A label that a
structure does not have is null in a row and NaN in an array. `others` names what else a file has for a structure that
has neither energy nor forces, or energies and forces of other values by further names. In shapes, S is structures and
A all their atoms.
"""

import re
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atoms import elements


SYMBOLS = np.array(elements.SYMBOLS)
NUM_ELEMENTS = len(SYMBOLS)  # by atomic number; 0 is X, which is no element
NUMBERS = {symbol: number for number, symbol in enumerate(elements.SYMBOLS)}
_VECTOR = pa.list_(pa.float64())
SCHEMA = pa.schema([
    ("numbers", pa.list_(pa.uint8())), ("positions", _VECTOR), ("cell", _VECTOR), ("pbc", pa.list_(pa.bool_())),
    ("energy", pa.float64()), ("forces", _VECTOR), ("stress", _VECTOR), ("charge", pa.float64()),
    ("spin", pa.float64()), ("data_set", pa.string()), ("source", pa.string()), ("key", pa.string()),
    ("others", pa.string()),
])  # fmt: skip
LABELS = ("energy", "forces", "stress")  # what a structure can lack


# ---- units: factors to eV, A and eV/A^3 (CODATA 2018)

ENERGY_UNITS = {
    "ev": 1.0, "mev": 1e-3, "kcal/mol": 0.0433641042, "kj/mol": 0.0103642697, "hartree": 27.211386246,
    "ha": 27.211386246, "ry": 13.605693123, "rydberg": 13.605693123, "k": 8.617333262e-5,
}  # fmt: skip
LENGTH_UNITS = {"ang": 1.0, "angstrom": 1.0, "a": 1.0, "bohr": 0.529177210903, "nm": 10.0, "pm": 0.01}
STRESS_UNITS = {"gpa": 1 / 160.21766208, "kbar": 1 / 1602.1766208, "bar": 1 / 1602176.6208, "pa": 1 / 160.21766208e9}
UNIT_KEYS = ("energy", "length", "forces", "stress")


def unit_factor(section: str, kind: str, unit: str) -> float:
    """What a number in this unit is multiplied by; a minus before it turns the sign.

    Raises ValueError for a unit that is not known.
    """
    text = re.sub(r"\s|\^|\*\*", "", str(unit).lower()).replace("å", "ang")
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.lstrip("-")
    power = {"energy": 0, "length": 0, "forces": 1, "stress": 3}[kind]
    known = {"energy": ENERGY_UNITS, "length": LENGTH_UNITS, "stress": STRESS_UNITS}.get(kind, {})
    if text in known:
        return sign * known[text]
    energy, _, length = text.rpartition("/")
    length = length.removesuffix("3") if power == 3 else length
    if power and energy in ENERGY_UNITS and length in LENGTH_UNITS:
        return sign * ENERGY_UNITS[energy] / LENGTH_UNITS[length] ** power
    examples = {
        "energy": "eV, kcal/mol, kJ/mol, hartree, Ry", "length": "Ang, bohr, nm",
        "forces": "eV/Ang, hartree/bohr, -eV/Ang for gradients",
        "stress": "eV/Ang^3, GPa, kbar, -kbar for VASP's sign",
    }  # fmt: skip
    raise ValueError(f"{section}.units.{kind}={unit}: no such unit; there is {examples[kind]}.")


def unit_factors(section: str, units: dict | None, **found: str | None) -> dict[str, float]:
    """A factor for energy, length, forces and stress; what `units` leaves open is what the file has `found`."""
    units = {k: v for k, v in (units or {}).items() if v is not None}
    if unknown := set(units) - set(UNIT_KEYS):
        raise ValueError(f"{section}.units.{min(unknown)}: there is no such key; there is {', '.join(UNIT_KEYS)}.")
    units = {k: v for k, v in found.items() if v is not None} | units
    factors = {
        kind: unit_factor(section, kind, units.get(kind, unit)) for kind, unit in (("energy", "eV"), ("length", "Ang"))
    }
    of_pairs = {"forces": factors["energy"] / factors["length"], "stress": factors["energy"] / factors["length"] ** 3}
    return factors | {k: unit_factor(section, k, units[k]) if k in units else of_pairs[k] for k in of_pairs}


# ---- one structure


def full_stress(stress: np.ndarray) -> np.ndarray:
    """A 3 x 3 matrix of nine numbers or of Voigt's six (xx, yy, zz, yz, xz, xy)."""
    stress = np.asarray(stress, dtype=np.float64).ravel()
    return stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3) if stress.size == 6 else stress.reshape(3, 3)


def row(numbers, positions, cell=None, pbc=None, energy=None, forces=None, stress=None, charge=None, spin=None,
        data_set=None, source="", key="", others=None) -> dict:  # fmt: skip
    """A row of SCHEMA. Raises ValueError for shapes that do not go together."""
    numbers = np.asarray(numbers).astype(np.int64).ravel()
    positions = np.asarray(positions, dtype=np.float64)
    if positions.size != 3 * len(numbers):
        raise ValueError(f"positions have {positions.size} numbers, and {len(numbers)} atoms need {3 * len(numbers)}")
    if forces is not None and np.size(forces) != 3 * len(numbers):
        raise ValueError(f"forces have {np.size(forces)} numbers, and {len(numbers)} atoms need {3 * len(numbers)}")
    if stress is not None and np.size(stress) not in (6, 9):
        raise ValueError(f"stress has {np.size(stress)} numbers, not 6 or 9")
    if len(numbers) == 0 or numbers.min() < 1 or numbers.max() >= NUM_ELEMENTS:
        raise ValueError("atomic numbers must lie between 1 and 118" if len(numbers) else "there are no atoms")
    return {
        "numbers": numbers.astype(np.uint8), "positions": positions.ravel(),
        "cell": np.zeros(9) if cell is None else np.asarray(cell, dtype=np.float64).reshape(9),
        "pbc": np.broadcast_to(False if pbc is None else np.asarray(pbc, dtype=bool), 3),
        "energy": _number(energy), "forces": None if forces is None else np.asarray(forces, dtype=np.float64).ravel(),
        "stress": None if stress is None else full_stress(stress).ravel(), "charge": _number(charge),
        "spin": _number(spin), "data_set": data_set, "source": source, "key": str(key), "others": others,
    }  # fmt: skip


def _number(value) -> float | None:
    return None if value is None else float(np.asarray(value, dtype=np.float64).reshape(-1)[0])


def table_of(rows: list[dict]) -> pa.Table:
    """Rows as an Arrow table."""
    return pa.table(
        {
            name: pa.array([one[name] for one in rows], kind)
            for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
        }
    )


# ---- many structures


@dataclass
class Structures:
    """Arrays of many structures: `starts` [S + 1] says where the atoms of each begin."""

    starts: np.ndarray
    numbers: np.ndarray  # [A] uint8
    positions: np.ndarray  # [A, 3]
    cell: np.ndarray  # [S, 3, 3], a lattice vector a row
    pbc: np.ndarray  # [S, 3]
    energy: np.ndarray  # [S]
    forces: np.ndarray  # [A, 3]
    stress: np.ndarray  # [S, 3, 3]
    charge: np.ndarray  # [S]
    spin: np.ndarray  # [S]
    data_set: np.ndarray | None = None  # [S], the number of each structure's data set, where it is asked for

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_atoms(self) -> np.ndarray:
        """Of each structure."""
        return np.diff(self.starts)

    @property
    def structure(self) -> np.ndarray:
        """Of each atom, the structure that it is in."""
        return np.repeat(np.arange(len(self)), self.num_atoms)

    def atoms_of(self, i: int) -> slice:
        """Where the atoms of structure i are."""
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def take(self, some: np.ndarray) -> "Structures":
        """These structures only, in this order."""
        atoms = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in some] or [np.zeros(0, int)])
        by_atom = ("starts", "numbers", "positions", "forces")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in by_atom}
        chosen = {name: value if value is None else value[some] for name, value in values.items()}
        starts = np.concatenate([[0], np.cumsum(self.num_atoms[some])])
        return replace(self, starts=starts, numbers=self.numbers[atoms], positions=self.positions[atoms],
                       forces=self.forces[atoms], **chosen)  # fmt: skip


def concatenated(parts: list[Structures]) -> Structures:
    """All of these, one after the other; without the numbers of data sets."""
    starts = np.concatenate([[0], np.cumsum(np.concatenate([part.num_atoms for part in parts]))])
    names = [f.name for f in fields(Structures) if f.name not in ("starts", "data_set")]
    return Structures(starts=starts, **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def structures_of(table: pa.Table) -> Structures:
    """The rows of an Arrow table as arrays."""
    table = table.combine_chunks()
    column = {name: _array(table[name]) for name in table.column_names}
    num_atoms = pc.list_value_length(column["numbers"]).to_numpy(zero_copy_only=False).astype(np.int64)
    starts, size = np.concatenate([[0], np.cumsum(num_atoms)]), len(table)
    return Structures(
        starts=starts,
        numbers=column["numbers"].flatten().to_numpy(zero_copy_only=False),
        positions=column["positions"].flatten().to_numpy().reshape(-1, 3),
        cell=column["cell"].flatten().to_numpy().reshape(-1, 3, 3),
        pbc=column["pbc"].flatten().to_numpy(zero_copy_only=False).reshape(-1, 3),
        energy=_numbers(column["energy"]),
        forces=_lists(column["forces"], 3 * num_atoms).reshape(-1, 3),
        stress=_lists(column["stress"], np.full(size, 9)).reshape(-1, 3, 3),
        charge=_numbers(column["charge"]),
        spin=_numbers(column["spin"]),
    )


def _array(column: pa.ChunkedArray) -> pa.Array:
    chunk = column.combine_chunks()
    return chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk


def _numbers(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)  # null becomes NaN


def _lists(column: pa.Array, lengths: np.ndarray) -> np.ndarray:
    """Lists end to end, NaN for those that are null."""
    flat = column.flatten().to_numpy()
    if not column.null_count:
        return flat
    filled = np.full(lengths.sum(), np.nan)
    filled[np.repeat(column.is_valid().to_numpy(zero_copy_only=False), lengths)] = flat
    return filled
