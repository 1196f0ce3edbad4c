#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the tests of recipe or model folders, each from a copy outside the repository, in a fresh environment.

./ci/scripts/recipes_local_test.py recipes/esm2_native_te/ [-k plan ...]
./ci/scripts/recipes_local_test.py --here recipes/esm2_native_te/       # in this Python's environment: no installing
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def test_here(folder: Path, options: list[str]) -> int:
    """Pytest's exit code, from a copy, with this Python."""
    with tempfile.TemporaryDirectory() as scratch:
        ignored = shutil.ignore_patterns("__pycache__", ".venv", "outputs")
        copy = shutil.copytree(folder, Path(scratch) / folder.resolve().name, ignore=ignored)
        return subprocess.run([sys.executable, "-m", "pytest", *options], cwd=copy).returncode


def main(arguments: list[str]) -> int:
    """Test the folders that come first; what follows goes to pytest."""
    here = "--here" in arguments
    rest = [argument for argument in arguments if argument != "--here"]
    first_option = next((i for i, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    folders, options = [Path(argument) for argument in rest[:first_option]], rest[first_option:]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        print(f"error: {missing[0]}: no such folder.", file=sys.stderr)
        return 2
    if not folders:
        print("usage: recipes_local_test.py [--here] FOLDER ... [pytest arguments]", file=sys.stderr)
        return 2
    if here and (missing := [name for name in ("pytest", "torch") if find_spec(name) is None]):
        print(
            f"error: --here tests with {sys.executable}, which has no {missing[0]}. Activate an environment that has "
            f"it (pip install -r {folders[0] / 'requirements.txt'} -r {ROOT / 'ci' / 'requirements.txt'}), or leave "
            "out --here, and one is made.",
            file=sys.stderr,
        )
        return 2
    status = 0
    for folder in folders:
        alone = ["bash", str(ROOT / "ci" / "run_alone.sh"), str(folder), *options]
        status |= test_here(folder, options) if here else subprocess.run(alone).returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
