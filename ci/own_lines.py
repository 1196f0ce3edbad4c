#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many lines of each recipe's code are its own, and how many are in files that another has too, to the byte.

Blank lines, tests and the files that start jobs are left out.

python ci/own_lines.py                          # a table
python ci/own_lines.py recipes/amplify_native_te   # the files of one, with their lines
"""

import argparse
from collections import Counter
from pathlib import Path

from repository import NoGit, paths_of


ROOT = Path(__file__).resolve().parents[1]
CODE, NOT_COUNTED = (".py", ".cpp"), ("tests", "contract")


def files(root: Path) -> dict[str, dict[str, bytes]]:
    """The code of each recipe, by its path in it."""
    try:
        paths = paths_of(root)
    except NoGit:  # a copy
        paths = [path for path in root.glob("recipes/**/*") if path.is_file()]
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(paths):
        top, *folders = path.relative_to(root).parts
        if top == "recipes" and path.suffix in CODE and not {*folders} & {*NOT_COUNTED}:
            found.setdefault(folders[0], {})["/".join(folders[1:])] = path.read_bytes()
    return found


def count(root: Path = ROOT) -> dict[str, dict[str, dict[str, int]]]:
    """Lines by recipe, then `own` or `shared`, then file."""
    recipes = files(root)
    holders = Counter(item for of in recipes.values() for item in of.items())
    counted = {}
    for recipe, of in recipes.items():
        kinds = counted[recipe] = {"own": {}, "shared": {}}
        for name, content in of.items():
            kinds["own" if holders[name, content] == 1 else "shared"][name] = sum(
                bool(line.strip()) for line in content.splitlines()
            )
    return counted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    asked, counted = parser.parse_args().recipe, count()
    if asked:
        if asked.name not in counted:
            parser.error(f"{asked}: there are {', '.join(counted)}.")
        for kind, of in counted[asked.name].items():
            print(*(f"{lines:>6}  {kind:6}  {name}" for name, lines in of.items()), sep="\n")
    print(f"{'recipe':24} {'own':>6} {'shared':>7}")
    for recipe, kinds in counted.items():
        print(f"{recipe:24} {sum(kinds['own'].values()):>6} {sum(kinds['shared'].values()):>7}")


if __name__ == "__main__":
    main()
