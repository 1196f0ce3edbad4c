#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run what READMEs and docs tell users to type: blocks marked `bash` and `python`, each page's in a copy of its own.

python ci/run_docs.py                         # all pages
python ci/run_docs.py recipes/esm2_native_te  # a page, or a folder's pages
python ci/run_docs.py --list

Blocks marked `sh` and `py` are for people: they need a GPU, a cluster, a network or an hour. `text` and no mark are no
commands; any other mark is an error, so that nothing is left out by mistake. Training is cut short: few steps and a
small validation set, and `step_400` follows.

A page's commands are typed where it lies, those of docs/ at the top; from a line <!-- typed in recipes/NAME --> on
they are typed there, and from <!-- typed in a recipe --> on in that of --recipe. What commands of a recipe expect of a
user's own files, `write_examples` in its tests/this_recipe.py makes. Two pages are run side by side.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import repository


ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/esm2_native_te"
TYPED_IN = re.compile(r"^<!-- typed in (a recipe|\S+) -->$", re.M)
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.M | re.S)
RUN, READ = ("bash", "python"), ("sh", "py", "text", "")
FEWEST = 4
TIMEOUT_S = 600


class Block(NamedTuple):
    """One fence of a page."""

    page: str
    line: int
    language: str
    text: str
    folder: str  # where it is typed


def blocks(page: Path, name: str, recipe: str = RECIPE) -> list[Block]:
    """Those of a page that are run, `recipe` being where those for any recipe are typed.

    Raises ValueError where it cannot be told which these are.
    """
    text = page.read_text()
    places = [(0, "." if name.startswith("docs/") else str(Path(name).parent))]
    places += [(m.start(), m[1]) for m in TYPED_IN.finditer(text)]
    found = []
    for m in FENCE.finditer(text):
        folder = [place for start, place in places if start <= m.start()][-1]
        line = text.count("\n", 0, m.start()) + 1
        found.append(Block(name, line, m[1], m[2], recipe if folder == "a recipe" else folder))
    for block in found:
        if block.language not in RUN + READ:
            raise ValueError(
                f"{name}:{block.line}: a block marked `{block.language}`; `bash` and `python` are run, and "
                "`sh`, `py`, `text` or no mark are known besides."
            )
    rest = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    if other := re.search(r"^[ \t>]*(```|~~~)", rest, re.M):
        line = rest.count("\n", 0, other.start()) + 1
        raise ValueError(f"{name}:{line}: a block has to begin and end with ``` at the start of a line.")
    return [block for block in found if block.language in RUN]


def few(match: re.Match) -> str:
    """400 steps as 8."""
    return f"{match[1]}{max(FEWEST, int(match[2]) // 50)}"


def shortened(text: str, folder: str = ".") -> str:
    """Commands that train little; the rest as it is."""
    commands, defaults = [], ROOT / folder / "hydra_config" / "defaults.yaml"
    given = {"num_train_steps": FEWEST, "validation.max_rows": 20}
    if defaults.exists() and "max_rows:" not in defaults.read_text():
        del given["validation.max_rows"]
    for command in re.sub(r"\\\n\s*", " ", text).splitlines():
        command = re.sub(r"(num_train_steps=|step_)(\d+)", few, command)
        words, hash_, comment = command.partition("  #")
        if re.search(r"\btrain_(ddp|fsdp2|mfsdp)\.py\b", words) and not words.startswith("diff"):
            words = words.rstrip() + "".join(f" {k}={v}" for k, v in given.items() if f"{k}=" not in words)
        commands.append(words + hash_ + comment)
    return "\n".join(commands)


EXAMPLES = """
import runpy
from pathlib import Path
write = runpy.run_path("tests/this_recipe.py").get("write_examples")
if write:
    write(Path.cwd())
"""


def copy_repository(to: Path, folders: set[str]) -> None:
    """The files that git knows; in those of `folders` that are recipes also what their commands expect of a user."""
    repository.copy(ROOT, to)
    (to / ".git" / "info" / "exclude").write_text("*\n")  # what the pages' commands write is no part of a recipe
    for folder in sorted(folders):
        if (to / folder / "tests" / "this_recipe.py").is_file():
            subprocess.run([sys.executable, "-c", EXAMPLES], cwd=to / folder, check=True)


def run_page(found: list[Block], scratch: Path) -> int:
    """Run the blocks of one page in order; how many failed."""
    failed, root = 0, scratch / found[0].page.replace("/", "_")
    named = {name for block in found for name in re.findall(r"\brecipes/\w+", block.text)}
    copy_repository(root, {block.folder for block in found} | named)
    for block in found:
        started = time.perf_counter()
        wrong = run(block, root, scratch / "cache")
        failed += wrong is not None
        seconds = time.perf_counter() - started
        print(f"{'FAILED' if wrong else 'ok':6} {block.page}:{block.line}  {seconds:.0f} s", flush=True)
        if wrong:
            print(f"{block.text}\n{wrong}", file=sys.stderr, flush=True)
    shutil.rmtree(root)
    return failed


def run(block: Block, root: Path, cache: Path) -> str | None:
    """What went wrong, with the end of what was said; None if nothing did."""
    text = shortened(block.text, block.folder) if block.language == "bash" else block.text
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
    quiet = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
    try:
        done = subprocess.run(
            command, cwd=root / block.folder, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"still running after {TIMEOUT_S} s"
    return None if done.returncode == 0 else f"exit code {done.returncode}\n{done.stdout[-3000:]}"


def main(arguments: list[str]) -> int:
    """Run the pages asked for, all if none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE.md")
    parser.add_argument("--recipe", default=RECIPE, metavar="FOLDER", help=f"default: {RECIPE}")
    parser.add_argument("--list", action="store_true", help="show the blocks and what is run of them")
    asked = parser.parse_args(arguments)
    pages = []
    for page in map(Path.resolve, asked.pages):
        pages += sorted(page.glob("*.md")) if page.is_dir() else [page]
    for pattern in ("*.md", "recipes/*/README.md", "models/*/README.md", "docs/*.md") if not asked.pages else ():
        pages += sorted(ROOT.glob(pattern))
    for page in pages:
        if not page.is_file() or ROOT not in page.parents:
            parser.error(f"{page}: {'not in this repository' if page.is_file() else 'no such page'}.")
    try:
        recipe = asked.recipe.removeprefix("./").rstrip("/")
        found = [block for page in pages for block in blocks(page, str(page.relative_to(ROOT)), recipe)]
        if wrong := [block for block in found if not (ROOT / block.folder).is_dir()]:
            raise ValueError(f"{wrong[0].page}: its commands are typed in {wrong[0].folder}, which is no folder here.")
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        for block in found:
            print(f"--- {block.page}:{block.line} ({block.language})")
            print(shortened(block.text, block.folder) if block.language == "bash" else block.text.rstrip())
        return 0
    of_page = [[block for block in found if block.page == page] for page in dict.fromkeys(b.page for b in found)]
    of_page.sort(key=len, reverse=True)
    # Most of a command's time is one core's: what it imports.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as two:
        failed = sum(two.map(partial(run_page, scratch=Path(scratch)), of_page))
    print(f"{len(found) - failed} of {len(found)} blocks ran")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
