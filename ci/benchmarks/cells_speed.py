# SPDX-License-Identifier: Apache-2.0
"""How fast cells of h5ad and SCDL are read and become tokens, in how much memory, beside anndata and bionemo-scdl.

python ci/benchmarks/cells_speed.py --peers env/bin/python   # five minutes; writes docs: JSON, table of your_cells.md
python ci/benchmarks/cells_speed.py --peers env/bin/python --quick --output quick.json
python ci/benchmarks/cells_speed.py --from docs/results/cells_speed.json --check docs/your_cells.md

`--peers` is the Python of an environment with them, as ci/golden_cells.py says. Made-up cells of some 1,500 genes lie
in one file, gzipped by rows and by columns, and in SCDL. Each way runs in a process of its own, in turns; given are
cells a second once files are open, and the largest resident set, which counts what is mapped into memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "geneformer_native_te"
sys.path[:0] = [str(RECIPE), str(Path(__file__).parent)]
from common import quiet  # noqa: E402, F401  # isort: skip
import datasets  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402
from cells_peers import peak_gib  # noqa: E402
from command_line import Failed, add_files, check_files, parse_with_overrides, run_or_read  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cells.dictionaries import Dictionary  # noqa: E402
from cells.h5ad import H5ad  # noqa: E402
from cells.medians import vocabulary_of  # noqa: E402
from cells.rank_values import Block  # noqa: E402
from cells.scdl import Scdl  # noqa: E402
from cells.token_cache import Options, open_cells  # noqa: E402
from cells.written import write_frame, write_scdl  # noqa: E402
from common.distributed import process_group  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402
from dataset import TrainLoader  # noqa: E402


OUTPUT, NAME = ROOT / "docs" / "results" / "cells_speed.json", "cells_speed"
FULL = {"cells": 6_000, "genes": 20_000, "expressed": 1_500, "seconds": 2.0, "rounds": 3}
QUICK = FULL | {"cells": 400, "genes": 2_000, "expressed": 200, "seconds": 0.5, "rounds": 1}
BATCH, BATCH_TOKENS = 32, 8192
SPEED = ROOT / "docs" / "results" / "train_speed_geneformer_native_te.json"
# What it is, by whom, and the way of ours that it is compared with.
WAYS = {
    "h5ad_in_order": ("counts in order, h5ad", "ours", None),
    "anndata_in_order": ("counts in order, h5ad", "anndata, backed", "h5ad_in_order"),
    "own_scdl_in_order": ("counts in order, SCDL", "ours", None),
    "scdl_in_order": ("counts in order, SCDL", "bionemo-scdl", "own_scdl_in_order"),
    "tokens_at_random": ("at random, batches of 32", "ours, tokens", None),
    "anndata_at_random": ("at random, batches of 32", "anndata, backed, counts", "tokens_at_random"),
    "scdl_at_random": ("at random, batches of 32", "bionemo-scdl, counts", "tokens_at_random"),
    "batches": ("masked, packed batches", "ours", None),
    "convert_h5ad": ("to tokens in Arrow, once: h5ad by rows", "ours", None),
    "convert_csc": ("to tokens in Arrow, once: h5ad by columns", "ours", None),
    "convert_scdl": ("to tokens in Arrow, once: SCDL", "ours", None),
}
PACKAGES = ("anndata", "bionemo-scdl")
PEERS = ("anndata_in_order", "anndata_at_random", "scdl_in_order", "scdl_at_random")


def ids(settings: dict) -> list[str]:
    """Of the genes."""
    return [f"ENSG{number:011d}" for number in range(settings["genes"])]


def write(folder: Path, settings: dict) -> None:
    """The same counts in all files."""
    random, cells, genes = np.random.default_rng(0), settings["cells"], settings["genes"]
    dense = np.zeros((cells, genes), np.float32)
    often = 1 / np.arange(1, genes + 1) ** 0.5
    for cell in dense:
        chosen = random.choice(genes, settings["expressed"], replace=False, p=often / often.sum())
        cell[chosen] = random.geometric(0.4, len(chosen))
    for name, form in (("cells", "csr"), ("columns", "csc")):
        lines = dense if form == "csr" else dense.T
        rows, columns = np.nonzero(lines)
        with h5py.File(folder / f"{name}.h5ad", "w") as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            node = file.create_group("X")
            node.attrs.update({"encoding-type": f"{form}_matrix", "encoding-version": "0.1.0", "shape": dense.shape})
            parts = {"indptr": np.searchsorted(rows, np.arange(len(lines) + 1)), "indices": columns.astype(np.int32),
                     "data": lines[rows, columns]}  # fmt: skip
            for key, array in parts.items():
                node.create_dataset(key, data=array, compression="gzip", compression_opts=4)
            write_frame(file, "var", ids(settings), {"feature_id": ids(settings)})
            write_frame(file, "obs", [f"cell{i}" for i in range(cells)])
            for frame in ("var", "obs"):
                file[frame].attrs["encoding-version"] = "0.2.0"
    write_scdl(folder / "scdl", dense, ids(settings), header=True)


def converted(folder: Path, name: str, settings: dict) -> datasets.Dataset:
    """Tokens of a file, by one process."""
    medians = dict.fromkeys(ids(settings), 1.0) | {gene: 1 + i % 7 for i, gene in enumerate(ids(settings))}
    options = Options("", Dictionary(vocabulary_of(medians, "V2"), medians))
    kwargs = {"path": "scdl" if name == "scdl" else "h5ad", "data_files": str(folder / name)}
    return open_cells("", kwargs, options, 1, quiet=True)[0]


def copied(block: Block) -> int:
    """How many cells it has; it is copied, as bionemo-scdl's rows are: what is mapped would not be read otherwise."""
    np.array(block.values), np.array(block.columns)
    return len(block.indptr) - 1


def batches(folder: Path, settings: dict):
    """What a trainer takes, made in its own process: how many cells and tokens are in each."""
    converted(folder, "cells.h5ad", settings).save_to_disk(folder / "tokens")
    kwargs = {"path": str(folder / "tokens"), "split": "train"}
    options = {"vocabulary": "V2", "task": "masked_lm", "classes": None, "num_workers": 0}
    with process_group(0) as distributed:
        loader = TrainLoader(
            distributed, 0, True, 1, load_dataset_kwargs=kwargs, token_micro_batch_size=BATCH_TOKENS, **options
        )
        yield 0, 0
        for batch in loader:
            yield len(batch.inputs["cu_seqlens"]) - 1, batch.counts["tokens"]


def appetite() -> dict | None:
    """How many tokens a second the published model of ten million parameters is trained on, by train_speed.py."""
    if not SPEED.exists():
        return None
    entries = json.loads(SPEED.read_text())["entries"]
    entry = max((one for one in entries if one["size"] == "10M"), key=lambda one: one["date"])
    turns = entry["contestants"][0]["rounds"]
    return {"machine": entry["machine"]["name"], "threads": entry["machine"]["threads"],
            "tokens_per_s": median(turn["tokens"] / turn["seconds"] for turn in turns)}  # fmt: skip


def own(name: str, folder: Path, settings: dict) -> dict:
    """One of our ways: cells a second."""
    cells, number = settings["cells"], 0
    order = np.random.default_rng(0).permutation(cells)
    if name.startswith("convert"):
        file = {"convert_h5ad": "cells.h5ad", "convert_csc": "columns.h5ad", "convert_scdl": "scdl"}[name]
        with tempfile.TemporaryDirectory() as cache:
            datasets.config.HF_DATASETS_CACHE = cache
            started = time.perf_counter()
            number = len(converted(folder, file, settings))
            return {"cells_per_s": number / (time.perf_counter() - started)}
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    if name == "batches":
        work, tokens = batches(folder, settings), 0
        next(work)  # opened
        started = time.perf_counter()
        while (spent := time.perf_counter() - started) < settings["seconds"]:
            more, more_tokens = next(work)
            number, tokens = number + more, tokens + more_tokens
        return {"cells_per_s": number / spent, "tokens_per_s": tokens / spent}
    if name == "tokens_at_random":
        table = converted(folder, "cells.h5ad", settings).with_format("arrow", columns=["input_ids"])
        parts = (len(table[order[i : i + BATCH]]["input_ids"].combine_chunks().flatten().to_numpy()) and BATCH
                   for i in range(0, cells, BATCH))  # fmt: skip
    else:
        source = H5ad(str(folder / "cells.h5ad"), "X") if name == "h5ad_in_order" else Scdl(str(folder / "scdl"))
        parts = map(copied, source.blocks(0, source.shape[0]))
    started = time.perf_counter()
    for some in parts:
        number += some
        if time.perf_counter() - started > settings["seconds"]:
            break
    return {"cells_per_s": number / (time.perf_counter() - started)}


def run(command: list[str], what: str) -> dict:
    """The JSON that a process prints at its end. Raises Failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise Failed(f"{what}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def measure(asked: argparse.Namespace) -> dict:
    """All ways, in turns."""
    settings, script = QUICK if asked.quick else FULL, Path(__file__).resolve()
    names = [name for name in WAYS if asked.peers or name not in PEERS]
    found: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix=NAME) as place, tqdm(total=settings["rounds"] * len(names) + 1) as bar:
        folder = Path(place)
        write(folder, settings)
        mine = [sys.executable, str(script), "--stage"]
        peer = [asked.peers, str(script.with_name("cells_peers.py"))]
        rest = [str(folder), str(settings["cells"]), str(settings["seconds"])]
        if asked.peers:
            run([*peer, "convert", *rest], "bionemo-scdl")
        bar.update()
        for _ in range(settings["rounds"]):
            for name in names:
                bar.set_postfix_str(name)
                command = [*peer, name, *rest] if name in PEERS else [*mine, name, str(folder), json.dumps(settings)]
                found[name].append(run(command, name))
                bar.update()
    ask = "import json; from importlib.metadata import version as v; print(json.dumps({n: v(n) for n in %r}))"
    theirs = run([asked.peers, "-c", ask % (PACKAGES,)], "versions") if asked.peers else {}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"name": cpu_name()},
        "versions": versions() | {"numpy": np.__version__, "h5py": h5py.__version__} | theirs,
        "settings": settings,
        "appetite": appetite(),
        "ways": found,
    }


def table(numbers: dict) -> str:
    """Markdown."""
    ways, settings = numbers["ways"], numbers["settings"]
    lines = ["| what | by | cells/s | ours is faster by | peak memory |", "|---|---|---|---|---|"]
    for name, runs in ways.items():
        what, whom, ours = WAYS[name]
        pairs = zip(ways[ours], runs, strict=True) if ours else ()
        ratios = [mine["cells_per_s"] / theirs["cells_per_s"] for mine, theirs in pairs]
        shown = f"{median(ratios):,.1f} x" if ratios else ""
        rate, memory = (median(one[key] for one in runs) for key in ("cells_per_s", "memory_gib"))
        lines.append(f"| {what} | {whom} | {rate:,.0f} | {shown} | {memory:.2f} GiB |")
    note = (
        f"{settings['cells']:,} made-up cells of {settings['expressed']:,} among {settings['genes']:,} genes, "
        f"{numbers['machine']['name']}, medians of {settings['rounds']}; batches of {BATCH_TOKENS:,} tokens; h5ad "
        "gzipped. Memory is the largest resident set of the process, its libraries and mapped files counted. "
    )
    if known := numbers["appetite"]:
        rate = median(one["tokens_per_s"] for one in ways["batches"])
        note += (
            f"Batches come with {rate:,.0f} tokens/s from one process, {rate / known['tokens_per_s']:,.0f} times as "
            f"fast as Geneformer-V1-10M trains on them, with {known['threads']} threads ([Speed](speed.md)). "
        )
    note += ", ".join(f"{name} {version}" for name, version in numbers["versions"].items()) + "."
    return "\n".join([*lines, "", note])


def main() -> int:
    """Read the command line."""
    if sys.argv[1:2] == ["--stage"]:
        found = own(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
        found["memory_gib"] = peak_gib()
        print(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment with anndata and bionemo-scdl")
    parser.add_argument("--quick", action="store_true", help="few cells, one round: to see it work")
    add_files(parser, OUTPUT)
    asked = parse_with_overrides(parser, sys.argv[1:])
    check_files(parser, asked, bool(asked.peers))
    if not asked.source and not asked.output:
        asked.output, asked.table = OUTPUT, ROOT / "docs" / "your_cells.md"
    return run_or_read(asked, measure, NAME, table)


if __name__ == "__main__":
    sys.exit(main())
