#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which folders are tested in one environment: those whose requirements.txt pin no package differently.

python ci/environments.py                          # a line each: its name, and its folders
python ci/environments.py recipes/esm2_native_te   # of this folder: its name, and the files to install
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FIRST = "test"


def pins(requirements: Path) -> dict[str, str]:
    """The version of each package that has one."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.+!-]+)", requirements.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def environments(root: Path) -> dict[str, list[str]]:
    """The folders of each; the first environment that a folder agrees with takes it."""
    groups: list[tuple[dict[str, str], list[str]]] = []
    for file in [*sorted(root.glob("recipes/*/requirements.txt")), *sorted(root.glob("models/*/requirements.txt"))]:
        mine = pins(file)
        group = next((one for one in groups if all(one[0].get(name, pin) == pin for name, pin in mine.items())), None)
        if group is None:
            groups.append(group := ({}, []))
        group[0].update(mine)
        group[1].append(str(file.parent.relative_to(root)))
    return {FIRST if i == 0 else f"{FIRST}-{Path(folders[0]).name}": folders for i, (_, folders) in enumerate(groups)}


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Print what is asked for."""
    found = environments(root)
    if not arguments:
        for name, folders in found.items():
            print(name, *folders)
        return 0
    folder = arguments[0].removeprefix("./").rstrip("/")
    for name, folders in found.items():
        if folder in folders:
            print(name, *(f"{one}/requirements.txt" for one in folders), "ci/requirements.txt")
            return 0
    print(f"error: {arguments[0]}: no such recipe or model with a requirements.txt.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
