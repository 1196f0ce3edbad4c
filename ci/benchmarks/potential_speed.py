#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training steps of our NequIP and Allegro beside those of the packages, in turn, with the same weights and data.

In an environment with requirements.txt of recipes/nequip_native, and models/nequip/requirements-peer.txt on top:

    python ci/benchmarks/potential_speed.py --output docs/results/potential_speed.json

Forward pass, forces and stress, and the gradients of a loss, eager, FP32, one thread. Seconds are those of the process
on the CPU, so that other work on the machine counts for little; of several rounds the best is taken.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes" / "nequip_native"), str(ROOT / "models" / "nequip" / "tests")]
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from ase.build import bulk  # noqa: E402
from peer import peer_model  # noqa: E402

from atoms.ase_calculator import graph  # noqa: E402
from atoms.first_weights import init_parameters  # noqa: E402
from atoms.losses import loss_terms  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402
from convert_allegro import allegro_arguments, native_to_allegro  # noqa: E402
from convert_nequip import native_to_nequip, nequip_arguments  # noqa: E402
from modeling_allegro import SIZES as ALLEGRO_SIZES  # noqa: E402
from modeling_allegro import Allegro, AllegroConfig  # noqa: E402
from modeling_nequip import SIZES, NequIP, NequIPConfig  # noqa: E402


ELEMENTS, CUTOFF, COPIES = ["Al", "Cu", "Ni"], 4.5, 4
CASES = {
    "nequip_S": SIZES["nequip_S"],
    "nequip, 3 layers of 64, 32, 16": {"num_layers": 3, "num_features": [64, 32, 16], "radial_width": 64},
    "allegro_S": ALLEGRO_SIZES["allegro_S"],
}


def structures() -> dict[str, torch.Tensor]:
    """Crystals of 32 atoms of three elements, a little shaken, laid end to end."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.1, seed=0)
    atoms.set_chemical_symbols([ELEMENTS[i % 3] for i in range(len(atoms))])
    one, n = graph(atoms, ELEMENTS, CUTOFF, None), len(atoms)
    return {
        "positions": one["positions"].repeat(COPIES, 1), "types": one["types"].repeat(COPIES),
        "cell": one["cell"].repeat(COPIES, 1, 1), "shifts": one["shifts"].repeat(COPIES, 1),
        "edges": torch.cat([one["edges"] + n * i for i in range(COPIES)], 1),
        "structure": torch.arange(COPIES).repeat_interleave(n),
    }  # fmt: skip


def steps(name: str, options: dict, inputs: dict[str, torch.Tensor]):
    """One training step of ours, and of theirs; each returns its loss."""
    n = len(inputs["types"])
    common = {"elements": ELEMENTS, "cutoff": CUTOFF, "num_neighbors": inputs["edges"].shape[1] / n,
              "energy_scales": [1.0] * 3, "energy_shifts": [0.0] * 3}  # fmt: skip
    kinds = (AllegroConfig, Allegro, allegro_arguments, native_to_allegro)
    if name.startswith("nequip"):
        kinds = (NequIPConfig, NequIP, nequip_arguments, native_to_nequip)
    config = kinds[0](**common, **options)
    model = kinds[1](config)
    init_parameters(model, 0)
    model.train().losses = loss_terms(ELEMENTS)
    peer = peer_model("", kinds[2](config), kinds[3](dict(model.state_dict()), config)).train()
    labels = {"energy": torch.zeros(COPIES).double(), "forces": torch.zeros(n, 3).double()}
    counts = {"energies": COPIES, "force_components": 3 * n, "stress_components": 0}

    def ours() -> float:
        model.zero_grad()
        loss = model(**inputs, **labels, counts=counts).loss
        loss.backward()
        return float(loss.detach())

    def theirs() -> float:
        from peer import peer_output

        peer.zero_grad()
        found = peer_output(peer, inputs)
        loss = (found["energy"] / (n / COPIES)).square().mean() / 2 + found["forces"].square().mean() / 2
        loss.backward()
        return float(loss.detach())

    return ours, theirs, sum(p.numel() for p in model.parameters())


def measure(name: str, options: dict, rounds: int) -> dict:
    """Atoms a second of both, in turn."""
    inputs = structures()
    ours, theirs, num_parameters = steps(name, options, inputs)
    losses, best = (ours(), theirs()), [float("inf")] * 2
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), losses
    for _ in range(rounds):
        for i, step in enumerate((ours, theirs)):
            start = time.process_time()
            step()
            best[i] = min(best[i], time.process_time() - start)
    speeds = [len(inputs["types"]) / seconds for seconds in best]
    return {"name": name, "num_parameters": num_parameters, "ours": speeds[0], "package": speeds[1],
            "ratio": speeds[0] / speeds[1]}  # fmt: skip


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, options in CASES.items():
        rows.append(measure(name, options, arguments.rounds))
        print(json.dumps(rows[-1]), flush=True)
    from importlib.metadata import version

    packages = {name: version(name) for name in ("nequip", "nequip-allegro", "e3nn")}
    found = {"cpu": cpu_name(), "system": platform.platform(), "versions": versions() | packages, "threads": 1,
             "unit": "atoms a second of the process's time on the CPU", "rows": rows}  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
