# SPDX-License-Identifier: Apache-2.0
"""Speed of the data: the loader alone, beside Hugging Face's tools and the model it feeds; start-up; the epoch plan.

python ci/benchmarks/data_speed.py                                  # writes docs/results/data_speed.json
python ci/benchmarks/data_speed.py --data my.fasta --output mine.json
python ci/benchmarks/data_speed.py --quick --output quick.json      # little of everything, half a minute
python ci/benchmarks/data_speed.py --only start                     # one part anew, in the same file
python ci/benchmarks/data_speed.py --from docs/results/data_speed.json --check docs/data.md

Loaders that are compared take turns, so that all of them meet the machine as it is then; a ratio is one of rates in
the same round. The model is the recipe's own training run. Start-up is timed from the command to the line of the first
step, on a file of proteins with random residues that is made for it. docs/data.md says what the numbers mean.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median


from subject import RECIPE, ROOT, SUBJECT, suffix  # isort: skip (it finds the recipe)
from common import quiet  # noqa: F401  # isort: skip
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from command_line import add_recipe
from plan_memory import QUANTILES, TOKENS, WINDOW_ROWS, Lengths, planned
from torch.utils.data import DataLoader
from tqdm import tqdm
from train_speed import BUNDLED, REAL, source

from common.batch import Batch
from common.contract.running import environment, with_table, write_table
from common.distributed import Distributed, process_group
from common.epoch_plan import EpochPlan, Grouping, permuted
from common.open_data import open_rows
from common.run_facts import cpu_name, versions
from dataset import SequenceRows, TrainLoader


NAME = f"data_speed{suffix(RECIPE.name)}"
OUTPUT = ROOT / "docs" / "results" / f"{NAME}.json"
UNIREF50 = 65_000_000  # rows
MAX_SEQ_LENGTH, MLM_PROBABILITY, SEED = 1024, 0.15, 1
PARTS = ("loaders", "start", "plan")
COLD, WARM = "cold_s", "warm_s"
FULL = {
    "model_tag": SUBJECT.tag(SUBJECT.usual), "steps": 24, "logged": 8, "layouts": ("packed", "padded"),
    "budgets": (4096, 16_384), "workers": (0, 1), "rounds": 5, "turn_s": 0.6, "kinds": ("parquet", "fasta"),
    "file_rows": 1_000_000, "repeats": 3, "states": (COLD, WARM), "imports": 3, "plan_rows": (10**5, 10**6, 10**7),
    "windows": 20,
}  # fmt: skip
QUICK = FULL | {
    "model_tag": SUBJECT.tag(SUBJECT.quick), "steps": 4, "logged": 4, "layouts": ("packed",), "budgets": (4096,),
    "workers": (0,), "rounds": 2, "turn_s": 0.1, "kinds": ("parquet",), "file_rows": 12_000,
    "repeats": 1, "states": (COLD,), "imports": 0, "plan_rows": (10**4,), "windows": 3,
}  # fmt: skip


class Failed(Exception):
    """A training run ended before its first step; the text says why."""


# ---- the loader


class Collate:
    """A batch by Hugging Face's tools; rows that were not tokenised ahead are tokenised first."""

    def __init__(self, packed: bool):
        from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

        self.packed, self.tokenizer = packed, tokenizer()
        self.special = torch.tensor(self.tokenizer.all_special_ids)
        self.mask = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=MLM_PROBABILITY)
        self.flatten = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)

    def __call__(self, rows: list[dict]) -> dict:
        if "input_ids" not in rows[0]:
            columns = tokenised(self.tokenizer, [row["sequence"] for row in rows])
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if not self.packed:
            return self.mask(rows)
        batch = self.flatten(rows)
        special = torch.isin(batch["input_ids"], self.special)  # the collator's own way goes through Python lists
        batch["input_ids"], batch["labels"] = self.mask.torch_mask_tokens(batch["input_ids"], special)
        return batch


def tokenizer():
    """The model's own, from the recipe's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(RECIPE / "tokenizer", local_files_only=True)


def tokenised(esm, sequences: list[str]) -> dict:
    """Columns of a batch of rows. The mask of special tokens saves the collator from looking for them."""
    options = {"truncation": True, "max_length": MAX_SEQ_LENGTH, "return_special_tokens_mask": True}
    return dict(esm(sequences, **options))


def count_tokens(batch) -> int:
    """Real tokens of a batch, ours or Hugging Face's."""
    if isinstance(batch, Batch):
        return batch.counts["tokens"]
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def endless(loader: DataLoader) -> Iterator:
    """Epoch after epoch."""
    while True:
        yield from loader


def rate(batches: Iterator, seconds: float) -> float:
    """Real tokens/s."""
    for _ in range(2):  # made by a worker while others had their turn
        next(batches)
    tokens, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        tokens += count_tokens(next(batches))
    return tokens / spent


def measure_loaders(distributed: Distributed, source: dict, settings: dict, bar: tqdm) -> list[dict]:
    """Real tokens/s of every contestant in every round, for each layout, budget of tokens and number of workers."""
    kwargs = {**source, "split": "train"}
    rows = open_rows("dataset", dict(kwargs)).select_columns(["sequence"])
    ahead = rows.map(tokenised_rows, batched=True, remove_columns=["sequence"], fn_kwargs={"esm": tokenizer()})
    mean_tokens = sum(map(len, ahead["input_ids"])) / len(ahead)
    found = []
    for layout in settings["layouts"]:
        for budget in settings["budgets"]:
            for workers in settings["workers"]:
                options = {"batch_size": max(1, round(budget / mean_tokens)), "shuffle": True, "num_workers": workers}
                if workers:
                    options |= {"multiprocessing_context": "forkserver", "persistent_workers": True}
                collate = Collate(layout == "packed")
                ours = TrainLoader(
                    distributed, SEED, layout == "packed", 1, load_dataset_kwargs=dict(kwargs), num_workers=workers,
                    token_micro_batch_size=budget, max_seq_length=MAX_SEQ_LENGTH, mlm_probability=MLM_PROBABILITY,
                )  # fmt: skip
                contestants = {
                    "ours": iter(ours),
                    "transformers": endless(DataLoader(rows, collate_fn=collate, **options)),
                    "transformers, tokenised ahead": endless(DataLoader(ahead, collate_fn=collate, **options)),
                }
                rates = {name: [] for name in contestants}
                for turn in range(settings["rounds"]):
                    # There and back, so that a drift of the machine favours nobody.
                    for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
                        bar.set_postfix_str(f"{layout}, {budget:,}, {workers} workers: {name}")
                        rates[name].append(rate(contestants[name], settings["turn_s"]))
                        bar.update()
                contestants.clear()  # ends the workers
                found.append({"layout": layout, "token_micro_batch_size": budget, "num_workers": workers,
                              "peer_rows": options["batch_size"], "tokens_per_second": rates})  # fmt: skip
    return found


def tokenised_rows(rows: dict, esm) -> dict:
    """For `datasets.map`."""
    return tokenised(esm, [sequence or "" for sequence in rows["sequence"]])


# ---- training runs


def start(source: dict, cache: Path, *overrides: str) -> float:
    """Run train_ddp.py; seconds from the command to the line of its first step. Raises Failed."""
    options = [f"dataset.load_dataset_kwargs.{key}='{value}'" for key, value in source.items()]
    options += [
        "dataset.token_micro_batch_size=4096", "validation.load_dataset_kwargs=null", "checkpoint.ckpt_dir=null",
        "checkpoint.save_every_n_steps=null", "checkpoint.save_final_model=false", *overrides,
    ]  # fmt: skip
    command = [sys.executable, "train_ddp.py", "--config-name", "L1_8M", *options]
    variables = environment() | {"HF_DATASETS_CACHE": str(cache)}
    started, seconds, line = time.perf_counter(), None, ""
    with subprocess.Popen(command, cwd=RECIPE, env=variables, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if seconds is None and line.startswith("step "):
                seconds = time.perf_counter() - started
    if process.returncode or seconds is None:
        raise Failed(line.strip() or f"exit code {process.returncode}")
    return seconds


def measure_model(source: dict, folder: Path, settings: dict) -> dict:
    """Real tokens/s at which the model trains, and the share of its time that it waits for data."""
    start(
        source, folder / "cache", f"model_tag={settings['model_tag']}", f"num_train_steps={settings['steps']}",
        "micro_batches_per_step=2", f"logger.frequency={settings['steps'] // settings['logged']}",
        f"logger.log_dir='{folder}/model'",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "model" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"][1:]  # the first has what is done once
    waited, spent = (sum(line[key] for line in lines) for key in ("data_wait_s", "step_time_s"))
    run = json.loads((folder / "model" / "run.json").read_text())
    return {
        "model_tag": settings["model_tag"], "precision": run["precision"], "threads": run["threads_per_rank"],
        "tokens_per_second": [line["tokens_per_second"] for line in lines], "data_wait_share": waited / spent,
    }  # fmt: skip


def write_proteins(folder: Path, num_rows: int, kinds: tuple[str, ...]) -> dict[str, dict]:
    """Files of proteins with random residues and lengths as proteins have them; the `load_dataset_kwargs` of each."""
    random = np.random.default_rng(SEED)
    ends = np.concatenate(([0], np.cumsum(random.choice(QUANTILES, num_rows) - 2)))
    residues = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)[random.integers(0, 20, ends[-1], dtype=np.uint8)]
    sequences = pa.StringArray.from_buffers(num_rows, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(residues))
    table = pa.table({"id": np.arange(num_rows).astype(str), "sequence": sequences})
    files = {kind: folder / f"proteins.{kind}" for kind in kinds}
    pq.write_table(table, files["parquet"])
    if "fasta" in files:
        with files["fasta"].open("w") as file:
            for name, sequence in zip(*(column.to_pylist() for column in table.columns), strict=True):
                file.write(f">{name}\n{sequence}\n")
    return {kind: {"path": kind, "data_files": str(file)} for kind, file in files.items()}


def measure_start(sources: dict[str, dict], folder: Path, settings: dict, bar: tqdm) -> list[dict]:
    """Seconds to the first step, with nothing in the cache of `datasets` (cold) and with the file in it (warm)."""
    found = [{"file": kind, "num_rows": settings["file_rows"], COLD: [], WARM: []} for kind in sources]
    for repeat in range(settings["repeats"]):
        for line, (kind, one) in zip(found, sources.items(), strict=True):
            cache = folder / f"cache_{kind}_{repeat}"
            for state in settings["states"]:
                bar.set_postfix_str(f"start-up from {kind}, {state[:4]}")
                line[state].append(
                    start(one, cache, f"model_tag={settings['model_tag']}", "num_train_steps=1",
                          "micro_batches_per_step=1", "logger.log_dir=null")
                )  # fmt: skip
                bar.update()
    return found


def measure_imports(repeats: int) -> list[float]:
    """Seconds of a start-up in which Python and the libraries are loaded."""
    command, seconds = [sys.executable, "-c", "import train_ddp; print()"], []
    for _ in range(repeats):
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=RECIPE, env=environment(), stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            seconds.append(time.perf_counter() - started)
    return seconds


# ---- the plan


def milliseconds(work: Callable, calls: list) -> float:
    """The median of one call for each of these arguments."""
    spent = []
    for call in calls:
        started = time.perf_counter()
        work(*call)
        spent.append(1000 * (time.perf_counter() - started))
    return median(spent)


def measure_plan(distributed: Distributed, source: dict, settings: dict, bar: tqdm) -> dict:
    """CPU time of an epoch's plan by its rows; of a window, time to plan it and to read the rows of one in a file."""
    epochs = []
    for num_rows in settings["plan_rows"]:
        bar.set_postfix_str(f"plan of {num_rows:,} rows")
        started = time.process_time()
        planned(num_rows)
        epochs.append({"num_rows": num_rows, "cpu_s": time.process_time() - started})
        bar.update()
    bar.set_postfix_str("windows")
    random, grouping = np.random.default_rng(SEED), Grouping(budget=TOKENS)
    plan = EpochPlan(Lengths(UNIREF50), grouping, SEED, WINDOW_ROWS)
    places = [(epoch, int(random.integers(plan.num_windows - 1))) for epoch in range(settings["windows"])]
    shuffles = [(np.arange(WINDOW_ROWS) + window * WINDOW_ROWS, UNIREF50, SEED, epoch) for epoch, window in places]
    rows = open_rows("dataset", {**source, "split": "train"})
    proteins = SequenceRows("dataset", rows, "sequence", MAX_SEQ_LENGTH, SEED)
    proteins.build_index(distributed)
    indexed = EpochPlan(proteins, grouping, SEED, WINDOW_ROWS)
    own_places = [(epoch, int(random.integers(max(1, indexed.num_windows - 1)))) for epoch, _ in places]
    windows = [([micro.rows for micro in indexed.window(*place)], place[0]) for place in own_places]

    def read(micro_batches: list[np.ndarray], epoch: int) -> None:
        for rows in micro_batches:
            proteins.read(rows, epoch)

    return {
        "epochs": epochs,
        "token_micro_batch_size": TOKENS,
        "window_rows": WINDOW_ROWS,
        "window_tokens": float(QUANTILES.mean() * WINDOW_ROWS),
        "uniref50_rows": UNIREF50,
        "shuffle_window_ms": milliseconds(permuted, shuffles),
        "plan_window_ms": milliseconds(plan.window, places),
        "resume_ms": milliseconds(lambda *place: next(plan.starting_at(*place, 50)), places),
        "read_rows": indexed.num_rows,
        "plan_indexed_window_ms": milliseconds(indexed.window, own_places),
        "read_window_ms": milliseconds(read, windows),
    }


# ---- all of it


def measure(arguments: argparse.Namespace, result: dict) -> dict:
    """Add the parts that are asked for to `result`. Raises Failed, and ValueError where that is of another machine."""
    settings, parts = QUICK if arguments.quick else FULL, arguments.only
    facts = {
        "machine": {"name": cpu_name(), "cores": os.cpu_count()},
        "versions": versions() | {"numpy": np.__version__, "pyarrow": pa.__version__},
    }
    if result and any(result[key] != facts[key] for key in facts):
        raise ValueError("the other parts were measured on another machine or with other versions; leave --only out.")
    result |= facts | {"command": shlex.join(arguments.command)}
    groups = len(settings["layouts"]) * len(settings["budgets"]) * len(settings["workers"])
    starts = len(settings["kinds"]) * len(settings["states"]) * settings["repeats"]
    turns = {"loaders": 3 * settings["rounds"] * groups + 1, "start": starts, "plan": len(settings["plan_rows"])}
    with (
        tempfile.TemporaryDirectory(prefix=NAME) as name,
        tqdm(total=sum(turns[part] for part in parts), disable=None, file=sys.stderr) as bar,
    ):
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")  # nothing is left in the user's
        sources = {}
        if parts != ["loaders"]:
            bar.set_postfix_str("writing proteins")
            sources = write_proteins(folder, settings["file_rows"], settings["kinds"])
        if "loaders" in parts:
            bar.set_postfix_str("the model")
            result["data"] = Path(arguments.source["data_files"]).name
            result["model"] = measure_model(arguments.source, folder, settings)
            bar.update()
            with process_group(SEED) as distributed:
                result["loaders"] = measure_loaders(distributed, arguments.source, settings, bar)
        if "start" in parts:
            result["imports_s"] = measure_imports(settings["imports"])
            result["start"] = measure_start(sources, folder, settings, bar)
        if "plan" in parts:
            with process_group(SEED) as distributed:
                result["plan"] = measure_plan(distributed, sources["parquet"], settings, bar)
    return result


def loader_lines(result: dict) -> list[str]:
    """The loaders, and the model that they are held against."""
    model, peers = result["model"], list(result["loaders"][0]["tokens_per_second"])[1:]
    model_rate = max(model["tokens_per_second"])  # what else runs on the machine makes it slower, and never faster
    head = ["batches", "tokens a batch", "workers", "real tokens/s", "times the model"]
    head += [text for peer in peers for text in (peer, "ours is faster by")]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for group in result["loaders"]:
        rates = group["tokens_per_second"]
        ours = median(rates["ours"])
        cells = [group["layout"], f"{group['token_micro_batch_size']:,}", str(group["num_workers"]), f"{ours:,.0f}",
                 f"{ours / model_rate:,.0f}"]  # fmt: skip
        for peer in peers:
            ratios = [a / b for a, b in zip(rates["ours"], rates[peer], strict=True)]
            cells += [f"{median(rates[peer]):,.0f}", f"{median(ratios):.1f} x ({min(ratios):.1f} – {max(ratios):.1f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"{result['data']}. `{model['model_tag']}` trains on up to {model_rate:,.0f} real tokens/s beside "
        f"them ({model['precision'].upper()}, {model['threads']} threads, packs of 4,096 tokens), and waits for data "
        f"{model['data_wait_share']:.2%} of the time.",
        "",
    ]


def start_lines(result: dict) -> list[str]:
    """Start-up."""
    lines = ["| file | rows | seconds to the first step, cold | warm |", "|---|---|---|---|"]
    for line in result["start"]:
        cells = [line["file"], f"{line['num_rows']:,}", *(spread(line[state]) for state in (COLD, WARM))]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"Of these seconds Python and the libraries take {spread(result['imports_s'])}.", ""]


def plan_lines(result: dict) -> list[str]:
    """The plan, of an epoch and of a window."""
    plan, further = result["plan"], ""
    if window_ms := plan.get("plan_indexed_window_ms"):
        further = (
            f" By the index of {plan['read_rows']:,} rows in a file, a window is planned in {window_ms:.0f} ms: each "
            f"worker can plan for {plan['window_tokens'] / window_ms / 1000:,.0f} million tokens/s, those of all "
            f"ranks together. All windows of {plan['uniref50_rows']:,} rows would take it "
            f"{plan['uniref50_rows'] / plan['window_rows'] * window_ms / 1000:,.0f} s, spread over an epoch. To read, "
            f"clean and crop a window's rows takes {plan['read_window_ms']:.0f} ms, which the workers of all ranks "
            "share."
        )
    return [
        "| rows | CPU seconds for the plan of an epoch |",
        "|---|---|",
        *(f"| {line['num_rows']:,} | {line['cpu_s']:.2f} |" for line in plan["epochs"]),
        f"| {plan['uniref50_rows']:,} | {extrapolated(plan):.0f}, extrapolated |",
        "",
        f"Of {plan['uniref50_rows']:,} rows, a window of {plan['window_rows']:,} at any place is shuffled in "
        f"{plan['shuffle_window_ms']:.1f} ms and planned in {plan['plan_window_ms']:.0f} ms; a run that is resumed at "
        f"any place has its micro-batch after {plan['resume_ms']:.0f} ms.{further}",
        "",
    ]


def table(result: dict) -> str:
    """Markdown: the parts that there are, and what ran."""
    parts = {"loaders": loader_lines, "start": start_lines, "plan": plan_lines}
    lines = [line for part, write in parts.items() if part in result for line in write(result)]
    lines.append(
        f"{result['machine']['name']}, {result['machine']['cores']} cores; `{result['command']}`; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + "."
    )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The median, and from where to where they go."""
    if not values:
        return "–"
    return f"{median(values):.1f} ({min(values):.1f} – {max(values):.1f})"


def extrapolated(plan: dict) -> float:
    """CPU seconds for UniRef50, at the rate of the most rows that were planned."""
    most = plan["epochs"][-1]
    return most["cpu_s"] / most["num_rows"] * plan["uniref50_rows"]


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", metavar="FILE",
        help="FASTA, or parquet with a column `sequence`; default: 8,000 UniRef proteins beside the repository if "
        "they are there, else the bundled sample",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts; default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rows, short turns: to see it work")
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT.relative_to(ROOT)}")
    add_recipe(parser)
    parser.add_argument("--from", dest="source_file", type=Path, metavar="FILE.json", help="run nothing, take these")
    parser.add_argument("--table", type=Path, metavar="PAGE.md", help="write the tables between the marks of a page")
    parser.add_argument("--check", type=Path, metavar="PAGE.md", help="exit with 1 unless the page has these tables")
    found = parser.parse_args(arguments)
    if found.source_file and (found.quick or found.data or found.output):
        parser.error("--from runs nothing: leave --data, --quick and --output out.")
    if found.check and not found.source_file:
        parser.error("--check needs --from.")
    if found.quick and not found.output and not found.source_file:
        parser.error("--quick needs --output: its numbers are not for docs.")
    default = BUNDLED if found.quick or not REAL.is_file() else REAL
    try:
        found.source = source(found.data or str(default))
    except ValueError as error:
        parser.error(str(error))
    given = ["--quick"] * found.quick + (["--data", Path(found.data).name] if found.data else [])
    found.command = ["python", "ci/benchmarks/data_speed.py", *given]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure or read, print, write."""
    asked = read_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if asked.source_file:
            result = json.loads(asked.source_file.read_text())
        else:
            output = asked.output or OUTPUT
            some = set(asked.only) < set(PARTS)
            result = measure(asked, json.loads(output.read_text()) if some and output.exists() else {})
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
        if asked.check:
            page = asked.check.read_text()
            if page != with_table(page, NAME, table(result)):
                print(f"error: {asked.check}: its tables are not those of {asked.source_file}; write them: --table.",
                      file=sys.stderr)  # fmt: skip
                return 1
            return 0
        print(table(result))
        if asked.table:
            write_table(asked.table, NAME, table(result))
    except (Failed, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
