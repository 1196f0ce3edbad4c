# SPDX-License-Identifier: Apache-2.0
"""GUIDE.md of a zip: those pages of docs/ that hold for every recipe, and the recipe's keys, in one file."""

import posixpath
import re
from collections import Counter
from functools import partial
from pathlib import Path

import knobs
from pages import headings, relinked, slug, title, with_address, written_address


# In docs/. Their commands are typed in a recipe's folder, as the zip's are.
PAGES = (
    "your_data",
    "your_structures",
    "embeddings",
    "batches",
    "precision",
    "checkpoints",
    "metrics",
    "slurm",
    "moving",
    "hardware",
    "troubleshooting",
    "glossary",
)
FAMILIES = {
    "your_data": "tokens",
    "embeddings": "tokens",
    "your_structures": "atoms",
}  # pages of the recipes that have this folder
NAME = "GUIDE.md"
TYPED_IN = re.compile(r"^<!-- typed in .* -->\n+", re.M)
FENCE_OR_HEADING = re.compile(r"^(```|~~~).*?^\1|^#+ ", re.M | re.S)


def guide_pages(recipe: Path) -> dict[str, str]:
    """The text of each page by its path in the repository; the keys stand at that of their defaults."""
    found = {}
    for name in PAGES:
        if name in FAMILIES and not (recipe / FAMILIES[name]).is_dir():
            continue
        if (page := recipe.parents[1] / "docs" / f"{name}.md").is_file():
            found[f"docs/{name}.md"] = without_others(page.read_text(), recipe)
    if (recipe / knobs.DEFAULTS).is_file():
        found[f"recipes/{recipe.name}/{knobs.DEFAULTS}"] = knobs.page(recipe)
    return found


def without_others(text: str, recipe: Path) -> str:
    """A page without the parts that are another recipe's: those have its folder's name as a heading."""
    for other in recipe.parent.iterdir():
        if other.name != recipe.name:
            text = re.sub(rf"^## {re.escape(other.name)}\n.*?(?=^## |^<!-- |\Z)", "", text, flags=re.M | re.S)
    return text


def place(recipe: Path, page: str, anchors: dict[str, str], there: str, heading: str) -> str | None:
    """Where a link of `page`, a name in the zip, leads; None if the zip has no such file."""
    folder = f"recipes/{recipe.name}/"
    if there in anchors:
        return ("" if page == NAME else posixpath.relpath(NAME, posixpath.dirname(page) or ".")) + (
            heading or f"#{anchors[there]}"
        )
    if there.startswith(folder) or there == "LICENSE":
        return posixpath.relpath(there.removeprefix(folder), posixpath.dirname(page) or ".") + heading
    return None


def in_zip(text: str, source: str, page: str, recipe: Path) -> str:
    """The text of the file `source` of the repository with its links as they are in the zip's file `page`."""
    anchors = {path: slug(title(content)) for path, content in guide_pages(recipe).items()}
    root = recipe.parents[1]
    linked = relinked(text, source, partial(place, recipe, page, anchors), written_address(root))
    return with_address(linked, root)


def guide(recipe: Path) -> str:
    """The whole file. Raises ValueError if two headings have one name, or a key has no comment."""
    parts = []
    for source, text in guide_pages(recipe).items():
        lower = FENCE_OR_HEADING.sub(lambda match: match[0] if match[1] else f"#{match[0]}", TYPED_IN.sub("", text))
        parts.append(in_zip(lower, source, NAME, recipe).strip() + "\n")
    address = with_address(written_address(recipe.parents[1]), recipe.parents[1])
    first = f"# Guide to {recipe.name}\nWhat holds for all recipes, and this one's keys. The repository: <{address}>\n"
    contents = "".join(f"- [{title(part)}](#{slug(title(part))})\n" for part in parts)
    whole = "\n".join([first, contents, *parts])
    if twice := [name for name, count in Counter(headings(whole)).items() if count > 1]:
        raise ValueError(f"{NAME}: more than one heading is #{', #'.join(twice)}; links could not tell them apart.")
    return whole
