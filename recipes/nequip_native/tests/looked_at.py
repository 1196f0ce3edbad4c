# SPDX-License-Identifier: Apache-2.0
"""Files of structures looked through, and structures with other labels, for tests of findings."""

import numpy as np
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from structure_files import labelled, with_labels, write

from atoms.arrow_cache import open_structures
from atoms.findings import findings
from atoms.neighbours import Cutoffs
from atoms.survey import survey


def look(frames, tmp_path, distributed, cutoff=4.0, **options):
    path = write(frames, tmp_path / "mine.extxyz")
    rows = open_structures("dataset", {"path": "structures", "data_files": path}, **options)
    return survey(distributed, "dataset", rows, Cutoffs(cutoff))


def names(found):
    return {finding.name: finding for finding in findings(found)}


def relabel(atoms, **changes):
    """The same atoms with other results; None takes one away."""
    results = {k: v for k, v in {**atoms.calc.results, **changes}.items() if v is not None}
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def walk(number=24, seed=0, cells=False):
    """Frames of one alloy that follow each other in short steps."""
    random = np.random.default_rng(seed)
    atoms = labelled(1, seed, (2, 2, 2))[0]
    frames = []
    for _ in range(number):
        atoms = atoms.copy()
        atoms.positions += random.normal(0, 0.02, atoms.positions.shape)
        if cells:
            atoms.set_cell(atoms.cell.array * (1 + random.normal(0, 0.004)), scale_atoms=True)
        frames.append(with_labels(atoms))
    return frames


def changed(frames, some, **factors):
    """The frames, with the labels of `some` times factors."""
    return [
        relabel(a, **{k: f * a.calc.results[k] for k, f in factors.items()}) if i in some else a
        for i, a in enumerate(frames)
    ]


def dynamics(number=40, seed=0):
    """Frames of one crystal of copper that are far apart, in one cell."""
    random, frames = np.random.default_rng(seed), []
    for _ in range(number):
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        atoms.positions += random.normal(0, 0.12 + 0.06 * random.random(), atoms.positions.shape)
        frames.append(with_labels(atoms))
    return frames
