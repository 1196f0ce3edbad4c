# SPDX-License-Identifier: Apache-2.0
"""Whether memory stays the same with ten times the cells: a vocabulary, tokens, an index, and the first step.

python ci/benchmarks/cells_at_scale.py   # five minutes, 10 GB of disk; writes docs: JSON, table of your_cells.md
python ci/benchmarks/cells_at_scale.py --quick --output quick.json
python ci/benchmarks/cells_at_scale.py --from docs/results/cells_at_scale.json --check docs/your_cells.md

20,000 made-up cells, again and again, lie in one h5ad file, by rows and not packed, and in an SCDL folder with a
header. Commands are those that users type. Of each is given how long it took, and the largest sum of its processes'
own memory, looked at four times a second; files that are mapped are not counted, because the system takes them back.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "geneformer_native_te"
sys.path[:0] = [str(RECIPE), str(Path(__file__).parent)]
from common import quiet  # noqa: E402, F401  # isort: skip
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from command_line import Failed, add_files, check_files, first_error, parse_with_overrides, run_or_read  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cells.written import write_frame  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402


OUTPUT, NAME = ROOT / "docs" / "results" / "cells_at_scale.json", "cells_at_scale"
FULL = {"sizes": [100_000, 1_000_000], "different": 20_000, "genes": 20_000, "expressed": 500, "processes": 2}
QUICK = FULL | {"sizes": [400, 1_200], "different": 200, "genes": 1_000, "expressed": 50}
TINY = ["model_tag=geneformer_1M", "model_kwargs.hidden_size=32", "model_kwargs.intermediate_size=32",
        "model_kwargs.num_hidden_layers=1", "model_kwargs.num_attention_heads=1", "dataset.micro_batch_size=4",
        "dataset.token_micro_batch_size=null", "micro_batches_per_step=1", "num_train_steps=1", "logger.peak_tflops=1",
        "dataset.num_workers=1", "dataset.load_dataset_kwargs.split=train", "validation.load_dataset_kwargs=null",
        "checkpoint.ckpt_dir=null", "checkpoint.save_final_model=false", "checkpoint.save_every_n_steps=null",
        "lr_scheduler_kwargs.num_warmup_steps=0"]  # fmt: skip
WAYS = {"vocabulary": "`make_vocabulary.py`, h5ad", "h5ad": "training, h5ad: to the first step",
        "h5ad again": "the same, a later start", "scdl": "training, SCDL: to the first step"}  # fmt: skip


def write(folder: Path, cells: int, settings: dict) -> None:
    """The same counts in an h5ad file and an SCDL folder."""
    random, genes = np.random.default_rng(0), settings["genes"]
    shape = (settings["different"], settings["expressed"])
    columns = np.sort((genes * random.random(shape) ** 2).astype(np.int32), axis=1)
    different = np.concatenate((np.ones((len(columns), 1), bool), columns[:, 1:] != columns[:, :-1]), axis=1)
    columns, sizes = columns[different], different.sum(1)
    values = random.geometric(0.4, len(columns)).astype(np.float32)
    times, names = cells // len(sizes), [f"ENSG{number:011d}" for number in range(genes)]
    pointers = np.concatenate(([0], np.cumsum(np.tile(sizes, times))))
    with h5py.File(folder / "cells.h5ad", "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        node = file.create_group("X")
        node.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (cells, genes)})
        node["indptr"] = pointers
        for key, array in (("indices", columns), ("data", values)):
            data = node.create_dataset(
                key, (times * len(array),), array.dtype, chunks=(min(1 << 18, times * len(array)),)
            )
            for number in range(times):
                data[number * len(array) : (number + 1) * len(array)] = array
        write_frame(file, "var", names)
        write_frame(file, "obs", ["cell"] * cells)
    scdl = folder / "scdl"
    (scdl / "var_features").mkdir(parents=True)
    header = b"SCDL" + bytes([0, 1, 0, 1]) + struct.pack(">II", 1, 3)
    kinds = {"DATA": ("data", np.float32, 6), "ROWPTR": ("row_ptr", np.uint64, 4), "COLPTR": ("col_ptr", np.uint16, 2)}
    for name, (file, kind, number) in kinds.items():
        with open(scdl / f"{file}.npy", "wb") as out:
            if name == "ROWPTR":
                pointers.astype(kind).tofile(out)
            for _ in range(times if name != "ROWPTR" else 0):
                (values if name == "DATA" else columns).astype(kind).tofile(out)
        length = len(pointers) if name == "ROWPTR" else times * len(values)
        header += struct.pack(">I", len(name)) + name.encode() + struct.pack(">QIB", length, number, 0)
    (scdl / "header.sch").write_bytes(header + struct.pack(">I", 0))
    (scdl / "metadata.json").write_text(json.dumps({"num_rows": cells}))
    pq.write_table(pa.table({"feature_id": names}), scdl / "var_features" / "dataframe_0.parquet")
    np.save(scdl / "var_features" / "cumulative_sum_index.npy", np.array([-1, cells]))


def family(pid: int) -> list[int]:
    """A process and those that it has started, at any depth."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it has ended
                continue
    return found


def own_memory(pid: int) -> int:
    """Bytes of a process that no file has, each page shared out among those that have it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024


def run(command: list[str], folder: Path) -> dict:
    """How long a command takes, and its memory. Raises Failed."""
    env = os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_DATASETS_CACHE", None)
    started, most = time.perf_counter(), 0
    with (
        open(folder / "log", "w+") as log,
        subprocess.Popen([sys.executable, *command], cwd=RECIPE, env=env, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            most = max(most, sum(map(own_memory, family(process.pid))))
            time.sleep(0.25)
        log.seek(0)
        if process.returncode:
            raise Failed(f"{command[0]}: {first_error(log.read())}")
    return {"seconds": time.perf_counter() - started, "memory_gib": most / 2**30}


def size_of(folder: Path) -> int:
    """Bytes in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure_size(cells: int, settings: dict, bar: tqdm) -> dict:
    """All ways with so many cells."""
    with tempfile.TemporaryDirectory(prefix=NAME) as place:
        folder = Path(place)
        write(folder, cells, settings)
        bar.update()
        genes = folder / "genes"
        words = [
            "make_vocabulary.py",
            f"{folder}/cells.h5ad",
            f"--out={genes}",
            f"--processes={settings['processes']}",
        ]
        found = {"vocabulary": run(words, folder)}
        bar.update()
        common = ["train_ddp.py", "--config-name", "my_cells", *TINY, f"logger.log_dir={folder}/run",
                  f"dataset.counts.medians={genes}/medians.json",
                  f"model_kwargs.vocabulary={genes}/vocabulary.json"]  # fmt: skip
        for way, kind, data in (("h5ad", "h5ad", "cells.h5ad"), ("h5ad again", "h5ad", "cells.h5ad"),
                                ("scdl", "scdl", "scdl")):  # fmt: skip
            if way == "scdl":
                (folder / "cells.h5ad").unlink()
                shutil.rmtree(folder / "cache")
            words = [f"dataset.load_dataset_kwargs.{key}={value}"
                     for key, value in (("path", kind), ("data_files", folder / data))]  # fmt: skip
            found[way] = run([*common, *words], folder)
            if way != "h5ad again":
                cache = folder / "cache" / "datasets"
                found[way] |= {"tokens_bytes": size_of(cache / "cells"), "index_bytes": size_of(cache / "row_sizes")}
            bar.update()
        return found


def measure(asked: argparse.Namespace) -> dict:
    """All sizes."""
    settings = QUICK if asked.quick else FULL
    with tqdm(total=len(settings["sizes"]) * (len(WAYS) + 1)) as bar:
        found = {str(cells): measure_size(cells, settings, bar) for cells in settings["sizes"]}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"name": cpu_name(), "cores": os.cpu_count()},
        "versions": versions() | {"numpy": np.__version__, "h5py": h5py.__version__},
        "settings": settings,
        "sizes": found,
    }


def table(numbers: dict) -> str:
    """Markdown."""
    sizes, settings = numbers["sizes"], numbers["settings"]
    heads = [f"{int(cells):,} cells: {what}" for cells in sizes for what in ("s", "GiB")]
    lines = [f"| what | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for way, what in WAYS.items():
        cells = [f"{one[way]['seconds']:,.0f} | {one[way]['memory_gib']:.2f}" for one in sizes.values()]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    most, last = next(reversed(sizes.items()))
    note = (
        f"Of {int(most):,} cells the index of lengths has {last['h5ad']['index_bytes'] / 1e6:,.1f} MB and the tokens "
        f"{last['h5ad']['tokens_bytes'] / 1e9:,.1f} GB. Made-up cells of {settings['expressed']:,} genes of "
        f"{settings['genes']:,}; {settings['processes']} processes convert and count, training has one rank and one "
        f"worker. Memory is the largest sum of all processes' own. {numbers.get('remark', '')}"
        f"{numbers['machine']['name']}, {numbers['machine']['cores']} cores, {numbers['date']}; "
    )
    note += ", ".join(f"{name} {version}" for name, version in numbers["versions"].items()) + "."
    return "\n".join([*lines, "", note])


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cells: to see it work")
    add_files(parser, OUTPUT)
    asked = parse_with_overrides(parser, sys.argv[1:])
    check_files(parser, asked, runs=False)
    if not asked.source and not asked.output:
        asked.output, asked.table = OUTPUT, ROOT / "docs" / "your_cells.md"
    return run_or_read(asked, measure, NAME, table)


if __name__ == "__main__":
    sys.exit(main())
