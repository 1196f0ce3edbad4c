# SPDX-License-Identifier: Apache-2.0
"""Links that lead nowhere and files that do not parse are noticed."""

import subprocess
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from check_files import problems
from pages import headings, slug


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# Top\n## What *holds*, and why?\n[a](docs/a.md#one-two) [b](#what-holds-and-why)\n"
    )
    (tmp_path / "docs" / "a.md").write_text("# One two\n[up](../README.md) [site](https://nowhere.invalid/x#y)\n")
    (tmp_path / "good.json").write_text('{"a": 1}')
    (tmp_path / "good.yaml").write_text("a: !!python/name:x.y\nb: ${c}\n")
    (tmp_path / "mkdocs.yml").write_text('repo_url: !ENV [REPOSITORY_URL, "https://github.com/lab/us"]\n')
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def test_all_is_well(root):
    assert problems(root) == []


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("b.md", "[x](docs/none.md)", "b.md: docs/none.md: no such file"),
        ("b.md", "![x](none.png)", "b.md: none.png: no such file"),
        ("b.md", "[x](docs/a.md#three)", "docs/a.md#three: no such heading"),
        ("b.md", "clone https://github.com/lab/us or https://github.com/a/us", "/a/us, but mkdocs.yml has"),
        ("b.json", "{'a': 1}", "b.json: Expecting property name"),
        ("b.yaml", "a: [1\n", "b.yaml: while parsing"),
        ("b.toml", "a = \n", "b.toml: Invalid value"),
        ("CITATION.cff", "a: b: c\n", "CITATION.cff: mapping values"),
    ],
)
def test_what_is_noticed(root, name, text, told):
    (root / name).write_text(text)
    (found,) = problems(root)
    assert told in found


def test_code_is_not_read_as_links_or_headings(root):
    (root / "b.md").write_text("# Real\n```sh\n# not a heading\n[x](none.md)\n```\n")
    assert problems(root) == [] and headings((root / "b.md").read_text()) == ["real"]


def test_names_of_headings():
    assert slug("# Coming from [elsewhere](x.md): `a_b`".lstrip("#")) == "coming-from-elsewhere-a_b"
