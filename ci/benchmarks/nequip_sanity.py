#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The small NequIP from its data to dynamics, as its README says it: how long each command takes, and what comes out.

    python ci/benchmarks/nequip_sanity.py

trains `L0_sanity` on two ranks, measures the errors with parity plots, runs dynamics, and writes
docs/results/nequip_sanity.json, docs/images/nequip_parity.png and docs/images/nequip_md.png.
"""

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
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "nequip_native"
sys.path.insert(0, str(RECIPE))

from common.run_facts import cpu_name, versions  # noqa: E402


def commands(readme: str, folder: Path) -> dict[str, list[str]]:
    """What the README has under its mark, to write into a folder of this run's."""
    block = re.search(r"<!-- sanity -->\n```\n(.*?)```", readme, re.DOTALL)[1]
    lines = block.replace("\\\n", " ").replace("outputs/sanity", str(folder)).strip().splitlines()
    found = [shlex.split(line) for line in lines]
    return {next(Path(w).stem for w in words if w.endswith(".py")): words for words in found}


def measured(words: list[str]) -> dict[str, float]:
    """Run one; seconds on the clock and of processors."""
    words = [sys.executable, "-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    subprocess.run(words, cwd=RECIPE, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(used, 1)}


def main() -> None:
    """Run all, and write what came out."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sanity"
        times = {name: measured(words) for name, words in commands((RECIPE / "README.md").read_text(), folder).items()}
        errors = json.loads((folder / "report" / "errors.json").read_text())
        for name, source in (("nequip_parity", folder / "report" / "parity.png"), ("nequip_md", folder / "md.png")):
            shutil.copy(source, ROOT / "docs" / "images" / f"{name}.png")
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}
    result = {"machine": machine, "commands": times, "errors": errors}
    (ROOT / "docs" / "results" / "nequip_sanity.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(times))


if __name__ == "__main__":
    main()
