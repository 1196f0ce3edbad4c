#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training steps of our NequIP and Allegro beside those of the packages, in turn, with the same weights and data.

In an environment with requirements.txt of recipes/nequip_native, and models/nequip/requirements-peer.txt on top:

    python ci/benchmarks/potential_speed.py --output docs/results/potential_speed.json
    python ci/benchmarks/potential_speed.py --from docs/results/potential_speed*.json --table PAGE.md

Forward pass, forces and stress, and the gradients of a loss, eager and compiled, FP32, one thread. Seconds are those
of the process on the CPU, so that other work on the machine counts for little; of several rounds the best is taken.
Memory is what eager steps add at most to what the process had before the first, each side in a process of its own.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes" / "nequip_native"), str(ROOT / "models" / "nequip" / "tests")]
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from ase.io import read  # noqa: E402

from atoms.ase_calculator import graph  # noqa: E402
from atoms.compiled import CompiledDerivatives  # noqa: E402
from atoms.first_weights import init_parameters  # noqa: E402
from atoms.kernels import products  # noqa: E402
from atoms.losses import loss_terms  # noqa: E402
from atoms.neighbours import lengths_once  # noqa: E402
from common.contract.running import write_table  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402
from convert_allegro import allegro_arguments, native_to_allegro  # noqa: E402
from convert_nequip import native_to_nequip, nequip_arguments  # noqa: E402
from modeling_allegro import SIZES as ALLEGRO_SIZES  # noqa: E402
from modeling_allegro import Allegro, AllegroConfig  # noqa: E402
from modeling_nequip import SIZES, NequIP, NequIPConfig  # noqa: E402


CUTOFF, NUM_STRUCTURES = 4.5, 6
SAMPLE = ROOT / "recipes" / "nequip_native" / "data" / "train.extxyz"
CASES = {"nequip_S": SIZES["nequip_S"], "allegro_S": ALLEGRO_SIZES["allegro_S"], "nequip_M": SIZES["nequip_M"]}
EAGER = {"nequip_M"}  # the package's compiler would take minutes
SIDES = ("package", "ours", "package_compiled", "ours_compiled")


def batch(data: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The first structures of a file, laid end to end, and their elements."""
    frames = read(data, f":{NUM_STRUCTURES}")
    elements = sorted({symbol for atoms in frames for symbol in atoms.get_chemical_symbols()})
    found, start = [graph(atoms, elements, CUTOFF, None) for atoms in frames], 0
    for one in found:
        one["edges"], start = one["edges"] + start, start + len(one["types"])
    inputs = {name: torch.cat([one[name] for one in found]) for name in ("positions", "types", "cell", "shifts")}
    sizes = torch.tensor([len(one["types"]) for one in found])
    inputs["edges"] = torch.cat([one["edges"] for one in found], 1)
    inputs["structure"] = torch.repeat_interleave(sizes)
    return inputs, elements


def step_of(side: str, name: str, inputs: dict[str, torch.Tensor], elements: list[str]) -> tuple[Callable, int]:
    """One training step, which returns its loss, and the number of parameters."""
    n, number = len(inputs["types"]), len(elements)
    common = {"elements": elements, "cutoff": CUTOFF, "num_neighbors": inputs["edges"].shape[1] / n,
              "energy_scales": [1.0] * number, "energy_shifts": [0.0] * number}  # fmt: skip
    kinds = (AllegroConfig, Allegro, allegro_arguments, native_to_allegro)
    if name.startswith("nequip"):
        kinds = (NequIPConfig, NequIP, nequip_arguments, native_to_nequip)
    config = kinds[0](**common, **CASES[name])
    model = kinds[1](config)
    init_parameters(model, 0)
    num_structures = len(inputs["cell"])
    num_parameters = sum(p.numel() for p in model.parameters())
    if side.startswith("package"):
        from peer import peer_model, peer_output  # has the package, which a table can do without

        mode = "compile" if side.endswith("compiled") else "eager"
        sizes = torch.bincount(inputs["structure"])
        peer = peer_model("", kinds[2](config), kinds[3](dict(model.state_dict()), config), mode).train()

        def theirs() -> float:
            peer.zero_grad()
            found = peer_output(peer, inputs)
            loss = (found["energy"] / sizes).square().mean() / 2 + found["forces"].square().mean() / 2
            loss.backward()
            return float(loss.detach())

        return theirs, num_parameters
    model.train().losses = loss_terms(elements)
    model.kernels, *_ = products("auto", torch.device("cpu"))
    if side.endswith("compiled"):
        model.compiled = CompiledDerivatives(model)
    once, row = lengths_once(inputs["edges"].numpy(), inputs["shifts"].long().numpy())  # as workers do
    labels = {"energy": torch.zeros(num_structures).double(), "forces": torch.zeros(n, 3).double()}
    counts = {"energies": num_structures, "force_components": 3 * n, "stress_components": 0}
    inputs = inputs | labels | {"once": torch.from_numpy(once), "row": torch.from_numpy(row)}

    def ours() -> float:
        model.zero_grad()
        loss = model(**inputs, counts=counts).loss
        loss.backward()
        return float(loss.detach())

    return ours, num_parameters


def memory_of(side: str, name: str, data: Path) -> float:
    """MiB that steps add, in this process."""
    inputs, elements = batch(data)
    step, _ = step_of(side, name, inputs, elements)

    def held(what: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
        return int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    before = held("VmRSS")
    for _ in range(3):
        step()
    return (held("VmHWM") - before) / 1024


def measure(name: str, data: Path, rounds: int, sides: tuple[str, ...]) -> dict:
    """Atoms a second of all sides, in turn, and what their steps need of memory."""
    inputs, elements = batch(data)
    steps, losses, first_s = {}, {}, {}
    for side in sides:
        start = time.perf_counter()
        steps[side], num_parameters = step_of(side, name, inputs, elements)
        losses[side] = steps[side]()
        first_s[side] = time.perf_counter() - start
        steps[side]()
    assert max(losses.values()) - min(losses.values()) < 1e-4 * abs(losses["ours"]), losses
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for side, step in steps.items():
            start = time.process_time()
            step()
            best[side] = min(best[side], time.process_time() - start)
    speeds = {side: len(inputs["types"]) / seconds for side, seconds in best.items()}
    memory = {}
    for side in ("package", "ours"):
        command = [sys.executable, __file__, "--memory-of", side, name, "--data", str(data)]
        memory[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    row = {"name": name, "num_parameters": num_parameters, "num_atoms": len(inputs["types"]),
           "num_edges": inputs["edges"].shape[1], "atoms_per_s": speeds, "step_mib": memory,
           "first_step_s": first_s}  # fmt: skip
    row["eager_ratio"] = speeds["ours"] / speeds["package"]
    if "ours_compiled" in sides:
        row["compiled_ratio"] = speeds["ours_compiled"] / speeds["package_compiled"]
    return row


def table(results: list[dict]) -> str:
    """For a page."""
    heads = ("", "package", "here", "", "package, compiled", "here, `use_torch_compile`", "", "MiB, package", "here")
    lines = ["| " + " | ".join(heads) + " |", "|" + len(heads) * "---|"]
    for row in (row for result in results for row in result["rows"]):
        speed, cells = row["atoms_per_s"], [f"`{row['name']}`, {row['num_atoms'] // NUM_STRUCTURES} atoms"]
        for end, ratio in (("", "eager_ratio"), ("_compiled", "compiled_ratio")):
            both = [f"{speed[side + end]:,.0f}" for side in ("package", "ours") if side + end in speed]
            cells += [*both, f"{row[ratio]:.1f} x"] if both else 3 * ["-"]
        cells += [f"{row['step_mib'][side]:,.0f}" for side in ("package", "ours")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", help="run nothing, take these numbers")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a file with structures")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, which takes minutes")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "CASE"), help="what a measurement asks of itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(memory_of(*arguments.memory_of, arguments.data))
        return
    if arguments.sources:
        results = [json.loads(path.read_text()) for path in arguments.sources]
    else:
        packages = {name: version(name) for name in ("nequip", "nequip-allegro", "e3nn")}
        found = {"cpu": cpu_name(), "system": platform.platform(), "versions": versions() | packages, "threads": 1,
                 "data": arguments.data.name, "unit": "atoms a second of the process's time on the CPU; MiB",
                 "rows": []}  # fmt: skip
        for name in arguments.cases:
            sides = SIDES[: 2 if arguments.eager or name in EAGER else 4]
            found["rows"].append(measure(name, arguments.data, arguments.rounds, sides))
            print(json.dumps(found["rows"][-1]), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(found, indent=1) + "\n")
        results = [found]
    if arguments.table:
        write_table(arguments.table, "potential_speed", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
