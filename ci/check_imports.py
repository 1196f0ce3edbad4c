#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check in every recipe and model that each file imports only what it may; common/contract/imports.py says what.

python ci/check_imports.py                           # all
python ci/check_imports.py recipes/esm2_native_te
"""

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parents[1]


def rules(root: Path) -> ModuleType:
    """The module with the rules, from one of the copies, which are the same."""
    found = sorted(root.glob("recipes/*/common/contract/imports.py"))
    if not found:
        sys.exit(f"error: no recipe in {root} has common/contract/imports.py.")
    spec = spec_from_file_location("imports", found[0])
    module = module_from_spec(spec)
    sys.modules["imports"] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Check the folders asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    folders = parser.parse_args(arguments).folders
    for folder in folders:
        if not (folder / "requirements.txt").is_file():
            parser.error(f"{folder} is no recipe or model: it has no requirements.txt.")
    every = [path.parent for top in ("recipes", "models") for path in root.glob(f"{top}/*/requirements.txt")]
    find = rules(root).import_problems
    problems = [f"{folder.relative_to(root)}/{problem}" for folder in sorted(map(Path.resolve, folders or every))
                for problem in find(folder)]  # fmt: skip
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
