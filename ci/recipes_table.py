#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The table of recipes in the README and on the site's first page, made from the folders that there are.

python ci/recipes_table.py                  # write it into both
python ci/recipes_table.py --check          # exit 1 if one is another

A row is a README's title up to a comma, and its first sentence up to a colon or full stop, without links.
"""

import argparse
import posixpath
import re
import sys
from pathlib import Path

from pages import LINK, title


ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md")
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->"


def table(page: str, root: Path = ROOT) -> str:
    """As it is in this page."""
    rows = []
    for readme in sorted(root.glob("recipes/*/README.md")):
        text = readme.read_text()
        first = LINK.sub(lambda link: link[1].strip("[]"), " ".join(text.split("\n\n")[1].split()))
        link = posixpath.relpath(readme.relative_to(root).as_posix(), posixpath.dirname(page) or ".")
        rows.append(f"| [{title(text).partition(',')[0]}]({link}) | {re.split('[:.](?= |$)', first)[0]} |\n")
    return "| recipe | what it is for |\n|---|---|\n" + "".join(rows)


def with_table(text: str, page: str, root: Path = ROOT) -> str:
    """The page with the table as it should be. Raises ValueError for a page without a place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no place for the table of recipes: {BEGIN.strip()} {END}")
    return before + begin + table(page, root) + end + after


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is another")
    check = parser.parse_args(arguments).check
    status = 0
    for page in PAGES:
        text = (root / page).read_text()
        made = with_table(text, page, root)
        if made != text and check:
            print(f"error: {page}: its table of recipes is not that of the folders: python ci/recipes_table.py")
            status = 1
        elif made != text:
            (root / page).write_text(made)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
