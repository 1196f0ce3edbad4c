#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""LoRA beside training of all weights: what is learnt of the bundled cells' types, time of a step, and memory.

    python ci/benchmarks/lora_runs.py [--base recipes/geneformer_native_te/outputs/my_run/final_model]
    python ci/benchmarks/lora_runs.py --from docs/results/lora_runs.json

The first trains by Geneformer's recipe, writes docs/results/lora_runs.json and the tables of docs/your_cells.md; the
second writes the tables of these numbers. Without --base, that of L0_sanity is trained first.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RECIPE, PAGE = ROOT / "recipes" / "geneformer_native_te", ROOT / "docs" / "your_cells.md"
sys.path.insert(0, str(RECIPE))

from common.contract.running import write_table  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402


ALL = "lora.target_modules=[query,key,value,dense]"
WAYS = {
    "all weights": ["adamw_kwargs.lr=1e-3"],
    "the head alone": ["adamw_kwargs.lr=2e-3", "adamw_kwargs.groups=[{names: 'geneformer.*', frozen: true}]"],
    "LoRA, `r=8`": ["adamw_kwargs.lr=2e-3", "lora.r=8"],
    "LoRA, `r=8`, all linear layers": ["adamw_kwargs.lr=2e-3", "lora.r=8", ALL],
}
CELLS = ["model_kwargs.task=cells", "dataset.label_column=cell_type", "num_train_steps=100",
         "lr_scheduler_kwargs.num_warmup_steps=10", "lr_scheduler_kwargs.num_training_steps=110"]  # fmt: skip
# Of gf-12L-30M: 25 million weights in the layers.
LARGE = ["model_kwargs.num_hidden_layers=12", "model_kwargs.hidden_size=512", "model_kwargs.num_attention_heads=8",
         "model_kwargs.intermediate_size=1024", "validation.load_dataset_kwargs=null", "logger.frequency=1",
         "dataset.micro_batch_size=8", "micro_batches_per_step=1", "num_train_steps=12",
         "lr_scheduler_kwargs.num_warmup_steps=2"]  # fmt: skip


def train(folder: Path, *words: str) -> list[dict]:
    """What a run's metrics.jsonl says."""
    command = [sys.executable, "train_ddp.py", "--config-name", "L0_sanity", f"logger.log_dir={folder}", *words]
    subprocess.run(command, cwd=RECIPE, check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def started_from(base: Path) -> list[str]:
    """The keys of a run that starts from a model."""
    return [f"model_tag={base}", f"init_from={base}"]


def saved_in(folder: Path) -> list[str]:
    """The keys of a run that ends with a final model."""
    return [f"checkpoint.ckpt_dir={folder}", "checkpoint.save_final_model=true"]


def learnt(base: Path, words: list[str], folder: Path) -> dict:
    """Accuracy and macro-F1 at the end, and how many parameters trained."""
    *_, last = [x for x in train(folder, *started_from(base), *CELLS, *words) if x["kind"] == "validation"]
    run = json.loads((folder / "run.json").read_text())
    return {"trained": run["num_trained"], "parameters": run["num_parameters"],
            **{key: last[key] for key in ("accuracy", "macro_f1", "loss", "num_labels")}}  # fmt: skip


def cost(base: Path, words: list[str], folder: Path) -> dict:
    """The median time of the steps behind the first two, peak memory, and the size of a checkpoint."""
    options = [*LARGE, *CELLS[:2], *words, f"checkpoint.ckpt_dir={folder / 'ckpt'}"]
    if "lora.r=8" in words:
        options.append("checkpoint.trained_only=true")
    lines = [x for x in train(folder, *started_from(base), *options) if x["kind"] == "train"]
    run = json.loads((folder / "run.json").read_text())
    files = (folder / "ckpt" / "step_12").iterdir()
    return {"trained": run["num_trained"], "parameters": run["num_parameters"], "precision": run["precision"],
            "step_time_s": statistics.median(x["step_time_s"] for x in lines[2:]),
            "peak_memory_gib": lines[-1]["peak_memory_gib"],
            "checkpoint_mib": sum(file.stat().st_size for file in files) / 2**20}  # fmt: skip


def run(base: Path | None) -> dict:
    """All of it."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        if base is None:
            train(place / "base", *saved_in(place / "base"))
            base = place / "base" / "final_model"
        steps = (base / "README.md").read_text().partition(" steps")[0].rpartition(" ")[2]
        large = [word for word in LARGE if not word.startswith("num_train_steps")]
        train(place / "large", *large, "num_train_steps=1", "lr_scheduler_kwargs.num_warmup_steps=0",
              *saved_in(place / "large"))  # fmt: skip
        classes = {way: learnt(base, words, place / f"a{i}") for i, (way, words) in enumerate(WAYS.items())}
        costs = {way: cost(place / "large" / "final_model", words, place / f"b{i}")
                 for i, (way, words) in enumerate(WAYS.items())}  # fmt: skip
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
            "versions": versions(), "base_steps": int(steps.replace(",", "")), "classes": classes,
            "costs": costs}  # fmt: skip


def table(result: dict) -> str:
    """Both parts, as Markdown."""
    machine, some = result["machine"], next(iter(result["costs"].values()))
    cells = next(iter(result["classes"].values()))["num_labels"]
    lines = [
        f"Types of the bundled cells, from the model of `L0_sanity` after {result['base_steps']} steps, on {cells} "
        "validation cells:",
        "", "| what trains | parameters | accuracy | macro-F1 |", "|---|---|---|---|",
        *(f"| {way} | {x['trained']:,} of {x['parameters']:,} | {x['accuracy']:.1%} | {x['macro_f1']:.3f} |"
          for way, x in result["classes"].items()),
        "",
        f"A step of 8 cells, {some['parameters'] / 1e6:.0f} million parameters, {some['precision']}, "
        f"on {machine['cores']} cores ({machine['cpu']}); checkpoints of LoRA are `trained_only`:",
        "", "| what trains | parameters | s a step | peak memory, GiB | a checkpoint, MiB |", "|---|---|---|---|---|",
        *(f"| {way} | {x['trained']:,} | {x['step_time_s']:.2f} | {x['peak_memory_gib']:.2f} "
          f"| {x['checkpoint_mib']:.1f} |" for way, x in result["costs"].items()),
        "", "[Numbers](results/lora_runs.json), by `ci/benchmarks/lora_runs.py`.",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="a final model of L0_sanity")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="run nothing")
    asked = parser.parse_args()
    result = json.loads(asked.source.read_text()) if asked.source else run(asked.base and asked.base.resolve())
    if not asked.source:
        (ROOT / "docs" / "results" / "lora_runs.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(PAGE, "lora_runs", table(result))


if __name__ == "__main__":
    main()
