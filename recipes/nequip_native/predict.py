# SPDX-License-Identifier: Apache-2.0
"""Energies, forces and stress of structures by a potential, or by several, whose spread says where they are unsure.

    python predict.py structures.xyz predicted.extxyz MODEL
    torchrun --nproc_per_node=2 predict.py 'frames/*.traj' predicted.parquet MODEL MODEL MODEL

MODEL is a final model, a checkpoint, a run's folder, or a checkpoint or package of nequip. Stopped, the same command
goes on. The structures come in their order, with `energy` (eV), `forces` (eV/A) and, where they are periodic along all
three directions, `stress` (eV/A^3); of several models the means, and their standard deviations `energy_std` and
`forces_std` (an atom's: the root of its components' variances). The target is .extxyz, .xyz, .parquet or .arrow, of
which training reads all.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import os
import sys
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz
from tqdm import tqdm

from atoms.arrow_cache import open_structures
from atoms.kernels import products
from atoms.neighbours import Cutoffs
from atoms.potential import Potential
from atoms.structures import NUMBERS, SYMBOLS, Structures, structures_of
from build_model import open_potential
from collator import GraphCollator
from common.command import command
from common.distributed import Distributed, end_of_process, process_group
from common.kept_steps import fingerprint
from common.parts import Parts, joined
from pretrained import named_cutoffs


ROWS_PER_PART = 256  # of what is written at once, and not computed again after an interruption
GEOMETRY = ("numbers", "positions", "cell", "pbc", "energy", "forces", "stress", "charge", "spin")
LABELS = ("energy", "forces", "stress")


def open_models(sources: list[str], device: torch.device) -> tuple[list[Potential], list[str]]:
    """The potentials, and what tells their weights from others. Raises ValueError for what is none."""
    models, prints = [], []
    for source in sources:
        model = open_potential(source)
        model.kernels, *_ = products("auto", device)
        config = json.dumps(model.config.to_dict()).encode()
        prints.append(fingerprint(model.state_dict(), None, source) + sha256(config).hexdigest())
        models.append(model.to(device).eval().requires_grad_(False))
    return models, prints


def check_rows(rows: datasets.Dataset, models: list[Potential]) -> None:
    """Raise ValueError for the first frame with an element that a model does not know, or without a geometry."""
    known = set.intersection(*(set(model.config.elements) for model in models))
    numbers = np.array([NUMBERS[symbol] for symbol in known])
    table = rows.with_format("arrow", columns=[*GEOMETRY])
    for at in range(0, len(rows), 2000):
        some = structures_of(table[at : at + 2000])
        strange = ~np.isin(some.numbers, numbers)
        broken = ~np.isfinite(some.positions).all(-1) | ~np.isfinite(some.cell).all((1, 2))[some.structure]
        rank = np.linalg.matrix_rank(np.nan_to_num(some.cell * some.pbc[:, :, None]), 1e-3)
        flat = (rank < some.pbc.sum(1))[some.structure]
        if not (wrong := strange | broken | flat).any():
            continue
        atom = int(np.flatnonzero(wrong)[0])
        row = rows[at + int(some.structure[atom])]
        where = f"{row['source']}, frame {row['key']}"
        if strange[atom]:
            symbols = ", ".join(sorted(known))
            raise ValueError(f"{where}: there is {SYMBOLS[some.numbers[atom]]}, and the potential knows {symbols}.")
        raise ValueError(f"{where}: a position or its cell is no number, or it is periodic without a lattice vector.")


def predicted(models: list[Potential], structures: Structures) -> dict[str, np.ndarray]:
    """`energy` [S], `forces` [A, 3], `stress` [S, 3, 3]; of several models also `energy_std` [S], `forces_std` [A]."""
    found: dict[str, list] = {label: [] for label in LABELS}
    for model in models:
        config = model.config
        collate = GraphCollator("data", Cutoffs(config.cutoff, named_cutoffs(config)), config.elements)
        inputs = collate({"items": structures, "name": (0, 0, 0)}).inputs
        device = next(model.parameters()).device
        output = model(**{k: v.to(device) for k, v in inputs.items() if k not in LABELS})
        for label, value in zip(LABELS, (output.energies, output.forces, output.stress), strict=True):
            found[label].append(value.detach().double().cpu().numpy())
    result = {label: np.mean(values, axis=0) for label, values in found.items()}
    result["stress"][~structures.pbc.all(1)] = np.nan
    if len(models) > 1:
        result["energy_std"] = np.std(found["energy"], axis=0, ddof=1)
        result["forces_std"] = np.sqrt(np.var(found["forces"], axis=0, ddof=1).sum(-1))
    return result


def part_table(rows: pa.Table, models: list[Potential], max_atoms: int) -> pa.Table:
    """Some rows with what is predicted for them; so many atoms go through a model at once.

    Raises ValueError for a structure without an energy.
    """
    structures = structures_of(rows)
    ends = structures.starts[1:]
    groups, first = [], 0
    while first < len(structures):  # at least one structure each
        last = max(first + 1, int(np.searchsorted(ends, structures.starts[first] + max_atoms, "right")))
        groups.append(predicted(models, structures.take(np.arange(first, last))))
        first = last
    found = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    if len(wrong := np.flatnonzero(~np.isfinite(found["energy"]))):
        where = f"{rows['source'][wrong[0]]}, frame {rows['key'][wrong[0]]}"
        raise ValueError(f"{where}: its energy is not a number; look for atoms in the same place.")
    periodic = structures.pbc.all(1)

    def lists(values: np.ndarray, components: int, absent: np.ndarray | None = None) -> pa.Array:
        offsets = pa.array(structures.starts * components, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()), mask=absent)

    columns = {name: rows[name] for name in ("numbers", "positions", "cell", "pbc", "source", "key")}
    columns |= {"energy": pa.array(found["energy"]), "forces": lists(found["forces"], 3)}
    columns["stress"] = pa.array(
        [s.ravel() if p else None for s, p in zip(found["stress"], periodic, strict=True)], pa.list_(pa.float64())
    )
    if "energy_std" in found:
        columns |= {"energy_std": pa.array(found["energy_std"]), "forces_std": lists(found["forces_std"], 1)}
    return pa.table(columns)


def as_extxyz(files: list[Path], target: Path) -> None:
    """Parts as one file that ASE and others read."""
    with open(target, "w") as stream:
        for file in files:
            for row in pq.read_table(file).to_pylist():
                atoms = Atoms(row["numbers"], np.reshape(row["positions"], (-1, 3)),
                              cell=np.reshape(row["cell"], (3, 3)), pbc=row["pbc"])  # fmt: skip
                results = {"energy": row["energy"], "forces": np.reshape(row["forces"], (-1, 3))}
                if row["stress"] is not None:
                    results["stress"] = np.reshape(row["stress"], (3, 3))[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
                atoms.calc = SinglePointCalculator(atoms, **results)
                atoms.info |= {"source": row["source"], "frame": row["key"]}
                if "energy_std" in row:
                    atoms.info["energy_std"] = row["energy_std"]
                    atoms.arrays["forces_std"] = np.array(row["forces_std"])
                write_extxyz(stream, [atoms])


def as_arrow(files: list[Path], target: Path) -> None:
    """Parts as one Arrow stream, as `datasets` has them."""
    with pa.ipc.new_stream(target, pq.read_schema(files[0])) as writer:
        for file in files:
            writer.write_table(pq.read_table(file))


WRITERS = {".extxyz": as_extxyz, ".xyz": as_extxyz, ".parquet": joined, ".arrow": as_arrow}


def predict(distributed: Distributed, options: argparse.Namespace) -> None:
    """All of it; every rank takes its share of the parts."""
    target = Path(options.target)
    with distributed.fail_together():
        if target.suffix not in WRITERS:
            raise ValueError(f"{target} must end with {', '.join(WRITERS)}.")
        if options.atoms < 1:
            raise ValueError(f"--atoms={options.atoms} must be at least 1.")
        models, prints = open_models(options.models, distributed.device)
        data, processes = {"path": "structures", "data_files": options.structures}, os.cpu_count() or 1
        with distributed.main_first():
            processes = max(1, processes // distributed.num_local_ranks)
            rows = open_structures("data", data, None, None, processes, not distributed.is_main)
        check_rows(rows, models)
        job = {"data": rows._fingerprint, "models": prints, "rows_per_part": ROWS_PER_PART}
        parts = Parts(distributed, target, job)
    table, count = rows.with_format("arrow"), -(-len(rows) // ROWS_PER_PART)
    with tqdm(total=len(rows), unit=" structures", disable=not distributed.is_main) as bar:
        for number, is_there in parts.mine(count):
            some = table[number * ROWS_PER_PART : min((number + 1) * ROWS_PER_PART, len(rows))]
            if not is_there:
                parts.save(number, part_table(some, models, options.atoms))
            bar.update(min(len(some) * distributed.num_ranks, len(rows) - bar.n))
    parts.join(count, WRITERS[target.suffix])
    of = f", by {len(models)} models with their standard deviations" if len(models) > 1 else ""
    distributed.say(f"{len(rows):,} structures{of}: {target}")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", help="a file, quoted pattern or folder of structures, labelled or not")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--atoms", type=int, default=2000, help="how many go through a model at once")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """In a process group of its own."""
    options = parse(words)
    with process_group(seed=0) as distributed:
        predict(distributed, options)


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
