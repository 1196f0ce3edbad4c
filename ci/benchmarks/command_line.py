# SPDX-License-Identifier: Apache-2.0
"""What the command lines of several benchmarks share."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path


class Failed(Exception):
    """A run that ended with an error, or one that cannot be compared; the text says why."""


OVERRIDE = re.compile(r"\+{0,2}[\w.]+=")


def positive(text: str) -> int:
    """The type of an argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def parse_with_overrides(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """`parser`'s arguments, and in `overrides` those of Hydra's form, which may stand anywhere."""
    found = parser.parse_args([argument for argument in arguments if not OVERRIDE.match(argument)])
    found.overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    return found


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The option that `subject.py` has read already."""
    parser.add_argument("--recipe", metavar="FOLDER", help="what is measured; default: recipes/esm2_native_te")


def add_files(parser: argparse.ArgumentParser, output: Path) -> None:
    """The files of a benchmark whose docs have one table, and the recipe."""
    add_recipe(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help=f"default: docs/results/{output.name}, and the table"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="run nothing, take these numbers"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table into this page")
    parser.add_argument("--check", type=Path, metavar="FILE.md", help="exit with 1 if its table is not that of --from")


def check_files(parser: argparse.ArgumentParser, found: argparse.Namespace, runs: bool) -> None:
    """Refuse what does not go together; `runs` if there is something that only a run could heed."""
    if found.check and not found.source:
        parser.error("--check needs the numbers: --from FILE.json.")
    if found.source and not found.source.is_file():
        parser.error(f"--from {found.source}: no such file.")
    if found.source and (found.quick or found.output or found.overrides or runs):
        parser.error("--from runs nothing; leave it or what belongs to runs out.")
    if found.quick and not found.output:
        parser.error("--quick measures too little for docs; say where with --output FILE.json.")


def refuse(parser: argparse.ArgumentParser, overrides: list[str], taken: tuple[str, ...]) -> None:
    """Refuse overrides of keys that begin with one of `taken`, because the benchmark sets them."""
    for override in overrides:
        if override.lstrip("+").startswith(taken):
            parser.error(f"{override}: the benchmark sets that itself; see --help.")


def give_out(asked: argparse.Namespace, numbers: dict, name: str, table: str) -> int:
    """Write, check or print what `add_files` asks for; the exit code."""
    from common.contract.running import with_table, write_table  # where it lies, the benchmark has said

    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(numbers, indent=1) + "\n")
    if asked.table:
        write_table(asked.table, name, table)
    if not asked.check:
        print(table)
    elif (text := asked.check.read_text()) != with_table(text, name, table):
        print(f"error: {asked.check}: its table is not that of {asked.source}; write it: --table.", file=sys.stderr)
        return 1
    return 0


def run_or_read(asked: argparse.Namespace, measure: Callable, name: str, table: Callable) -> int:
    """Measure, or take the numbers of `--from`, then write, check or print their table; the exit code."""
    try:
        numbers = json.loads(asked.source.read_text()) if asked.source else measure(asked)
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return give_out(asked, numbers, name, table(numbers))


def first_error(stderr: str) -> str:
    """Of what a failed run has said, its own sentence, or else a rank's exception, or else the end."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in stderr.strip().splitlines() if line.strip()]
    for pattern in (r"error: ", r"(?!.*ChildFailedError)[\w.]*(Error|Exception)(: .|$)"):
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[0]
    return "\n".join(lines[-15:])
