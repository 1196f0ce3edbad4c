# SPDX-License-Identifier: Apache-2.0
"""Say what is in files of structures, and what may be wrong with it: statistics, findings, histograms.

    python inspect_data.py data/train.extxyz --cutoff 5
    python inspect_data.py 'runs/*.xml' --label energy=free_energy --unit stress=-kbar --out report
    torchrun --nproc_per_node=8 inspect_data.py big.aselmdb

Training makes the same checks before it starts, and uses the results of these. With `--potential`, a final model,
stress labels are also compared with finite differences of its energy.
Exit code 1: there are frames that training would refuse.
"""

import argparse
import json
import os
import sys
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import numpy as np

from atoms.arrow_cache import open_structures
from atoms.checks import BAD, check
from atoms.final_model import calculator
from atoms.findings import Finding, findings
from atoms.neighbours import Cutoffs
from atoms.structures import SYMBOLS, structures_of
from atoms.survey import Survey, statistics, survey
from common.command import one_line, writing
from common.distributed import Distributed, end_of_process, process_group, stop_with


SHOWN = 2000  # structures that the picture's histograms by element are made of
COMPARED = 8  # structures whose stress a potential is asked for
STRAIN = 1e-3


def pairs(given: list[str]) -> dict[str, str]:
    """Read `energy=REF_energy` as a dictionary's entry. Raises ValueError for anything else."""
    if wrong := [text for text in given if "=" not in text]:
        raise ValueError(f"{wrong[0]}: give NAME=VALUE, as energy=REF_energy.")
    return dict(text.split("=", 1) for text in given)


def picture(path: Path, found: Survey, elements: list[str]) -> None:
    """Histograms of energies per atom, forces, neighbours and nearest distances of a sample, by element."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = np.unique(np.linspace(0, len(found.rows) - 1, SHOWN).astype(np.int64))
    rows = rows[(found.flags[rows] & BAD) == 0]
    if not len(rows):
        return
    structures = structures_of(found.rows.with_format("arrow")[rows])
    checked = check(structures, found.cutoffs, found.max_neighbors)
    nearest = checked.nearest(checked.distances, len(structures.numbers))
    neighbours = checked.neighbours(len(structures.numbers))
    forces = np.linalg.norm(structures.forces, axis=1)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    with np.errstate(invalid="ignore", divide="ignore"):
        energy = (found.energy / found.atoms)[(found.flags & BAD) == 0]
    panels = (
        (axes[0, 0], {"": energy}, "energy per atom, eV", False),
        (axes[0, 1], {"": found.energy_deviation}, "energy per atom - that of its elements, eV", False),
        (axes[0, 2], {"": found.atoms}, "atoms per structure", False),
        (axes[1, 0], forces, "force, eV/A", True),
        (axes[1, 1], neighbours.astype(float), f"neighbours within {found.cutoffs.largest:g} A", False),
        (axes[1, 2], nearest, "distance to the nearest neighbour, A", False),
    )
    most = sorted(elements, key=lambda symbol: -np.sum(SYMBOLS[structures.numbers] == symbol))[:8]
    for axis, values, label, logarithmic in panels:
        if not isinstance(values, dict):
            values = {symbol: values[SYMBOLS[structures.numbers] == symbol] for symbol in most}
        values = {name: v[np.isfinite(v) & ((v > 0) | (not logarithmic))] for name, v in values.items()}
        every = np.concatenate(list(values.values()))
        if len(every):
            low, high = float(every.min()), float(every.max())
            low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
            bins = np.linspace(low, high, 60)
            if logarithmic and high > 1e-4:
                bins = np.geomspace(max(low, 1e-4), high, 60)
            elif high - low < 100 and np.array_equal(every, np.rint(every)):
                bins = np.arange(every.min() - 0.5, every.max() + 1)  # of counts
            for name, v in values.items():
                axis.hist(v, bins=bins, histtype="step", label=name or None)
        counted = "structures" if axis in axes[0] else "atoms"
        axis.set(xlabel=label, ylabel=counted, yscale="log", xscale="log" if logarithmic and len(every) else "linear")
    axes[1, 0].legend(fontsize=8)
    figure.suptitle(
        f"{len(found.rows):,} structures, {int(found.atoms.sum()):,} atoms"
        + ("" if len(rows) == len(found.rows) else f"; those by element are of {len(rows):,} structures")
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare_stress(found: Survey, potential: Path) -> list[Finding]:
    """Compare stress labels with the derivative of the potential's energy by strain: sign and unit."""
    structures = structures_of(found.rows.with_format("arrow")[:5000])
    some = np.flatnonzero(np.isfinite(structures.stress).all((1, 2)) & ((found.flags[: len(structures)] & BAD) == 0))
    if not len(some):
        return []
    some = some[np.linspace(0, len(some) - 1, min(COMPARED, len(some))).astype(int)]
    asked, labels, ours = load_calculator(potential), [], []
    for i in some:
        labels.append(np.trace(structures.stress[i]) / 3)
        ours.append(pressure(structures.take(np.array([i])), asked))
    labels, ours = np.array(labels), np.array(ours)
    slope, held = float(labels @ ours / (ours @ ours)), float((labels @ ours) ** 2 / (labels @ labels) / (ours @ ours))
    if held < 0.5 or 0.5 < slope < 2:
        return []
    # A poor potential is wrong by any factor; by a unit's or a sign only the labels are.
    bad = held > 0.8 and any(abs(abs(np.log(abs(slope))) - np.log(one)) < 0.3 for one in (1, 160.2, 1602, 1.602e6))
    text = f"Stress is {slope:.3g} times what differences of the potential's energy give, in {len(some)} structures "
    told = (
        "set --unit stress=... (training: +dataset.units.stress=...)"
        if bad
        else "is the potential good enough to tell?"
    )
    return [Finding("stress_potential", bad, f"{text}[stress]; {told}.")]


def pressure(structure, potential) -> float:
    """Return a third of the trace of dE/d(strain)/V in eV/A^3, by a central difference."""
    from ase import Atoms

    atoms = Atoms(structure.numbers, structure.positions, cell=structure.cell[0], pbc=structure.pbc[0])
    volume, energies = atoms.get_volume(), []
    for strain in (STRAIN, -STRAIN):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array * (1 + strain), scale_atoms=True)
        strained.calc = potential
        energies.append(strained.get_potential_energy())
    return (energies[0] - energies[1]) / (2 * STRAIN) / volume / 3


def load_calculator(potential: Path):
    """Return ASE's EMT (`emt`), or a final model's own calculator. Raises ValueError for another folder."""
    if str(potential) == "emt":
        from ase.calculators.emt import EMT

        return EMT()
    return calculator(potential)


def of_statistics(found: Survey, numbers: dict, elements: list[str]) -> list[str]:
    """Return the lines on the structures that can be used."""
    return [
        f"neighbours within {found.cutoffs.largest:g} A: {numbers['num_neighbors_mean']:.1f} per atom",
        f"energies: {numbers['energy_per_atom_mean']:.4f} eV per atom; of the elements, in eV by least squares of "
        f"rank {numbers['per_element_energy_rank']}: "
        + ", ".join(f"{e} {v:.4f}" for e, v in zip(elements, numbers["per_element_energy"], strict=True)),
        f"forces: RMS {numbers['forces_rms']:.4f} eV/A; "
        + ", ".join(f"{e} {v:.4f}" for e, v in zip(elements, numbers["forces_rms_per_type"], strict=True)),
        f"stress: RMS {numbers['stress_rms']:.5f} eV/A^3 ({numbers['stress_rms'] * 160.21766:.2f} GPa)"
        if found.total("stresses")
        else "stress: none",
    ]


def report(found: Survey, problems: list[Finding], numbers: dict, elements: list[str], notes: list[str]) -> str:
    """Return the whole report as text."""
    sizes = f"{int(found.atoms.sum()):,} atoms ({int(found.atoms.min())} to {int(found.atoms.max())} each)"
    lines = [f"{len(found.rows):,} structures, {sizes}, elements {' '.join(elements)}"]
    if elements:
        lines += of_statistics(found, numbers, elements)
    else:
        lines = [f"{len(found.rows):,} structures, {sizes}; none of them can be used"]
    lines += [*notes, ""]
    lines += [f"{'BAD' if one.bad else 'odd'}  {one.text}" for one in problems] or ["nothing is wrong with them"]
    if any("+dataset." in one.text for one in problems):
        lines.append(
            "Here, +dataset.label_keys.energy=KEY is --label energy=KEY, and +dataset.units.energy=UNIT --unit."
        )
    return "\n".join(lines)


def inspect(distributed: Distributed, arguments: argparse.Namespace) -> bool:
    """Print the report, write it and its picture, and say whether training would take the data."""
    processes = max(1, (os.cpu_count() or 1) // distributed.num_local_ranks)
    with distributed.main_first():
        kwargs = {"path": "structures", "data_files": arguments.files, "split": arguments.split}
        rows = open_structures(
            "dataset", kwargs, pairs(arguments.label), pairs(arguments.unit), processes, not distributed.is_main
        )
    found = survey(distributed, "dataset", rows, Cutoffs(arguments.cutoff), arguments.max_neighbors)
    problems = findings(found)
    if distributed.is_main and arguments.potential:
        problems = [*compare_stress(found, arguments.potential), *problems]
    if distributed.is_main:
        elements = found.elements()
        numbers, notes = statistics(found, elements)
        print(report(found, problems, numbers, elements, notes))
        listed = [{"name": p.name, "bad": bool(p.bad), "text": p.text, "rows": p.rows.tolist()} for p in problems]
        whole = {"elements": elements, "cutoff": arguments.cutoff, "statistics": numbers, "findings": listed}
        with writing(arguments.out):
            arguments.out.mkdir(parents=True, exist_ok=True)
            partial = arguments.out / ".data.json.partial"
            partial.write_text(json.dumps(whole, indent=1) + "\n")
            partial.rename(arguments.out / "data.json")  # the report before is replaced
            (arguments.out / "data.png").unlink(missing_ok=True)
            picture(arguments.out / "data.png", found, elements)
        written = [str(arguments.out / name) for name in ("data.json", "data.png") if (arguments.out / name).exists()]
        print(f"\nwritten: {', '.join(written)}")
    return not any(problem.bad for problem in problems)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="files or patterns, of any kind that ASE reads; npz, HDF5, Parquet")
    parser.add_argument("--cutoff", type=float, default=5.0, help="for neighbours, A (default 5)")
    parser.add_argument("--max-neighbors", type=int, help="of an atom, as in training")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=KEY", help="as energy=REF_energy")
    parser.add_argument(
        "--unit", action="append", default=[], metavar="NAME=UNIT", help="as stress=GPa, forces=-eV/Ang"
    )
    parser.add_argument("--split", help="a part of the data, as train[90%%:]")
    parser.add_argument("--potential", type=Path, help="a final_model/, or emt: compare stress with its energies")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the report (default outputs)")
    arguments = parser.parse_args()
    try:
        with process_group(seed=0) as distributed, distributed.fail_together():
            return 0 if inspect(distributed, arguments) else 1
    except (ValueError, OSError) as error:
        stop_with(one_line(error))


if __name__ == "__main__":
    with end_of_process():
        sys.exit(main())
