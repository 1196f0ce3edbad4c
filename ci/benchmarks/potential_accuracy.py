#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
r"""How long `nequip-train` and this recipe take to the same error of forces, on the same frames with the same model.

In the recipe's environment, with that of the package (models/nequip/requirements-peer.txt) beside:

    python ci/benchmarks/potential_accuracy.py --peer ENVIRONMENT --output docs/results/potential_accuracy.json \
      --table docs/moving.md --picture docs/images/potential_accuracy.png

Both train the size S for forces and energies on two thirds of a file's frames, in batches of 5, and are validated on
the others after every epoch, with averaged weights. The package has the settings of its tutorial
(configs/tutorial.yaml): Adam, rate 0.01, less by 0.6 where the validation stands still, average 0.999; another run of
it has a higher rate. This recipe has its own settings, OURS below. One after the other, each in a process of its
own, whose start, data and validations count. What is compared is the time to the lowest error that the tutorial's
settings have reached when the package's epochs are over.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "nequip_native"
sys.path.insert(0, str(RECIPE))

import numpy as np  # noqa: E402
from ase import Atoms  # noqa: E402
from ase.io import read, write  # noqa: E402

from common.contract.running import write_table  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402


CUTOFF, BATCH = 5.0, 5
RATE, OTHER_RATE = 0.01, 0.06  # of the package: its tutorial's, and one that is better here
SIDES = ("package", "package_at_another_rate", "ours")
OURS = {
    "adamw_kwargs.lr": 0.06, "lr_scheduler_kwargs.kind": "linear", "lr_scheduler_kwargs.num_warmup_steps": 20,
    "lr_scheduler_kwargs.min_lr_fraction": 0.01, "ema_decay": 0.98,
}  # fmt: skip


def split(data: Path, folder: Path) -> tuple[list[str], int]:
    """Write two thirds of the frames as `train.extxyz`, the others as `validation.extxyz`.

    Returns the elements, and how many are trained on.
    """
    frames: list[Atoms] = read(data, ":")
    order = np.random.default_rng(0).permutation(len(frames))
    number = len(frames) * 2 // 3 // BATCH * BATCH
    write(folder / "train.extxyz", [frames[i] for i in order[:number]])
    write(folder / "validation.extxyz", [frames[i] for i in order[number:]])
    return sorted({symbol for atoms in frames for symbol in atoms.get_chemical_symbols()}), number


def package_config(folder: Path, elements: list[str], epochs: int, rate: float) -> dict:
    """What `nequip-train` reads."""
    return {
        "run": ["train"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule", "seed": 456,
            "train_file_path": f"{folder}/train.extxyz", "val_file_path": f"{folder}/validation.extxyz",
            "transforms": [
                {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": elements,
                 "chemical_species_to_atom_type_map": {element: element for element in elements}},
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": CUTOFF},
            ],
            "train_dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": BATCH, "shuffle": True},
            "val_dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": 10},
            "stats_manager": {
                "_target_": "nequip.data.CommonDataStatisticsManager", "dataloader_kwargs": {"batch_size": 10},
                "type_names": elements,
            },
        },
        "trainer": {
            "_target_": "lightning.Trainer", "accelerator": "cpu", "max_epochs": epochs, "log_every_n_steps": 10,
            "enable_progress_bar": False, "enable_checkpointing": False, "default_root_dir": str(folder),
            "callbacks": [{"_target_": "nequip_clock.Clock"}],
        },
        "training_module": {
            "_target_": "nequip.train.EMALightningModule", "ema_decay": 0.999,
            "loss": {"_target_": "nequip.train.EnergyForceLoss", "per_atom_energy": True,
                     "coeffs": {"total_energy": 1.0, "forces": 1.0}},
            "val_metrics": {"_target_": "nequip.train.EnergyForceMetrics",
                            "coeffs": {"total_energy_mae": 1.0, "forces_mae": 1.0}},
            "optimizer": {"_target_": "torch.optim.Adam", "lr": rate},
            "lr_scheduler": {
                "scheduler": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "factor": 0.6, "patience": 5,
                              "threshold": 0.2, "min_lr": 1e-6},
                "monitor": "val0_epoch/weighted_sum", "interval": "epoch", "frequency": 1,
            },
            "model": {
                "_target_": "nequip.model.PresetNequIPGNNModel", "preset": "S", "compile_mode": "eager", "seed": 456,
                "model_dtype": "float32", "type_names": elements, "r_max": CUTOFF,
                "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
                "per_type_energy_scales": "${training_data_stats:per_type_forces_rms}",
                "per_type_energy_shifts": "${training_data_stats:per_atom_energy_mean}",
            },
        },
    }  # fmt: skip


VALIDATION = re.compile(r"^step (\d+)  validation.* forces_mae ([\d.e-]+)")


def run(words: list[str], threads: int) -> dict:
    """Seconds on the clock and of processors, the most memory that was held, and each validation with its time."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent)}
    began, said, curve = time.perf_counter(), [], []
    with subprocess.Popen(
        words, cwd=RECIPE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            said.append(line)
            if (found := VALIDATION.match(line)) and int(found[1]):
                seconds = round(time.perf_counter() - began, 2)
                curve.append({"step": int(found[1]), "seconds": seconds, "forces_mae": float(found[2])})
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status or not curve:
        raise SystemExit("".join(said)[-3000:])
    return {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_mib": round(used.ru_maxrss / 1024), "curve": curve}  # fmt: skip


def package(folder: Path, peer: Path, elements: list[str], epochs: int, threads: int, rate: float) -> dict:
    """Its run."""
    (folder / "package.yaml").write_text(json.dumps(package_config(folder, elements, epochs, rate)))
    words = [f"{peer}/bin/nequip-train", "-cp", str(folder), "-cn", "package", f"hydra.run.dir={folder}/hydra"]
    return run(words, threads)


def ours(folder: Path, steps: int, every: int, threads: int, settings: dict) -> dict:
    """This recipe's run."""
    words = [
        sys.executable, "-u", "train_ddp.py", "--config-name", "defaults", "model_tag=nequip_S",
        f"model_kwargs.cutoff={CUTOFF}", f"num_train_steps={steps}", "micro_batches_per_step=1",
        f"dataset.load_dataset_kwargs.data_files={folder}/train.extxyz", f"dataset.micro_batch_size={BATCH}",
        "validation.load_dataset_kwargs={path: structures, data_files: "
        f"{folder}/validation.extxyz, split: train}}", "validation.micro_batch_size=10",
        f"validation.every_n_steps={every}", f"lr_scheduler_kwargs.num_training_steps={steps}", "logger.peak_tflops=1",
        f"logger.log_dir={folder}/ours", *(f"{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    return run(words, threads)


def first_at(curve: list[dict], error: float) -> dict | None:
    """The first validation with that error or less."""
    return next((line for line in curve if line["forces_mae"] <= error), None)


def sentences(numbers: dict) -> str:
    """For a page."""
    reached = {side: numbers[f"{side}_reaches_it"] for side in SIDES}
    least = {side: min(line["forces_mae"] for line in numbers[side]["curve"]) for side in SIDES}

    def until(side: str) -> str:
        if reached[side] is None:
            return f"does not get there ({least[side]:.3f} in {numbers[side]['seconds']:.0f} s)"
        return f"takes {reached[side]['seconds']:.0f} s"

    memory = " and ".join(f"{numbers[side]['peak_mib']:,} MiB" for side in ("package", "ours"))
    return (
        f"In {numbers['package']['seconds']:.0f} s `nequip-train` with its tutorial's settings reached "
        f"{numbers['forces_mae']:.3f} eV/A. To that error it {until('package')};\n"
        f"with a learning rate of {numbers['other_rate']} instead of {numbers['rate']} it "
        f"{until('package_at_another_rate')}; `train_ddp.py` {until('ours')}, and ends at\n"
        f"{least['ours']:.3f} after {numbers['ours']['seconds']:.0f} s. The processes held {memory} at most."
    )


def picture(numbers: dict, target: Path) -> None:
    """Errors of forces by time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    name = f"nequip {numbers['versions']['nequip']}"
    labels = (name, f"{name}, rate {numbers['other_rate']}", "nequip_native")
    for side, label in zip(SIDES, labels, strict=True):
        curve = numbers[side]["curve"]
        axes.plot([x["seconds"] for x in curve], [x["forces_mae"] for x in curve], "o-", markersize=3, label=label)
    axes.axhline(numbers["forces_mae"], color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds since the start", ylabel="MAE of forces in validation (eV/A)", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def measure(arguments: argparse.Namespace) -> dict:
    """Run both, and compare."""
    settings = OURS | dict(word.split("=", 1) for word in arguments.set)
    python = f"{arguments.peer}/bin/python"
    asked = "import nequip, torch; print(nequip.__version__, torch.__version__)"
    theirs = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    result = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": arguments.threads, "system": platform.platform(),
              "versions": versions() | {"nequip": theirs[0], "torch of nequip": theirs[1]},
              "data": arguments.data.name, "rate": RATE, "other_rate": OTHER_RATE,
              "ours_settings": settings}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        elements, number = split(arguments.data, folder)
        run_package = partial(package, folder, arguments.peer, elements, arguments.epochs, arguments.threads)
        result["num_training_frames"] = number
        result["package"] = run_package(RATE)
        result["ours"] = ours(folder, arguments.steps, number // BATCH, arguments.threads, settings)
        result["package_at_another_rate"] = run_package(OTHER_RATE)
    target = min(line["forces_mae"] for line in result["package"]["curve"])
    result["forces_mae"] = target
    for side in SIDES:
        result[f"{side}_reaches_it"] = first_at(result[side]["curve"], target)
    if reached := result["ours_reaches_it"]:
        result["time_ratio"] = reached["seconds"] / result["package_reaches_it"]["seconds"]
    return result


def main() -> None:
    """Measure, or take what is there; then print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="the environment with nequip")
    parser.add_argument("--data", type=Path, default=RECIPE / "data" / "train.extxyz", help="a file with structures")
    parser.add_argument("--epochs", type=int, default=25, help="of the package")
    parser.add_argument("--steps", type=int, default=300, help="of this recipe")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for this recipe, on top of its own")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="run nothing, take these numbers")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    parser.add_argument("--picture", type=Path, help="draw the curves")
    arguments = parser.parse_args()
    if not (arguments.peer or arguments.source):
        parser.error("give --peer, or numbers that are there: --from.")
    numbers = json.loads(arguments.source.read_text()) if arguments.source else measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(numbers, indent=1) + "\n")
    if arguments.table:
        write_table(arguments.table, "potential_accuracy", sentences(numbers))
    if arguments.picture:
        picture(numbers, arguments.picture)
    print(sentences(numbers))


if __name__ == "__main__":
    main()
