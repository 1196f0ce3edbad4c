# SPDX-License-Identifier: Apache-2.0
"""One pass over all structures, shared by all ranks and kept with the data: sizes, sums for statistics, and checks.

The sums belong to stretches of rows, whichever rank made them, and are added up in the order of the rows: their
result is the same to the bit on any number of ranks.
"""

import json
import os
import shutil
import uuid
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np

from atoms.checks import BAD, BITS, check, element_counts, fingerprints, lacks
from atoms.neighbours import Cutoffs
from atoms.outliers import mark_energies, mark_forces
from atoms.pair_fit import PairFit
from atoms.structures import LABELS, NUM_ELEMENTS, NUMBERS, SYMBOLS, Structures, structures_of
from atoms.units import Evidence, gather
from common.conversion import in_processes
from common.distributed import Distributed
from common.sizes import SizeIndex, read_chunk, save, writable


VERSION = 6
CHUNK = 5000  # rows that one process surveys, and saves, at once
BLOCK = 250  # rows that are in memory at once
ODD = np.uint32(sum(int(bit) for bit in BITS.values())) & ~BAD


def survey_chunk(rows: datasets.Dataset, first: int, stop: int, cutoffs: Cutoffs, max_neighbors: int | None,
                 fitted: PairFit, kept: np.ndarray | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays with an entry a row, and sums over the rows that are `kept` (None: those that are not bad)."""
    found: dict[str, list] = {}
    sums: dict[str, np.ndarray] = {}
    table = rows.with_format("arrow")
    for at in range(first, stop, BLOCK):
        block = table[at : min(at + BLOCK, stop)]
        structures = structures_of(block)
        checked = check(structures, cutoffs, max_neighbors)
        whole = checked if max_neighbors is None else check(structures, cutoffs)  # pair potentials need all neighbours
        further = block["others"].is_valid().to_numpy() & ((checked.flags & BITS["no_labels"]) == 0)
        checked.flags[further] |= BITS["two_names"]
        here = (checked.flags & BAD) == 0 if kept is None else kept[at - first : at - first + len(structures)]
        largest = np.zeros(len(structures))
        np.fmax.at(largest, structures.structure, np.linalg.norm(structures.forces, axis=-1))
        per_row = {
            "sizes": structures.num_atoms.astype(np.int32), "edges": checked.num_edges.astype(np.int32),
            "flags": checked.flags, "prints": fingerprints(structures), "energy": structures.energy,
            "max_force": largest.astype(np.float32), "counts": element_counts(structures),
            "kept": here, "lacks": lacks(structures), **fitted.compare(structures, whole),
        }  # fmt: skip
        for name, array in per_row.items():
            found.setdefault(name, []).append(array)
        for name, value in sums_of(structures, checked, here).items():
            sums[name] = sums[name] + value if name in sums else value
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    counts = arrays.pop("counts")
    arrays["elements"] = np.flatnonzero(counts.any(0))
    arrays["counts"] = counts[:, arrays["elements"]].astype(np.uint16)
    return arrays | {f"sum_{name}": value for name, value in sums.items()}


def sums_of(structures: Structures, checked, kept: np.ndarray) -> dict[str, np.ndarray]:
    """What statistics and findings add up over the structures that are kept."""
    of_atom = kept[structures.structure]
    numbers = structures.numbers[of_atom]

    def by_element(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(numbers, weights, NUM_ELEMENTS).astype(np.float64)

    neighbours = checked.neighbours(len(structures.numbers)).astype(np.float64)
    squares = (structures.forces[of_atom] ** 2).sum(-1)
    fine = np.isfinite(squares)
    counts = element_counts(structures)[kept & np.isfinite(structures.energy)].astype(np.float64)
    energy = structures.energy[kept & np.isfinite(structures.energy)]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    stress = structures.stress[kept]
    stress = stress[np.isfinite(stress).all((1, 2))]
    return {
        "structures": np.array(float(kept.sum())),
        "atoms": by_element(), "neighbours": by_element(neighbours[of_atom]),
        "force_atoms": by_element(fine.astype(np.float64)), "force_squares": by_element(np.where(fine, squares, 0.0)),
        "energies": np.array(float(len(energy))),
        "energy_sum": np.array((energy / np.maximum(counts.sum(1), 1)).sum()),
        "energy_squares": np.array((energy**2).sum()),
        "normal": counts.T @ counts, "right": (counts * energy[:, None]).sum(0),  # whole numbers, so exact
        "growth": growth(energy, counts.sum(1)),
        "share_normal": share.T @ share, "share_right": (share * energy[:, None]).sum(0),
        "stresses": np.array(float(len(stress))), "stress_squares": np.array((stress**2).sum()),
    }  # fmt: skip


def growth(energy: np.ndarray, num_atoms: np.ndarray) -> np.ndarray:
    """n, and sums of x, x x, y, x y, y y with x the logarithm of the atoms, y that of the energy's size."""
    fine = np.abs(energy) > 1e-9
    x, y = np.log(num_atoms[fine]), np.log(np.abs(energy[fine]))
    return np.array([float(len(x)), x.sum(), (x * x).sum(), y.sum(), (x * y).sum(), (y * y).sum()])


def chunk_to_file(path: Path, *arguments) -> int:
    """Survey a chunk and save it, whole or not at all."""
    arrays = survey_chunk(*arguments)
    save(path, lambda file: np.savez_compressed(file, **arrays))
    return len(arrays["sizes"])


class Survey:
    """What the pass has found: arrays with an entry a row, and the sums of each chunk."""

    def __init__(self, folder: Path, chunks: list[dict[str, np.ndarray]], evidence: Evidence, rows: datasets.Dataset,
                 cutoffs: Cutoffs, max_neighbors: int | None):  # fmt: skip
        self.folder, self.chunks, self.evidence, self.rows = folder, chunks, evidence, rows
        self.cutoffs, self.max_neighbors = cutoffs, max_neighbors
        self.atoms, self.edges, self.energy, self.max_force = (
            self.column(k) for k in ("sizes", "edges", "energy", "max_force")
        )
        self.flags, self.usual_strength, self.usual_shear = self.column("flags").copy(), 1.0, 1.0
        self._mark_duplicates()
        mark_forces(self)
        mark_energies(self)

    def column(self, name: str) -> np.ndarray:
        """The entries of all rows."""
        return np.concatenate([chunk[name] for chunk in self.chunks])

    def total(self, name: str) -> np.ndarray:
        """A sum over all rows that are kept."""
        return np.sum([chunk[f"sum_{name}"] for chunk in self.chunks], axis=0)

    def lacking(self, label: str) -> np.ndarray:
        """The rows that have no such label, but for those that cannot be trained on anyway."""
        return np.flatnonzero((self.column("lacks") >> LABELS.index(label) & 1) & ((self.flags & BAD) == 0))

    def _mark_duplicates(self) -> None:
        prints = self.column("prints")
        first = np.zeros(len(prints), bool)
        first[np.unique(prints, return_index=True)[1]] = True
        self.flags[~first] |= BITS["duplicate"]

    @cached_property
    def energy_deviation(self) -> np.ndarray:
        """Of each row's energy per atom from that of its elements, less the median; NaN without one, or of an atom."""
        return self._deviation(self.energy, solve(self.total("normal"), self.total("right"))[0])

    @cached_property
    def energy_misfit(self) -> np.ndarray:
        """The same of what is left of the energies by the pair potentials that give such forces."""
        fine, size = np.isfinite(self.energy_deviation), len(self.chunks[0]["sum_normal"])
        normal, right, rest, start = np.zeros((size, size)), np.zeros(size), self.energy - self.column("fitted"), 0
        for chunk in self.chunks:
            some, stop = chunk["elements"], start + len(chunk["counts"])
            here = chunk["counts"][fine[start:stop]].astype(np.float64)
            normal[np.ix_(some, some)] += here.T @ here
            right[some] += here.T @ rest[start:stop][fine[start:stop]]
            start = stop
        return self._deviation(rest, solve(normal, right)[0])

    def usual_residual(self, references: np.ndarray, of_share: bool) -> float:
        """Median of what is left of the energies (eV) by the references of elements, by their numbers or shares."""
        expected = self._expected(references)
        rest = np.abs(self.energy - (expected / self.atoms if of_share else expected))
        rest = rest[np.isfinite(rest) & ((self.flags & BAD) == 0)]
        return float(np.median(rest)) if len(rest) else 0.0

    def _expected(self, references: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [chunk["counts"].astype(np.float64) @ references[chunk["elements"]] for chunk in self.chunks]
        )

    def _deviation(self, energy: np.ndarray, references: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            deviation = (energy - self._expected(references)) / self.atoms
        deviation[~np.isfinite(deviation) | ((self.flags & BAD) > 0) | (self.atoms == 1)] = np.nan
        return deviation - (np.nanmedian(deviation) if np.isfinite(deviation).any() else 0.0)

    def elements(self) -> list[str]:
        """Symbols of all elements, by atomic number, of the rows that are kept."""
        return Surveys([self]).elements()

    def size_index(self, name: str) -> SizeIndex:
        """`sizes` (atoms) or `edges` of each row, mapped into memory from a file that ranks and workers share."""
        path = self.folder / f"{name}.npy"
        return SizeIndex(files={"sizes": path}) if path.exists() else SizeIndex({"sizes": self.column(name)})

    def only(self, kept: np.ndarray, distributed: Distributed | None) -> None:
        """Let the sums be those of the rows that are `kept`; all ranks call it. Chunks it changes are read again."""
        path = self.folder / f"sums_{sha256(kept.tobytes()).hexdigest()[:16]}.npz"
        starts = np.cumsum([0, *(len(chunk["sizes"]) for chunk in self.chunks)])
        pieces = [kept[a:b] for a, b in pairwise(starts)]
        changed = [i for i, piece in enumerate(pieces) if (piece != self.chunks[i]["kept"]).any()]
        if not changed:
            return
        if not all(distributed.gather(path.exists())) if distributed else not path.exists():
            rank, num_ranks = (distributed.rank, distributed.num_ranks) if distributed else (0, 1)
            mine = {}
            for i in changed[rank::num_ranks]:
                arguments = (self.rows, starts[i], starts[i + 1], self.cutoffs, self.max_neighbors, self.evidence.fit)
                mine[i] = {k: v for k, v in survey_chunk(*arguments, pieces[i]).items() if k.startswith("sum_")}
            for place, i in enumerate(changed):  # one at a time, so that it stays small
                sums = distributed.from_rank(place % num_ranks, mine.get(i)) if distributed else mine[i]
                self.chunks[i] |= sums | {"kept": pieces[i]}
            if distributed is None or distributed.local_rank == 0:
                arrays = {f"{i}/{name}": self.chunks[i][name] for i in changed for name in self.chunks[i]
                          if name.startswith(("sum_", "kept"))}  # fmt: skip
                if self.folder.is_dir():
                    save(path, lambda file: np.savez_compressed(file, **arrays))
            return
        for name, array in read_chunk(path).items():
            self.chunks[int(name.partition("/")[0])][name.partition("/")[2]] = array


class Surveys:
    """Those of several sources as one, with each row once, for `statistics`."""

    def __init__(self, surveys: list[Survey]):
        self.surveys = surveys

    def total(self, name: str) -> np.ndarray:
        """A sum over all rows that are kept."""
        return np.sum([one.total(name) for one in self.surveys], axis=0)

    def elements(self) -> list[str]:
        """Symbols of all elements, by atomic number, of the rows that are kept."""
        return SYMBOLS[np.flatnonzero(self.total("atoms"))].tolist()


def survey(distributed: Distributed, section: str, rows: datasets.Dataset, cutoffs: Cutoffs,
           max_neighbors: int | None = None, num_processes: int | None = None) -> Survey:  # fmt: skip
    """Survey all rows, or find what an earlier run has found; all ranks call it. Raises ValueError on all of them."""
    rule = (VERSION, rows._fingerprint, len(rows), cutoffs.identity, max_neighbors, CHUNK)
    target = (
        Path(datasets.config.HF_DATASETS_CACHE)
        / "structures"
        / f"survey_{sha256(repr(rule).encode()).hexdigest()[:32]}"
    )
    starts = range(0, len(rows), CHUNK)
    if distributed.local_rank == 0 and target.is_dir() and not complete(target):
        shutil.rmtree(target, ignore_errors=True)
    if not all(distributed.gather(complete(target))):
        parts = target.with_name(f".{target.name}")
        with distributed.shared_errors():
            with writable(section, target):
                parts.mkdir(parents=True, exist_ok=True)
            evidence = gather(rows, cutoffs) if distributed.is_main else None
        evidence = distributed.from_rank(0, evidence)  # the same to the bit on all
        with distributed.shared_errors():
            if len(rows) > CHUNK:
                distributed.say(f"{section}: {len(rows):,} structures are looked through once; what is found is kept.")
            mine = list(range(distributed.rank, len(starts), distributed.num_ranks))
            tasks = [(parts / f"{i}.npz", rows, starts[i], min(starts[i] + CHUNK, len(rows)), cutoffs, max_neighbors,
                      evidence.fit) for i in mine if not (parts / f"{i}.npz").exists()]  # fmt: skip
            processes = num_processes or max(1, (os.cpu_count() or 1) // distributed.num_local_ranks)
            processes = processes if len(tasks) > 4 else 1
            note = f"{section}: neighbours, statistics, checks"
            with writable(section, target):  # also where another run has finished meanwhile, and removed the parts
                for _ in in_processes(chunk_to_file, tasks, processes, note, not distributed.is_main, len(mine)):
                    pass
        spread(distributed, section, parts, target, len(starts))
        with distributed.shared_errors():
            if distributed.local_rank == 0 and not target.is_dir():
                with writable(section, target):
                    keep(target, [parts / f"{i}.npz" for i in range(len(starts))], evidence)
        if distributed.local_rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
    number = json.loads((target / "done.json").read_text())["num_chunks"]
    chunks = [read_chunk(target / f"{i}.npz") for i in range(number)]
    evidence = Evidence(**read_chunk(target / "evidence.npz"))
    return Survey(target, chunks, evidence, rows, cutoffs, max_neighbors)


def complete(target: Path) -> bool:
    """Whether a kept survey has all its files: a damaged one is removed by whoever reads it."""
    try:
        number = json.loads((target / "done.json").read_text())["num_chunks"]
    except (OSError, ValueError):
        return False
    names = ("evidence.npz", "sizes.npy", "edges.npy", *(f"{i}.npz" for i in range(number)))
    return all((target / name).exists() for name in names)


def spread(distributed: Distributed, section: str, parts: Path, target: Path, number: int) -> None:
    """Give each node the chunks that its disk lacks, one at a time, as the rank that made it has it."""
    leads = distributed.local_rank == 0 and not target.is_dir()
    lacking = {i for i in range(number) if not (parts / f"{i}.npz").exists()} if leads else set()
    for i in sorted(set().union(*distributed.gather(lacking))):
        name, owner, content = f"{i}.npz", i % distributed.num_ranks, None
        with distributed.shared_errors(), writable(section, target):
            if distributed.rank == owner:
                content = (target if target.is_dir() else parts).joinpath(name).read_bytes()
        content = distributed.from_rank(owner, content)
        with distributed.shared_errors(), writable(section, target):
            if i in lacking:
                save(parts / name, lambda file, content=content: file.write(content))


def keep(target: Path, chunks: list[Path], evidence: Evidence) -> None:
    """Write a survey of these files, whole or not at all; another run or node may do so at the same time."""
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    made.mkdir()
    try:
        sizes = {"sizes": [], "edges": []}
        for i, file in enumerate(chunks):
            chunk = read_chunk(file)
            shutil.copyfile(file, made / f"{i}.npz")
            for name, found in sizes.items():
                found.append(chunk[name])
        for name, found in sizes.items():
            np.save(made / f"{name}.npy", np.concatenate(found))
        np.savez_compressed(made / "evidence.npz", **evidence.arrays())
        (made / "done.json").write_text(json.dumps({"num_chunks": len(chunks)}))
        made.rename(target)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not target.is_dir():
            raise


# ---- statistics


def solve(normal: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, int]:
    """Least squares by the normal equations, of least norm where they leave something open, and their rank."""
    used = np.flatnonzero(np.diag(normal))
    found = np.zeros(len(normal))
    if len(used) == 0:
        return found, 0
    scale = np.sqrt(np.diag(normal)[used])
    values = np.linalg.eigvalsh(normal[np.ix_(used, used)] / np.outer(scale, scale))
    fine = values > 1e-10 * values.max()
    # Scaled back first: least norm is to mean that of the energies themselves.
    inverse = np.linalg.pinv(normal[np.ix_(used, used)], rcond=1e-12, hermitian=True)
    found[used] = inverse @ right[used]
    return found, int(fine.sum())


def statistics(found: Survey | Surveys, elements: list[str]) -> tuple[dict, list[str]]:
    """Exact over the rows that are kept, in the order of `elements`, and what is to be said of them."""
    index = np.array([NUMBERS[symbol] for symbol in elements], dtype=np.int64)
    atoms, neighbours, force_atoms, squares = (
        found.total(name) for name in ("atoms", "neighbours", "force_atoms", "force_squares")
    )
    normal, right = found.total("normal"), found.total("right")
    energies, rank = solve(normal, right)
    present = np.flatnonzero(np.diag(normal))
    notes = []
    if found.total("energies") and rank < len(present):
        notes.append(
            f"Energies of single elements: only {rank} of {len(present)} can be told apart from these compositions; "
            "those of least norm are taken, which fit the structures as well as any."
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nan_to_num(neighbours / atoms)
        rms = np.nan_to_num(np.sqrt(squares / (3 * force_atoms)))
    numbers = {
        "num_structures": int(found.total("structures")), "num_atoms": int(atoms.sum()),
        "num_labels": {"energy": int(found.total("energies")), "forces": int(force_atoms.sum()),
                       "stress": int(found.total("stresses"))},
        "num_neighbors_mean": float(neighbours.sum() / max(atoms.sum(), 1)),
        "num_neighbors_per_type": mean[index].tolist(),
        "per_element_energy": energies[index].tolist(), "per_element_energy_rank": rank,
        "energy_normal": normal[np.ix_(index, index)].tolist(), "energy_right": right[index].tolist(),
        "energy_per_atom_mean": float(found.total("energy_sum") / max(found.total("energies"), 1)),
        "forces_rms": float(np.sqrt(squares.sum() / max(3 * force_atoms.sum(), 1))),
        "forces_rms_per_type": rms[index].tolist(),
        "stress_rms": float(np.sqrt(found.total("stress_squares") / max(9 * found.total("stresses"), 1))),
    }  # fmt: skip
    return numbers, notes
