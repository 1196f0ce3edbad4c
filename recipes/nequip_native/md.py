# SPDX-License-Identifier: Apache-2.0
"""Molecular dynamics of a structure with a final model, by ASE, with a trajectory and a picture of the energies.

    python md.py final_model structure.xyz --temperature 300 --steps 1000
    python md.py committee/*/final_model structure.xyz

With several models, which differ by their seed, it runs on their mean, and the picture shows how much they differ.
At constant energy (velocity Verlet) after velocities of that temperature, or with a Langevin thermostat (--nvt). The
trajectory can be watched while it grows, and is there when a run is stopped.
"""

import argparse
from math import inf
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
import matplotlib as mpl
import numpy as np
from ase import units
from ase.io import Trajectory
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from tqdm import tqdm

from atoms.final_model import calculator, frames, refuse_existing
from common.command import command, writing


mpl.use("Agg")
from matplotlib import pyplot as plt


def run(models: list[Path], structure: Path, target: Path, temperature: float, steps: int, timestep: float, nvt: bool,
        every: int, seed: int) -> dict[str, float]:  # fmt: skip
    """Write `target.traj` and `target.png`; returns the total energy's drift and range, and the mean temperature.

    Of several models also the largest `forces_std` of an atom, in eV/A, in all frames that are kept. Raises ValueError
    for impossible options, and for atoms that fly apart.
    """
    if steps < 1 or every < 1 or not (0 < timestep < inf and 0 <= temperature < inf):
        raise ValueError("--steps, --timestep and --every must be above 0, and --temperature at least 0.")
    drawn = target.with_name(f"{target.name}.png")
    written = target.with_name(f"{target.name}.traj")
    refuse_existing(written, drawn)
    potential, random = calculator(*models), np.random.default_rng(seed)
    atoms = frames(structure, "-1:")[0]
    atoms.calc = potential
    atoms.get_potential_energy()  # an element that the model does not know, before a file is begun
    # Maxwell and Boltzmann's: ASE's function for it changed its name between releases.
    spread = np.sqrt(units.kB * temperature * atoms.get_masses())
    atoms.set_momenta(spread[:, None] * random.standard_normal((len(atoms), 3)))
    Stationary(atoms)
    if nvt:
        dynamics = Langevin(atoms, timestep * units.fs, temperature_K=temperature, friction=0.01 / units.fs,
                            fixcm=False, rng=random)  # fmt: skip
    else:
        dynamics = VelocityVerlet(atoms, timestep * units.fs)
    energies, per_kelvin = [], 1.5 * units.kB * len(atoms)
    with Trajectory(written, "w", atoms) as trajectory, tqdm(total=steps, unit="step") as bar:
        for step in range(steps + 1):
            if step % every == 0:
                energies.append([step * timestep, atoms.get_potential_energy(), atoms.get_kinetic_energy()])
                energies[-1].append(np.max(atoms.calc.results.get("forces_std", 0.0)))
                trajectory.write(atoms)
            if not (hot := atoms.get_kinetic_energy() / per_kelvin) < 10 * temperature + 10_000:
                raise ValueError(
                    f"The atoms fly apart: they are at {hot:,.0f} K at step {step}; take a shorter --timestep, relax "
                    "the structure first, or train on more such structures."
                )
            if step < steps:
                dynamics.run(1)
                bar.update()
    table = np.array(energies)
    total = (table[:, 1] + table[:, 2]) / len(atoms)
    drift = np.polyfit(table[:, 0], total, 1)[0] * 1e6 if len(table) > 1 else 0.0  # eV/fs to meV/ps
    panels = 2 if len(models) == 1 else 3
    figure, axes = plt.subplots(panels, sharex=True, figsize=(7, 2.5 * panels), layout="constrained")
    axes[0].plot(table[:, 0], 1000 * (total - total[0]))
    axes[0].set_ylabel("total energy - first, meV/atom")
    kelvin = table[:, 2] / per_kelvin
    axes[1].plot(table[:, 0], kelvin)
    axes[1].set_ylabel("temperature, K")
    if len(models) > 1:
        axes[2].plot(table[:, 0], table[:, 3])
        axes[2].set_ylabel("largest spread of forces, eV/A")
    axes[-1].set_xlabel("time, fs")
    with writing(drawn):
        figure.savefig(drawn, dpi=120)
    plt.close(figure)
    spread = {} if len(models) == 1 else {"largest_forces_std": float(table[:, 3].max())}
    return {"drift_mev_per_atom_ps": float(drift), "swing_mev_per_atom": float(1000 * np.ptp(total)),
            "mean_temperature": float(kelvin.mean()), **spread}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="a final_model folder, or several: a committee")
    parser.add_argument("structure", type=Path, help="a file that ASE reads; its last frame is taken")
    parser.add_argument("--output", type=Path, default=Path("md"), help="name of what is written, without an ending")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--timestep", type=float, default=1.0, help="fs")
    parser.add_argument("--nvt", action="store_true", help="with a thermostat")
    parser.add_argument("--every", type=int, default=10, help="steps between frames that are kept")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with command():
        found = run(a.models, a.structure, a.output, a.temperature, a.steps, a.timestep, a.nvt, a.every, a.seed)
        if a.nvt:
            print(f"Mean temperature: {found['mean_temperature']:.0f} K.")
        else:
            print(f"The total energy drifts by {found['drift_mev_per_atom_ps']:.3g} meV per atom and ps, within "
                  f"{found['swing_mev_per_atom']:.3g} meV per atom; a shorter --timestep lessens both.")  # fmt: skip
        if "largest_forces_std" in found:
            print(f"The models' forces differ by up to {found['largest_forces_std']:.3g} eV/A (standard deviation).")
        print(f"{a.output}.traj and {a.output}.png are written; look at the trajectory: ase gui {a.output}.traj")
