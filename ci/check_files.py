#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every YAML, JSON, TOML and CFF file parses, and every link from a page to a file or heading of ours leads somewhere.

The repository has one address, that of mkdocs.yml.

python ci/check_files.py                    # exit 1 if not
"""

import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml
from pages import FENCE, LINK, RELEASES, headings, written_address
from repository import files_of


ROOT = Path(__file__).resolve().parents[1]


class Loader(yaml.SafeLoader):
    """Tags of MkDocs are left as they are."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)
PARSERS: dict[str, Callable[[str], object]] = {
    ".yaml": lambda text: list(yaml.load_all(text, Loader)), ".yml": lambda text: list(yaml.load_all(text, Loader)),
    ".cff": lambda text: list(yaml.load_all(text, Loader)), ".json": json.loads, ".toml": tomllib.loads,
}  # fmt: skip


def bad_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere; those to other machines are not followed."""
    found = []
    for _, target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target) or RELEASES.match(target):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            found.append(f"{target}: no such file")
        elif heading and there.suffix == ".md" and heading not in headings(there.read_text()):
            found.append(f"{target}: no such heading")
    return found


def other_addresses(root: Path) -> list[str]:
    """Where a page names the repository by another address than mkdocs.yml does."""
    if not (root / "mkdocs.yml").is_file():
        return []
    ours = written_address(root)
    named = re.compile(rf"https://github\.com/[\w.-]+/{re.escape(ours.rpartition('/')[2])}\b")
    return [
        f"{path.relative_to(root)}: {found[0]}, but mkdocs.yml has {ours}"
        for path in files_of(root)
        if path.suffix in (".md", ".cff")
        for found in named.finditer(path.read_text())
        if found[0] != ours
    ]


def problems(root: Path) -> list[str]:
    """What is wrong, a line each."""
    found = other_addresses(root)
    for path in files_of(root):
        if path.suffix in PARSERS:
            try:
                PARSERS[path.suffix](path.read_text())
            except (ValueError, yaml.YAMLError) as error:
                found.append(f"{path.relative_to(root)}: {' '.join(str(error).split())}")
        if path.suffix == ".md":
            found += [f"{path.relative_to(root)}: {link}" for link in bad_links(path)]
    return found


def main() -> int:
    """Print what is wrong."""
    found = problems(ROOT)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
