# SPDX-License-Identifier: Apache-2.0
"""How long a run with many structures takes until its first step, what that costs in memory, and how fast data comes.

python ci/benchmarks/structures_start.py --folder scratch    # ten minutes, 8 GB of disk; writes docs/results
python ci/benchmarks/structures_start.py --quick --output quick.json

Made-up alloys of 50 atoms lie in a Parquet file, in the columns of our rows, so that "convert" is what `datasets`
does; others in two extxyz, which ASE reads. Of each kind there is a file with half as many, since memory must not grow
with their number. A process of its own opens them when
they are new ("convert": neighbours, statistics and checks of every structure, once), and another again ("start"). Each
gives seconds from the loader's beginning to its first batch, and the most memory that it and its workers together held
at a time, without files that are mapped. Structures are then read and their neighbours found for a while, by one
worker. At last train_ddp.py itself trains nequip_S on them, one thread a rank: seconds from the command to its first
logged step, and atoms/s of the later ones. `--folder` keeps the files, and takes those that are there.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "nequip_native"
sys.path[:0] = [str(RECIPE), str(Path(__file__).parent)]
from common import quiet  # noqa: E402, F401  # isort: skip
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from command_line import Failed, add_files, check_files, parse_with_overrides, run_or_read  # noqa: E402

from atoms.structures import SCHEMA  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402


OUTPUT, NAME = ROOT / "docs" / "results" / "structures_start.json", "structures_start"
FULL = {"num_structures": 1_000_000, "num_extxyz": 20_000, "num_atoms": 50, "cutoff": 5.0, "batches": 200, "steps": 6}
QUICK = FULL | {"num_structures": 3_000, "num_extxyz": 300, "batches": 5, "steps": 3}
AT_ONCE = 20_000  # structures that are made up at once
STAGES = {
    "convert_half": "Parquet with half as many: the first start",
    "convert": "Parquet to Arrow, then all of it looked through: the first start",
    "start": "a later start",
    "extxyz_half": "an extxyz: read by ASE, then looked through",
    "extxyz": "an extxyz of twice the size",
    "run_1": "train_ddp.py, 1 rank",
    "run_2": "train_ddp.py, 2 ranks",
}


def alloys(random: np.random.Generator, number: int, num_atoms: int) -> tuple[np.ndarray, ...]:
    """Elements, positions (A), cells and forces of rattled alloys on a simple cubic lattice with vacancies."""
    lattice = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3) * 2.6
    places = np.argsort(random.random((number, len(lattice))), axis=1)[:, :num_atoms]
    positions = lattice[places] + random.normal(0, 0.1, (number, num_atoms, 3))
    forces = random.normal(size=positions.shape)
    numbers = random.choice(np.array([13, 28, 29], np.uint8), (number, num_atoms))
    return numbers, positions, np.tile(np.eye(3) * 10.4, (number, 1, 1)), forces - forces.mean(1, keepdims=True)


def as_table(
    numbers: np.ndarray, positions: np.ndarray, cells: np.ndarray, forces: np.ndarray, first: int
) -> pa.Table:
    """Rows as the recipe has them."""
    number = len(numbers)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
        values = values.reshape(number, -1)
        offsets = np.arange(number + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), kind))

    columns = {
        "numbers": lists(numbers, pa.uint8()), "positions": lists(positions, pa.float64()),
        "cell": lists(cells, pa.float64()), "pbc": lists(np.ones((number, 3), bool), pa.bool_()),
        "energy": pa.array(numbers.astype(float).sum(1) * -0.1), "forces": lists(forces, pa.float64()),
        "source": pa.array(["made up"] * number), "key": pa.array([str(first + i) for i in range(number)]),
    }  # fmt: skip
    return pa.table(
        [columns.get(name, pa.nulls(number, kind)) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)],
        schema=SCHEMA,
    )


def write(folder: Path, settings: dict) -> None:
    """All files that are not there yet."""
    import ase
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    random = np.random.default_rng(0)
    if (folder / "alloys.parquet").exists():
        return
    for name, total in (("alloys_half", settings["num_structures"] // 2), ("alloys", settings["num_structures"])):
        with pq.ParquetWriter(folder / f"{name}.parquet.partial", SCHEMA) as writer:
            for first in range(0, total, AT_ONCE):
                made = alloys(random, min(AT_ONCE, total - first), settings["num_atoms"])
                writer.write_table(as_table(*made, first))
    frames = []
    for numbers, positions, cell, forces in zip(
        *alloys(random, settings["num_extxyz"], settings["num_atoms"]), strict=True
    ):
        frames.append(ase.Atoms(numbers, positions, cell=cell, pbc=True))
        frames[-1].calc = SinglePointCalculator(frames[-1], energy=-0.1 * numbers.astype(float).sum(), forces=forces)
    ase.io.write(folder / "extxyz.extxyz", frames)
    ase.io.write(folder / "extxyz_half.extxyz", frames[: len(frames) // 2])
    for name in ("alloys_half", "alloys"):
        (folder / f"{name}.parquet.partial").rename(folder / f"{name}.parquet")


def source_of(name: str, folder: Path) -> dict:
    """What a stage reads."""
    if name.startswith("extxyz"):
        return {"path": "structures", "data_files": str(folder / f"{name}.extxyz")}
    file = folder / ("alloys_half.parquet" if name == "convert_half" else "alloys.parquet")
    return {"path": "parquet", "data_files": str(file), "split": "train"}


def stage(name: str, folder: Path, settings: dict) -> None:
    """One process: print what a stage has cost."""
    print(json.dumps((trained if name.startswith("run") else opened)(name, folder, settings)))


def opened(name: str, folder: Path, settings: dict) -> dict:
    """Open the data, and take a batch, then some more."""
    from common.distributed import process_group
    from dataset import TrainLoader

    with process_group(0) as alone:
        started = time.perf_counter()
        loader = TrainLoader(
            alone, 0, settings["cutoff"], None, load_dataset_kwargs=source_of(name, folder), atom_micro_batch_size=500,
            num_workers=1,
        )  # fmt: skip
        opened, batches = time.perf_counter(), iter(loader)
        next(batches)
        first = time.perf_counter()
        num_atoms = sum(batch.counts["atoms"] for batch in islice(batches, settings["batches"]))
        ended = time.perf_counter()
    return {
        "open_s": opened - started, "first_s": first - started, "atoms_per_s": num_atoms / (ended - first)
    }  # fmt: skip


def trained(name: str, folder: Path, settings: dict) -> dict:
    """Start a run, and look when its first step is written down."""
    outputs, steps = folder / name, settings["steps"]
    shutil.rmtree(outputs, ignore_errors=True)
    keys = [f"++dataset.load_dataset_kwargs.{key}={value}" for key, value in source_of(name, folder).items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={name[-1]}", "train_ddp.py",
        "--config-name=defaults", "model_tag=nequip_S", f"model_kwargs.cutoff={settings['cutoff']}", *keys,
        "dataset.atom_micro_batch_size=500", f"num_train_steps={steps}", "logger.frequency=1",
        f"logger.log_dir={outputs}", f"checkpoint.ckpt_dir={outputs}",
    ]  # fmt: skip
    outputs.mkdir()
    started, first, metrics = time.perf_counter(), None, outputs / "metrics.jsonl"
    with (outputs / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=RECIPE, stdout=said, stderr=said)
    while process.poll() is None:
        if first is None and metrics.exists() and '"step": 1' in metrics.read_text():
            first = time.perf_counter()
        time.sleep(0.05)
    if process.returncode or first is None:
        raise Failed((outputs / "said").read_text()[-1000:])
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [line["atoms_per_second"] for line in lines if line.get("step", 0) > 1 and "atoms_per_second" in line]
    return {"first_s": first - started, "atoms_per_s": float(np.median(speeds))}


def held(pid: int) -> float:
    """GiB that a process and all below it hold now, but for files."""
    parents, memory = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it has ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found = re.search(r"^RssAnon:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
            memory[int(folder.name)] = int(found[1]) / 2**20 if found else 0.0
    family, total = [pid], 0.0
    for one in family:  # grows
        total += memory.get(one, 0.0)
        family += [child for child, parent in parents.items() if parent == one]
    return total


def measure(asked: argparse.Namespace) -> dict:
    """All stages, each a process of its own. Raises Failed where one does."""
    settings, stages = QUICK if asked.quick else FULL, {}
    with tempfile.TemporaryDirectory(prefix=NAME) as scratch:
        folder = (asked.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, settings)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        for name in STAGES:
            command = [sys.executable, __file__, "--stage", name, str(folder), json.dumps(settings)]
            with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
                process, most = subprocess.Popen(command, env=environment, stdout=out, stderr=err), 0.0
                while process.poll() is None:
                    most = max(most, held(process.pid))
                    time.sleep(0.2)
            if process.returncode:
                raise Failed(f"{name}: {(folder / 'err').read_text()[-1000:]}")
            said = json.loads((folder / "out").read_text().splitlines()[-1])
            stages[name] = said | {"memory_gib": most}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": {"name": cpu_name(), "cores": os.cpu_count()},
        "versions": versions(), "settings": settings, "stages": stages,
    }  # fmt: skip


def table(numbers: dict) -> str:
    """A row for each stage, and what follows from them."""
    settings, stages = numbers["settings"], numbers["stages"]
    lines = ["| what | structures | s to the first batch, or step | memory, GiB | then atoms/s |",
             "|---|---|---|---|---|"]  # fmt: skip
    sizes = {
        "extxyz": settings["num_extxyz"], "extxyz_half": settings["num_extxyz"] // 2,
        "convert_half": settings["num_structures"] // 2,
    }  # fmt: skip
    for name, what in STAGES.items():
        one, number = stages[name], sizes.get(name, settings["num_structures"])
        cells = [
            what,
            f"{number:,}",
            f"{one['first_s']:.1f}",
            f"{one['memory_gib']:.1f}",
            f"{one['atoms_per_s']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    told = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    times = stages["start"]["atoms_per_s"] / stages["run_1"]["atoms_per_s"]
    facts = (
        f"Made-up alloys of {settings['num_atoms']} atoms, cutoff {settings['cutoff']} A, micro-batches of 500 atoms; "
        f"one data worker, which is {times:.0f} times as fast as `nequip_S` trains on one thread. "
    )
    machine = f"{numbers['machine']['name']}, {numbers['machine']['cores']} cores, {numbers['date']}; {told}."
    return "\n".join([*lines, "", f"{facts}{machine}"])


def main(arguments: list[str]) -> int:
    """Run or read, then print, write or check."""
    if arguments[:1] == ["--stage"]:
        from common.distributed import end_of_process

        with end_of_process():
            stage(arguments[1], Path(arguments[2]), json.loads(arguments[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few structures")
    parser.add_argument("--folder", type=Path, help="keep the files here, and take them if they are there")
    add_files(parser, OUTPUT)
    found = parse_with_overrides(parser, arguments)
    check_files(parser, found, runs=False)
    if not (found.source or found.output):
        found.output = OUTPUT
    return run_or_read(found, measure, NAME, table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
