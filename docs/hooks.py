# SPDX-License-Identifier: Apache-2.0
"""Pages made from files of the repository, so that there is no second copy.

They are READMEs, the papers at the top, the keys of each recipe, and the reference of its Python files. A new recipe
has them by itself, and so has a folder that recipes share: one with an __init__.py.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "ci"))

import knobs  # noqa: E402
from pages import relinked, title, with_address, written_address  # noqa: E402


PAPERS = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}


def recipes() -> list[Path]:
    """Their folders."""
    return sorted(path.parent for path in ROOT.glob("recipes/*/README.md"))


def short_title(folder: Path) -> str:
    """What a README calls its recipe, up to a comma."""
    return title((folder / "README.md").read_text()).partition(",")[0]


def copied() -> dict[str, str]:
    """Which file of the repository becomes which page."""
    found = dict(PAPERS)
    for folder in [*recipes(), *sorted(path.parent for path in ROOT.glob("models/*/README.md"))]:
        found[f"{folder.parent.name}/{folder.name}/README.md"] = f"{folder.parent.name}/{folder.name}.md"
    return found


def keys() -> dict[str, Path]:
    """The page of each recipe's keys, and the recipe."""
    return {f"keys/{recipe.name}.md": recipe for recipe in recipes() if (recipe / knobs.DEFAULTS).is_file()}


def references() -> dict[str, tuple[str, list[Path]]]:
    """Pages of Python files, with their titles: one for each folder that recipes share, one for each recipe."""
    shared = {path.parent.name: path.parent for path in ROOT.glob("recipes/*/*/__init__.py")}
    found = {f"reference/{name}.md": (f"{name}/", shared[name]) for name in sorted(shared) if name != "tests"}
    found |= {f"reference/{recipe.name}.md": (short_title(recipe), recipe) for recipe in recipes()}
    return {
        page: (words, [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"])
        for page, (words, folder) in found.items()
    }


def reference(words: str, files: list[Path]) -> str:
    """The text of such a page."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    # Guides come first in what a search finds.
    meta = "---\nsearch:\n  boost: 0.05\n---\n"
    return f"{meta}# Python: {words}\nThe files of `{files[0].parent.relative_to(ROOT)}`.\n\n" + "".join(
        f"::: {name}\n\n" for name in names
    )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """What is made is in the navigation by itself."""
    parts = {name: entries for part in config.nav if isinstance(part, dict) for name, entries in part.items()}
    parts["Recipes"] += [page for source, page in copied().items() if source.endswith("/README.md")]
    parts["Reference"][:0] = [*keys(), *references()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made; who edits one edits what it is made from."""
    made = {page: ((ROOT / source).read_text(), source) for source, page in copied().items()}
    for page, recipe in keys().items():
        made[page] = knobs.page(recipe), f"recipes/{recipe.name}/{knobs.DEFAULTS}"
    made |= {page: (reference(words, paths), None) for page, (words, paths) in references().items()}
    for page, (text, source) in made.items():
        file = File.generated(config, page, content=text)
        if source:
            file.edit_uri = f"../{source}"
        files.append(file)
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on the site; what the site does not have is in the repository."""
    here, docs = page.file.src_uri, ROOT / "docs"
    known = {
        f"docs/{path.relative_to(docs)}": str(path.relative_to(docs))
        for path in docs.rglob("*") if path.suffix in (".md", ".png", ".svg", ".json")
    }  # fmt: skip
    known |= copied() | {f"recipes/{recipe.name}/{knobs.DEFAULTS}": made for made, recipe in keys().items()}
    known["README.md"] = "index.md"
    source = {made: path for path, made in known.items() if path != "README.md"}.get(here, f"docs/{here}")

    def place(there: str, heading: str) -> str | None:
        if there not in known:
            return None
        # The first page is not the README: its headings are others.
        heading = "" if there == "README.md" else heading
        return posixpath.relpath(known[there], posixpath.dirname(here) or ".") + heading

    return with_address(relinked(markdown, source, place, written_address(ROOT)), ROOT)


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """For phones: short cells and keys do not break, long keys between words, and a picture opens at its full size."""

    def cell(match: re.Match) -> str:
        words = re.sub(r"<[^>]+>", "", match[2])
        return f"<td{match[1]} data-short>{match[2]}</td>" if len(words) <= 28 else match[0]

    def key(match: re.Match) -> str:
        words = match[1]
        if len(words) <= 36:
            return f"<code data-short>{words}</code>"
        return "<code>" + re.sub(r"([._=/,])", r"\1<wbr>", words) + "</code>"

    html = re.sub(r"<code>([^<>\n]+)</code>", key, html)
    html = re.sub(r"<td((?: style=[^>]*)?)>(.*?)</td>", cell, html, flags=re.S)
    return re.sub(r'(<img [^>]*?src="([^"]+)"[^>]*>)', r'<a class="picture" href="\2">\1</a>', html)
