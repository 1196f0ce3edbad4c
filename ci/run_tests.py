#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the tests, and end with a table of where the minutes went; bash ci/test.sh starts it.

bash ci/test.sh                           all fast tests, each folder's from a copy outside the repository; lint, the
                                          tables in docs, what docs tell users to type, Slurm (where slurm-wlm and
                                          munge are installed), the site and the zips
bash ci/test.sh recipes/NAME models/NAME  the tests of these folders only
bash ci/test.sh --only-repository         all but the tests of folders
bash ci/test.sh -k plan                   options of pytest come last; with some, only lint, tables and tests run

Folders whose pins differ are tested in environments of their own (ci/environments.py). PYTHON=python3.12 chooses the
interpreter. As many parts as there are cores, and two, run side by side, and show what they said when they end;
tests/common, tests/tokens and the like are parts of their own, and a single folder is tested by two processes. A part
that fails stops no other; the end says which did, and what failed in them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import repository
from environments import environments


ROOT = Path(__file__).resolve().parents[1]
OWN = "recipes/esm2_native_te"  # in whose environment the repository's own tests and the benchmarks run
NOT_FAILED = {0: "ok", 5: "no test selected", 77: "left out"}  # by exit code: 5 is pytest's, 77 slurm/test.sh's
DOCS = ("docs", "docs/requirements.txt")


class Part(NamedTuple):
    """Commands that run in one environment, whose name or folder is given as ci/environment.sh takes it."""

    name: str
    environment: tuple[str, ...]
    folder: Path
    commands: list[list[str]]


class Result(NamedTuple):
    """What came of a part: its first exit code that is not 0, and everything that it said."""

    name: str
    seconds: float
    code: int
    output: str

    @property
    def word(self) -> str:
        return NOT_FAILED.get(self.code, "FAILED")


def run(part: Part, at_once: bool = True) -> Result:
    """Run all commands; what they say is shown as it comes or, unless `at_once`, at the end."""
    started, code, output = time.monotonic(), 0, bytearray(f"\n--- {part.name}\n".encode())
    show(output if at_once else f"--- {part.name} begins\n".encode())
    for command in part.commands:
        script = f"source ci/environment.sh {shlex.join(part.environment)} && " if part.environment else ""
        script += f"cd {shlex.quote(str(part.folder))} && {shlex.join(command)}"
        with subprocess.Popen(
            ["bash", "-c", script, "ci/test.sh"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            while some := os.read(process.stdout.fileno(), 2**16):
                output += some
                show(some if at_once else b"")
        code = code or process.returncode
    show(b"" if at_once else output)
    return Result(part.name, time.monotonic() - started, code, output.decode(errors="replace"))


def run_side_by_side(parts: list[Part], results: list[Result]) -> None:
    """As many at a time as there are cores, and two: much of a test's time is one core's, or waiting for ranks."""
    pool = ThreadPoolExecutor((os.cpu_count() or 1) + 2)
    futures = [pool.submit(run, part, at_once=False) for part in parts]
    try:
        for future in futures:
            results.append(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def show(text: bytes) -> None:
    """Write what a part has said."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def environments_of(parts: list[Part]) -> Part:
    """Make those that the parts need, one after another, so that parts may run side by side."""
    names = dict.fromkeys(part.environment for part in parts if part.environment)
    commands = [["bash", "-c", f"cd {shlex.quote(str(ROOT))} && source ci/environment.sh {shlex.join(name)}"]
                for name in names]  # fmt: skip
    return Part("environments", (), ROOT, commands)


def tests(name: str, environment: str, folder: Path, options: list[str]) -> Part:
    """A folder's tests in one process, or what `options` say."""
    return Part(name, ("--of", environment), folder, [["python", "-m", "pytest", "-p", "no:cacheprovider", *options]])


def parts_of(name: str, folder: Path, options: list[str]) -> list[Part]:
    """A folder's tests, those of each of its rooms apart, so that no part is long and both processes are busy."""
    rooms = sorted({str(file.parent.relative_to(folder)) for file in folder.glob("tests/*/test_*.py")})
    own = [tests(name, name, folder, [*(f"--ignore={room}" for room in rooms), *options])]
    return own + [tests(f"{name}/{room}", name, folder, [room, *options]) for room in rooms]


def num_bytes(part: Part) -> int:
    """How much there is to test, roughly."""
    rooms = [word for word in part.commands[0] if word.startswith("tests/")]
    files = [file for place in rooms or ["tests"] for file in part.folder.glob(f"{place}/*.py")]
    return sum(file.stat().st_size for file in files)


def copied(folder: str, scratch: Path) -> Path:
    """A copy without environments and what runs leave."""
    left_by_runs = shutil.ignore_patterns("__pycache__", ".venv", "outputs")
    return Path(shutil.copytree(ROOT / folder, scratch / folder, ignore=left_by_runs))


def tables() -> Part:
    """Those in docs are those that the committed numbers give."""
    tests = "recipes/esm2_native_te/tests"
    checks = [(tests, name, name, "docs/exactness.md") for name in ("curve_matrix", "kill_anywhere")]
    checks += [("ci/benchmarks", "train_speed", "train_speed", "README.md")]
    checks += [("ci/benchmarks", "train_speed", numbers.stem, "docs/speed.md")
               for numbers in sorted((ROOT / "docs" / "results").glob("train_speed*.json"))]  # fmt: skip
    checks += [("ci/benchmarks", name, name, "docs/data.md") for name in ("data_speed", "row_index")]
    checks += [("ci/benchmarks", "structures_start", "structures_start", "docs/your_structures.md")]
    checks += [("ci/benchmarks", name, name, "docs/scaling.md")
               for name in ("scaling_model", "scaling_ranks", "largest_model", "context_memory")]  # fmt: skip
    checks += [("ci/benchmarks", "cells_speed", "cells_speed", "docs/your_cells.md")]
    checks += [("ci/benchmarks", "precision_curves", "precision_curves", "docs/exactness.md")]
    checks += [("ci/benchmarks", "sanity", numbers.stem, f"recipes/{numbers.stem.removeprefix('sanity_')}/README.md")
               for numbers in sorted((ROOT / "docs" / "results").glob("sanity_*.json"))]  # fmt: skip
    commands = [["python", f"{folder}/{script}.py", "--from", f"docs/results/{numbers}.json", "--check", page]
                for folder, script, numbers, page in checks]  # fmt: skip
    commands.append(["python", "ci/benchmarks/hardware.py", "--check", "docs/hardware.md"])
    return Part("tables in docs", ("--of", OWN), ROOT, commands)


def commands_in_docs() -> list[Part]:
    """Each folder's page in the folder's environment, the others in that of the repository."""
    parts = []
    for name, folders in environments(ROOT).items():
        more = ["docs", "."] if OWN in folders else []
        title = "commands in docs" + (f" ({name})" if len(environments(ROOT)) > 1 else "")
        parts.append(Part(title, ("--of", folders[0]), ROOT, [["python", "ci/run_docs.py", *folders, *more]]))
    return parts


def chosen(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    """Folders to test, whether the repository's own parts run, and options of pytest. Raises ValueError."""
    known = [folder for folders in environments(ROOT).values() for folder in folders]
    folders, only_repository, rest = [], False, list(arguments)
    while rest and (not rest[0].startswith("-") or rest[0] == "--only-repository"):
        word = rest.pop(0)
        if word == "--only-repository":
            only_repository = True
            continue
        folder = word.removeprefix(f"{ROOT}/").removeprefix("./").rstrip("/")
        if folder not in known:
            raise ValueError(f"{word} is no recipe or model; there are {', '.join(sorted(known))}.")
        folders.append(folder)
    if folders and only_repository:
        raise ValueError(f"--only-repository tests no folder; leave it or {folders[0]} out.")
    return folders or ([] if only_repository else sorted(known)), not folders, rest


def summary(results: list[Result], seconds: float) -> str:
    """The table at the end; `seconds` are those of all, of which several parts may share some."""
    rows = [(result.name, result.seconds, result.word) for result in results] + [("all", seconds, "")]
    return "\n".join(["| part | minutes | result |", "|---|---:|---|",
                      *(f"| {name} | {seconds / 60:.1f} | {word} |" for name, seconds, word in rows)])  # fmt: skip


def failures(result: Result) -> str:
    """The lines of a failed part that name what failed, or else its last."""
    lines = [line for line in re.sub(r"\x1b\[[\d;]*m", "", result.output).splitlines() if line.strip()]
    named = [line for line in dict.fromkeys(lines) if re.match(r"(FAILED|ERROR|failed:|error:) ?\S", line)]
    return "\n".join([f"{result.name} failed:", *(f"  {line}" for line in (named or lines[-3:])[:20])])


def main(arguments: list[str]) -> int:
    """Run what is asked for; 1 if anything failed."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    repository.files_of(ROOT)  # ends where there is no git
    try:
        folders, whole, options = chosen(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Real proteins, if they are there.
    os.environ.setdefault("TEST_DATA", str(ROOT.parent / "shared" / "data"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.pop("VIRTUAL_ENV", None)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        beside, parts = [], []  # those that run side by side, and those that take the whole machine
        if whole and not options:
            beside += commands_in_docs()  # the longest first
        if whole:
            beside += [Part("lint", ("--of", OWN), ROOT, [["bash", "ci/lint.sh"]])]
        if len(folders) == 1 and not whole:
            alone = ["-n", "2", "--dist", "loadfile"]
            parts = [tests(folders[0], folders[0], copied(folders[0], scratch), [*alone, *options])]
        else:
            some = [part for folder in folders for part in parts_of(folder, copied(folder, scratch), options)]
            if whole:
                # These belong to the repository, and need all of it around them.
                repository.copy(ROOT, scratch / "repository")
                some += [
                    tests(part, OWN, scratch / "repository" / part, options) for part in ("ci/benchmarks", "ci/tests")
                ]
            beside += sorted(some, key=num_bytes, reverse=True)  # so that the last ones are short
        if whole:
            beside.append(tables())
        if whole and not options:
            parts.append(Part("Slurm", (), ROOT, [["bash", "slurm/test.sh"]]))
            beside += [
                Part("site", DOCS, ROOT, [["mkdocs", "build", "--strict", "--quiet", "--site-dir", f"{name}/site"]]),
                Part("zips", DOCS, ROOT, [["python", "ci/build_zips.py", "--out", f"{name}/zips"]]),
            ]
        results, started = [], time.monotonic()
        try:
            results.append(run(environments_of([*beside, *parts])))
            if len(beside) > 1:
                os.environ.setdefault("OMP_NUM_THREADS", "1")
            run_side_by_side(beside, results)
            for part in parts:
                results.append(run(part))
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            results.append(Result("the rest", 0.0, 130, "interrupted"))
    table = summary(results, time.monotonic() - started)
    failed = [failures(result) for result in results if result.word == "FAILED"]
    print("\n".join(["", table, *failed]))
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(page, "a") as file:
            file.write(f"{table}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
