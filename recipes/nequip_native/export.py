# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint into a folder that ASE opens, without this recipe: it needs torch, ase and vesin.

    python export.py CKPT_DIR/step_1000 [final_model]
    python export.py final_model potential.pt2
    python export.py final_model potential.nequip.pt2 [--for lammps] [--device cpu]

The first writes `config.json`, `model.safetensors`, `calculator.py`, which is all the code in one file, and a model
card. The others take a run, a checkpoint or a final model. The second writes a program that torch.export.load opens
without any code. The third compiles it by AOTInductor as nequip-compile does: for LAMMPS' pair_nequip or pair_allegro,
or with --for ase for nequip's own calculator. Such a file runs on this kind of processor and with this release of
torch only.
"""

import argparse
import json
import shlex
import shutil
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
import torch
from omegaconf import OmegaConf
from torch.utils.cpp_extension import get_cxx_compiler

from atoms.calculator_file import write_potential
from atoms.exported import RETURNED, write_package, write_program
from atoms.final_model import refuse_existing
from build_model import open_potential
from common.command import command, writing
from common.files import short, whole_folder
from common.own_data import data_names, published, validated_on, weights_of
from common.step_folder import damage


CARD = """---
library_name: ase
tags: [interatomic-potential, {kind}]
---
# {model_tag}, {step:,} steps

An interatomic potential for **{elements}** ({architecture}, cutoff {cutoff} A, {dtype}), trained for {step:,} steps
({num_atoms:,} atoms) on {rows}`{data}`. Weights: {weights}. Energies are in eV and count from the zero of the labels;
forces are in eV/A, stress in eV/A^3 with ASE's sign.

{errors}

```python
from ase.io import read
from calculator import PotentialCalculator  # in this folder; needs torch, ase and vesin

atoms = read("structure.xyz")
atoms.calc = PotentialCalculator()
print(atoms.get_potential_energy(), atoms.get_forces())
```

It says nothing about other elements, and should not be trusted far from structures like those it was trained on.

The configuration:

```yaml
{config}```
"""


def export(step_folder: Path, target: Path) -> None:
    """Write the final model of one checkpoint; `target` appears only when it is complete.

    Raises ValueError for a folder that is no complete checkpoint, and for a target that exists.
    """
    step_folder, target = Path(step_folder), Path(target)
    if reason := damage(step_folder):
        raise ValueError(f"{step_folder} is no whole checkpoint: {reason}; give a step_<n> folder that is.")
    if target.exists():
        raise ValueError(f"{target} exists; move it away or give another name.")
    run = json.loads((step_folder / "run.json").read_text())
    potential = open_potential(step_folder)
    with whole_folder(target) as folder:
        write_potential(folder, potential.config, type(potential), potential.state_dict())
        (folder / "README.md").write_text(model_card(run))


def package(source: Path, target: Path, use: str | None = None, device: str | None = None) -> None:
    """Write a program, or if it is named *.nequip.pt2 compile one.

    Raises ValueError for a target that exists, options that a program does not have, and without a compiler or a GPU.
    """
    refuse_existing(target)
    compiles = target.name.endswith(".nequip.pt2")
    if (use or device) and not compiles:
        raise ValueError(f"{target} is no compiled file, so --for and --device mean nothing; name it *.nequip.pt2.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; compile where the file will be used.")
    if compiles and not shutil.which(shlex.split(get_cxx_compiler())[0]):
        raise ValueError(f"{target} cannot be compiled: there is no C++ compiler ({get_cxx_compiler()}).")
    potential, partial = open_potential(source), target.with_name(f".partial.{target.name}")
    try:
        if compiles:
            write_package(potential, partial, use or "lammps", device or "cpu")
        else:
            write_program(potential, partial)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def model_card(run: dict) -> str:
    """What the model is and how it came about, in Markdown."""
    config, model, counts = run["config"], run["model"], run["logger"]
    dataset = config["dataset"]
    mix = (dataset.get("mix") or {"": {}}).values()
    data = [data_names(dataset["load_dataset_kwargs"] | (one.get("load_dataset_kwargs") or {})) for one in mix]
    rows = run["loader"].get("data", {}).get("num_rows")
    return CARD.format(
        kind=model["model_type"], model_tag=Path(config["model_tag"]).name, step=run["step"],
        elements=", ".join(model["elements"]),
        architecture={"nequip": "NequIP", "allegro": "Allegro"}[model["model_type"]], cutoff=model["cutoff"],
        dtype=model["dtype"], num_atoms=counts["num_atoms"], errors=error_table(run),
        rows=f"{rows:,} structures of " if rows else "", data=", ".join(data), weights=weights_of(run),
        config=OmegaConf.to_yaml(OmegaConf.create(published(config))),
    )  # fmt: skip


def error_table(run: dict) -> str:
    """The last validation's errors, of all and by element."""
    model, validation = run["model"], run["logger"]["validation"] or {}
    rows = [("energy per atom, eV", "energy_per_atom"), ("forces, eV/A", "forces"), ("stress, eV/A^3", "stress")]
    rows += [(f"forces on {element}, eV/A", f"forces_{{}}/{element}") for element in model["elements"]]
    lines = []
    for title, name in rows:
        values = [
            validation.get(name.format(kind) if "{}" in name else f"{name}_{kind}") for kind in ("mae", "rmse", "max")
        ]
        if values[0] is not None:
            lines.append(f"| {title} | " + " | ".join(map(short, values)) + " |")
    if not lines:
        return "It was not validated."
    head = [f"Errors on {validation['num_structures']:,} structures of {validated_on(run)}:", ""]
    head += ["| | mean | root mean square | largest |", "|---|---|---|---|"]
    return "\n".join([*head, *lines])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a step_<n> folder, or for *.pt2 a final_model folder too")
    parser.add_argument("target", type=Path, nargs="?", help="default: final_model beside the step folder")
    parser.add_argument("--for", dest="use", choices=RETURNED, help="who is to open *.nequip.pt2; default: lammps")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where *.nequip.pt2 will run; default: cpu")
    a = parser.parse_args()
    target = a.target or a.source.parent / "final_model"
    with command(), writing(target):
        if target.suffix == ".pt2":
            package(a.source, target, a.use, a.device)
            kept = " its name must keep the ending .nequip.pt2" if target.name.endswith(".nequip.pt2") else ""
            print(f"{target} is written;{kept or ' torch.export.load opens it'}")
        else:
            export(a.source, target)
            print(f"{target} is written; its README.md says how to open it")
