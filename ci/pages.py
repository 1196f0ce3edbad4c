# SPDX-License-Identifier: Apache-2.0
"""Links and headings of pages in Markdown."""

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path


LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
RELEASES = re.compile(r"(\.\./)*releases$")  # GitHub's own page, above the repository


def written_address(root: Path) -> str:
    """The repository's, as pages have it: the default of mkdocs.yml."""
    return re.search(r'^repo_url: .*?"(\S+)"', (root / "mkdocs.yml").read_text(), re.M)[1]


def with_address(text: str, root: Path) -> str:
    """A page with the address that CI names in REPOSITORY_URL, if it does."""
    written = written_address(root)
    return text.replace(written, os.environ.get("REPOSITORY_URL", written))


def slug(heading: str) -> str:
    """The name that GitHub gives a heading in links."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def headings(text: str) -> list[str]:
    """What links into a page may name, in order; a name twice where two headings have it."""
    lines = FENCE.sub("", text).splitlines()
    return [slug(line.lstrip("#")) for line in lines if re.match(r"#{1,6} ", line)]


def title(text: str) -> str:
    """A page's first heading."""
    return text.partition("\n")[0].lstrip("# ")


def relinked(text: str, source: str, place: Callable[[str, str], str | None], address: str) -> str:
    """The page `source` of the repository with links as they are elsewhere.

    `place` gives the new target of a file and `#heading`, or None: then the link leads to the repository at `address`.
    """

    def replace(match: re.Match) -> str:
        words, target = match.groups()
        path, hash_, heading = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match.group()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (found := place(there, hash_ + heading)) is not None:
            return f"{words}({found})"
        if RELEASES.match(there):
            return f"{words}({address}/releases)"
        # A picture is linked to: GitHub shows it on a page of its own.
        return f"{words.lstrip('!')}({address}/blob/main/{there}{hash_}{heading})"

    return LINK.sub(replace, text)
