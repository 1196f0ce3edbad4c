#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a recipe's README says to run first: how long each command takes on this machine, and what comes out.

    python ci/benchmarks/sanity.py recipes/geneformer_native_te
    python ci/benchmarks/sanity.py --from docs/results/sanity_nequip_native.json --check README.md

runs the blocks below a line `<!-- sanity -->`, or else the first block, and writes docs/results/sanity_<recipe>.json,
the pictures that potentials draw, and the sentences between the README's marks.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / Path((sys.argv[1:2] + ["esm2_native_te"])[0]).name
RECIPE = RECIPE if RECIPE.is_dir() else ROOT / "recipes" / "esm2_native_te"
sys.path[:0] = [str(RECIPE), str(ROOT / "ci")]

from common.contract.running import marks, with_table  # noqa: E402
from common.run_facts import cpu_name, versions  # noqa: E402


OUTPUTS = "outputs/sanity"  # in the README; a scratch folder here
PICTURES = {"report/parity.png": "nequip_parity.png", "md.png": "nequip_md.png"}
NOTES = ("kind", "step", "epoch", "seconds")  # of a line of metrics.jsonl, beside what was measured


def commands(readme: str, folder: Path) -> list[list[str]]:
    """What the README says, to write into a folder of this run's."""
    found = re.findall(r"<!-- sanity -->\n```(?:bash)?\n(.*?)```", readme, re.DOTALL)
    found = found or re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)[:1]
    lines = "".join(found).replace("\\\n", " ").replace(OUTPUTS, str(folder)).strip().splitlines()
    return [shlex.split(line) for line in lines]


def measured(words: list[str], folder: Path) -> dict:
    """Run one: seconds on the clock and of processors, and of training what its metrics say."""
    said = shlex.join(words).replace(str(folder), OUTPUTS)
    trains = any(word.startswith("train_") for word in words)
    logs = next((word.partition("=")[2] for word in words if word.startswith("logger.log_dir=")), None)
    if trains and logs is None:
        logs = f"{folder}_log"
        words = [*words, f"logger.log_dir={logs}"]
    runner = {"torchrun": ["-m", "torch.distributed.run"], "python": []}[words[0]]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    print(f"--- {said}", file=sys.stderr)
    subprocess.run([sys.executable, *runner, *words[1:]], cwd=RECIPE, env=environment, check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"command": said, "seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(used, 1)}
    return found | (outcome(Path(logs)) if trains else {})


def outcome(logs: Path) -> dict:
    """First and last loss of training, and the last validation."""
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    *_, last = [line for line in lines if line["kind"] == "validation"]
    validation = {key: value for key, value in last.items() if key not in NOTES}
    return {"training": {"first_loss": losses[0], "last_loss": losses[-1]}, "validation": validation}


def baselines() -> dict[str, float]:
    """Losses on the validation of what knows less than a model should, where the sample says them."""
    data = RECIPE / "data"
    if (data / "baseline.json").exists():
        return json.loads((data / "baseline.json").read_text())
    if (data / "validation.parquet").exists():
        from report import unigram_entropy

        return {"unigram_entropy": unigram_entropy(str(data / "validation.parquet"))}
    return {}


def run() -> dict:
    """All of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sanity"
        found = [measured(words, folder) for words in commands((RECIPE / "README.md").read_text(), folder)]
        errors = folder / "report" / "errors.json"
        result = {"recipe": RECIPE.name, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                  "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
                  "versions": versions(), "baselines": baselines(), "commands": found}  # fmt: skip
        if errors.exists():
            result["errors"] = json.loads(errors.read_text())
        for source, name in PICTURES.items():
            if (folder / source).exists():
                shutil.copy(folder / source, ROOT / "docs" / "images" / name)
    return result


def started(result: dict) -> str:
    """What the first command gives."""
    first, machine, known = result["commands"][0], result["machine"], result["baselines"]
    loss, minutes = first["validation"]["loss"], first["seconds"] / 60
    if "rank_position_loss" in known:
        less, known_loss = "a model that knows only which genes stand at which rank", known["rank_position_loss"]
    else:
        less, known_loss = "the frequencies of residues alone", known["unigram_entropy"]
    return (
        f"It takes {minutes:.1f} minutes on {machine['cores']} cores ({machine['cpu']}). The first logged loss is "
        f"{first['training']['first_loss']:.2f} nats, the validation loss at the end\n{loss:.2f}; {less} would reach "
        f"{known_loss:.2f}"
    )


def told_apart(result: dict) -> str:
    """How well classes are told apart, by the model that was trained before and by one with random weights."""
    tuned, random = [one for one in result["commands"] if "confusion" in one.get("validation", {})]
    confusion = tuned["validation"]["confusion"]
    share = max(map(sum, confusion)) / sum(map(sum, confusion))
    pairs = [f"{one['validation']['accuracy']:.1%} ({one['validation']['macro_f1']:.3f})" for one in (tuned, random)]
    return (
        f"Accuracy (and macro-F1) on {sum(map(sum, confusion))} validation cells: {pairs[0]}; from random weights "
        f"{pairs[1]}; the most\nfrequent type has {share:.1%} of the cells"
    )


def errors(result: dict) -> str:
    """What a potential's first command gives."""
    first, machine, found = result["commands"][0], result["machine"], result["errors"]
    return (
        f"It takes {first['seconds'] / 60:.1f} minutes on {machine['cores']} cores ({machine['cpu']}), and ends at "
        f"mean absolute errors of {found['forces_mae']:.3f} eV/A,\n{found['energy_per_atom_mae']:.3f} eV/atom and "
        f"{found['stress_mae']:.4f} eV/A^3"
    )


def whole(result: dict) -> str:
    """How long all commands take."""
    seconds = [sum(one[name] for one in result["commands"]) for name in ("seconds", "cpu_seconds")]
    return f"Together they take {seconds[0]:.0f} s, and {seconds[1]:.0f} s of processor time"


SENTENCES = {"sanity_loss": started, "sanity_classes": told_apart, "sanity_errors": errors, "sanity_whole": whole}


def updated(readme: str, result: dict) -> str:
    """The README with its sentences made of these numbers, as far as it has marks for them."""
    for name, sentences in SENTENCES.items():
        if marks(name)[0] in readme:
            numbers = f"([numbers](../../docs/results/sanity_{result['recipe']}.json))"
            readme = with_table(readme, name, f"{sentences(result)} {numbers}.")
    return readme


def main() -> int:
    """Run, or read, then write or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", metavar="FOLDER", help="run what its README says")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="run nothing, take these numbers"
    )
    parser.add_argument("--table", type=Path, metavar="README.md", help="write the sentences into this page")
    parser.add_argument("--check", type=Path, metavar="README.md", help="exit with 1 if this page has others")
    asked = parser.parse_args()
    if (asked.recipe is None) == (asked.source is None):
        parser.error("give a recipe's folder, or --from FILE.json.")
    if asked.recipe and not (asked.recipe / "README.md").is_file():
        parser.error(f"{asked.recipe}: it has no README.md; give the folder of a recipe.")
    result = json.loads(asked.source.read_text()) if asked.source else run()
    if asked.recipe:
        output = ROOT / "docs" / "results" / f"sanity_{RECIPE.name}.json"
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({one["command"]: one["seconds"] for one in result["commands"]}, indent=1))
    if asked.check and (text := asked.check.read_text()) != updated(text, result):
        print(f"error: {asked.check}: its sentences are not those of {asked.source}; write them: --table.")
        return 1
    if page := asked.table or (asked.recipe and RECIPE / "README.md"):
        page.write_text(updated(page.read_text(), result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
