# SPDX-License-Identifier: Apache-2.0
"""Relax structures with a final model, by ASE: positions, and with --cell the cell too.

python relax.py final_model structures.xyz relaxed.xyz --cell
"""

import argparse
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import FIRE
from tqdm import tqdm

from atoms.final_model import calculator, frames, refuse_existing
from common.command import command, writing


def run(model: Path, source: Path, target: Path, max_force: float, max_steps: int, cell: bool) -> tuple[int, int]:
    """Write the relaxed structures, `converged` in each; returns how many did not get there, of how many.

    Raises ValueError for a structure that cannot be relaxed, if possible before the first is.
    """
    if not max_force > 0 or max_steps < 1:
        raise ValueError("--max-force and --max-steps must be above 0.")
    if target.suffix not in (".xyz", ".extxyz"):
        raise ValueError(f"{target} must end with .xyz or .extxyz.")
    refuse_existing(target)
    potential, relaxed = calculator(model), frames(source, ":")
    known = potential.model.config.elements
    for number, atoms in enumerate(relaxed):
        if unknown := sorted(set(atoms.symbols) - set(known)):
            raise ValueError(f"frame {number} of {source} has {unknown[0]}; the potential knows {', '.join(known)}.")
        if cell and not atoms.pbc.all():
            raise ValueError(f"frame {number} of {source} is not periodic in all directions; leave --cell out.")
    for number, atoms in enumerate(tqdm(relaxed, unit="structure")):
        atoms.calc = potential
        try:
            converged = FIRE(FrechetCellFilter(atoms) if cell else atoms, logfile=None).run(max_force, max_steps)
            atoms.get_potential_energy()
        except ValueError as error:
            raise ValueError(f"frame {number} of {source}: {error}") from error
        results = {name: potential.results.get(name) for name in ("energy", "forces", "stress")}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["converged"] = bool(converged)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with writing(target):
            write(partial, relaxed, format="extxyz")
            partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return sum(not atoms.info["converged"] for atoms in relaxed), len(relaxed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a final_model folder")
    parser.add_argument("source", type=Path, help="structures that ASE reads")
    parser.add_argument("target", type=Path, help="where the relaxed ones go, as extxyz")
    parser.add_argument("--max-force", type=float, default=0.02, help="eV/A, at which a structure is relaxed")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--cell", action="store_true", help="relax the cell as well")
    a = parser.parse_args()
    with command():
        failed, number = run(a.model, a.source, a.target, a.max_force, a.max_steps, a.cell)
        if failed:
            print(f"{failed} of {number} did not get below {a.max_force} eV/A in {a.max_steps} steps (converged=F in "
                  "the file).")  # fmt: skip
        print(f"{a.target} is written; look at it: ase gui {a.target}")
