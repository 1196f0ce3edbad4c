# SPDX-License-Identifier: Apache-2.0
"""Errors of a final model on labelled structures, with parity plots: predicted against true.

    python evaluate.py my_structures/final_model test.extxyz --out report
    torchrun --nproc_per_node=8 evaluate.py final_model 'test/*.extxyz' --atoms 2000

writes `errors.json` and `parity.png`. Errors are those of the whole set, on any number of ranks.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import numpy as np
import torch

from atoms.final_model import calculator
from atoms.neighbours import Cutoffs
from atoms.parity import parity_plot
from common.batch import Batch
from common.distributed import Distributed, end_of_process, process_group
from dataset import open_validation
from inspect_data import pairs
from metrics import UNITS, Errors


class Recorded(Errors):
    """Also keeps what was true and what was predicted, by micro-batch: a rank without one repeats another's."""

    def __init__(self, errors: Errors):
        super().__init__(errors.elements, errors.data_sets)
        self.seen: dict[tuple, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        self.types: dict[tuple, np.ndarray] = {}

    def batch_sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """As without, by a model that is asked once."""
        outputs = []

        def asked(**inputs):
            outputs.append(model(**inputs))
            return outputs[0]

        sums = super().batch_sums(asked, batch)
        inputs, output = batch.inputs, outputs[0]
        num_atoms = torch.bincount(inputs["structure"], minlength=len(inputs["energy"]))
        found = {
            "energy_per_atom": (inputs["energy"] / num_atoms, output.energies / num_atoms),
            "forces": (inputs["forces"], output.forces), "stress": (inputs["stress"], output.stress),
        }  # fmt: skip
        self.seen[batch.name] = {k: tuple(one.detach().cpu().double().numpy() for one in v) for k, v in found.items()}
        self.types[batch.name] = inputs["types"].cpu().numpy()
        return sums

    def draw(self, path: Path, ranks: list[tuple[dict, dict]], title: str) -> None:
        """The parity plots of what all ranks have seen."""
        seen = {name: one for others, _ in ranks for name, one in others.items()}
        types = {name: one for _, others in ranks for name, one in others.items()}
        both = {
            label: tuple(np.concatenate([seen[name][label][i].ravel() for name in sorted(seen)]) for i in (0, 1))
            for label in ("energy_per_atom", "forces", "stress")
        }
        symbols = np.repeat(np.array(self.elements)[np.concatenate([types[name] for name in sorted(types)])], 3)
        parity_plot(path, both, UNITS, {"forces": symbols}, title)


def evaluate(distributed: Distributed, arguments: argparse.Namespace) -> dict:
    """The errors, also written and drawn."""
    model = calculator(arguments.model).model.to(distributed.device)
    config = model.config
    named = {f"{a}-{b}": config.pair_cutoffs[i][j] for i, a in enumerate(config.elements)
             for j, b in enumerate(config.elements)} if config.pair_cutoffs else None  # fmt: skip
    validator = open_validation(
        distributed, Cutoffs(config.cutoff, named), config.elements,
        load_dataset_kwargs={"path": "structures", "data_files": arguments.files, "split": arguments.split},
        label_keys=pairs(arguments.label), units=pairs(arguments.unit), atom_micro_batch_size=arguments.atoms,
        max_neighbors=arguments.max_neighbors, bad_frames=arguments.bad_frames,
    )  # fmt: skip
    validator.metrics = Recorded(validator.metrics)
    errors = validator.run(model, nullcontext)
    ranks = distributed.gather((validator.metrics.seen, validator.metrics.types))
    if distributed.is_main:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")
        title = f"{arguments.model} on {errors['num_structures']:,} structures"
        validator.metrics.draw(arguments.out / "parity.png", ranks, title)
        for name, value in errors.items():
            print(f"{name:30} {value:,}" if isinstance(value, int) else f"{name:30} {value:.6f}")
        print(f"\nwritten: {arguments.out}/errors.json, {arguments.out}/parity.png")
    return errors


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a final_model folder")
    parser.add_argument("files", nargs="+", help="files or patterns, of any kind that training reads")
    parser.add_argument("--atoms", type=int, default=1000, help="of a micro-batch, at most (default 1000)")
    parser.add_argument("--max-neighbors", type=int, help="of an atom, if training had a limit")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=KEY", help="as energy=REF_energy")
    parser.add_argument(
        "--unit", action="append", default=[], metavar="NAME=UNIT", help="as stress=GPa, forces=-eV/Ang"
    )
    parser.add_argument("--split", help="a part of the data, as train[90%%:]")
    parser.add_argument("--bad-frames", choices=("refuse", "leave_out", "keep"), default="refuse")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the report (default outputs)")
    arguments = parser.parse_args()
    with process_group(seed=0) as distributed, distributed.fail_together():
        evaluate(distributed, arguments)


if __name__ == "__main__":
    with end_of_process():
        main()
