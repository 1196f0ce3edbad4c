# SPDX-License-Identifier: Apache-2.0
"""Links and headings of pages in Markdown."""

import posixpath
import re
from collections.abc import Callable


LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
RELEASES = re.compile(r"(\.\./)*releases$")  # GitHub's own page, above the repository


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


def relinked(text: str, source: str, place: Callable[[str, str], str | None], where: str = "") -> str:
    """The page `source` of the repository with links as they are elsewhere.

    `place` gives the new target of a file and `#heading`, or None: then the words stay, and the path with `where` is
    put in brackets behind them.
    """

    def replace(match: re.Match) -> str:
        words, target = match.groups()
        path, hash_, heading = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match.group()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (found := place(there, hash_ + heading)) is not None:
            return f"{words}({found})"
        words = words.lstrip("!")[1:-1]
        return words if RELEASES.match(there) else f"{words} (`{there}{hash_}{heading}`{where})"

    return LINK.sub(replace, text)
