# SPDX-License-Identifier: Apache-2.0
"""Pages made from files of the repository, so that there is no second copy: READMEs and the papers at the top."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
PAPERS = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
API = (
    "dataset", "epoch_plan", "collator", "modeling_esm2", "layers", "context_parallel", "precision", "quant_stats",
    "distributed", "checkpoint", "export", "scheduler", "validation", "anomalies", "perf_logger", "build_model",
    "convert",
)  # fmt: skip


def pages() -> dict[str, str]:
    """Which file of the repository becomes which page."""
    found = dict(PAPERS)
    for folder in sorted([*ROOT.glob("recipes/*"), *ROOT.glob("models/*")]):
        if (folder / "README.md").is_file():
            found[f"{folder.parent.name}/{folder.name}/README.md"] = f"{folder.parent.name}/{folder.name}.md"
    return found


def relinked(text: str, source: str, page: str) -> str:
    """A file's text with its links as they are on the site; what the site does not have is told by its path."""
    known = pages()
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in (".md", ".png", ".svg", ".json"):
            known[str(path.relative_to(ROOT))] = str(path.relative_to(ROOT / "docs"))
    known["README.md"] = "index.md"

    def replace(match: re.Match) -> str:
        words, target = match.groups()
        path, hash_, heading = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match.group()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if there in known:
            # The first page is not the README: its headings are others.
            anchor = hash_ + heading if there != "README.md" else ""
            return f"{words}({posixpath.relpath(known[there], posixpath.dirname(page) or '.')}{anchor})"
        if words.startswith("!") or there.endswith("releases"):  # those are the forge's own pages
            return words.strip("[]")
        return f"{words[1:-1]} (`{there}`)"

    return LINK.sub(replace, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A new recipe or model is in the navigation by itself."""
    (recipes,) = (entry["Recipes"] for entry in config.nav if "Recipes" in entry)
    known = {page for entry in recipes for page in entry.values()}
    for source, page in pages().items():
        if source.endswith("/README.md") and page not in known:
            title = (ROOT / source).read_text().splitlines()[0].lstrip("# ")
            recipes.append({title: page})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for source, page in pages().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    reference = "# Python\nThe files of `recipes/esm2_native_te`, as far as others may want to call them.\n\n"
    files.append(
        File.generated(config, "reference.md", content=reference + "".join(f"::: {name}\n\n" for name in API))
    )
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on the site."""
    made = {made_page: source for source, made_page in pages().items()}
    here = page.file.src_uri
    return relinked(markdown, made.get(here, f"docs/{here}"), here)
