# SPDX-License-Identifier: Apache-2.0
"""The same tree gives the same bytes, whole, with the guides, and nothing that does not belong."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import build_zips  # noqa: E402
import guide  # noqa: E402
from check_files import bad_links  # noqa: E402


BATCHES = """# Batches
<!-- typed in recipes/small -->

[keys](../recipes/small/hydra_config/defaults.yaml), [here](#a-step),
[saved](checkpoints.md), [start](../recipes/small/README.md)
## A step
![picture](images/a.png) [what was tried](log.md#packing)
```sh
# a comment
python train.py
```
"""
HARDWARE = """# What has been run where
<!-- hardware: begin -->
## other
| nothing | of small |
## small
| run | on CPU |
<!-- hardware: end -->
"""
README = """# Small, a recipe
read [me](../../docs/a.md#b) and [this](slurm.sh), [ci/lint.sh](../../ci/lint.sh), [releases](../../../../releases)
[batches](../../docs/batches.md), [one](../../docs/batches.md#a-step)
[keys](hydra_config/defaults.yaml), [licence](../../LICENSE)
"""


@pytest.fixture
def repository(tmp_path):
    """A small one with a recipe, a script and a cache."""
    recipe = tmp_path / "repository" / "recipes" / "small"
    (recipe / "__pycache__").mkdir(parents=True)
    (recipe / "__pycache__" / "train.pyc").write_text("bytes")
    (recipe / "README.md").write_text(README)
    (recipe / "hydra_config").mkdir()
    (recipe / "hydra_config" / "defaults.yaml").write_text("# ---- model\nsize: ???  # how large\n")
    (recipe / "data").mkdir()
    (recipe / "data" / "README.md").write_text("# Data\n[how it is read](../../../docs/batches.md)\n")
    (recipe / "requirements.txt").write_text("torch\n")
    (recipe / "slurm.sh").write_text("#!/bin/sh\n")
    (recipe / "slurm.sh").chmod(0o755)
    root = tmp_path / "repository"
    (root / "recipes" / "other").mkdir()
    (root / "recipes" / "other" / "README.md").write_text("# Other\n")
    (root / "docs").mkdir()
    for name, text in {"batches": BATCHES, "checkpoints": "# Checkpoints\n", "hardware": HARDWARE}.items():
        (root / "docs" / f"{name}.md").write_text(text)
    (root / "LICENSE").write_text("licence\n")
    (root / "mkdocs.yml").write_text('repo_url: !ENV [REPOSITORY_URL, "https://github.com/OWNER/small"]\n')
    (root / ".gitignore").write_text("__pycache__/\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "-C", root, "add", "-A"], check=True)
    return root


def test_same_bytes_whatever_the_times_and_the_place(repository, tmp_path):
    first = build_zips.build(repository / "recipes/small", tmp_path, repository / "LICENSE").read_bytes()
    elsewhere = shutil.copytree(repository, tmp_path / "elsewhere")
    for path in elsewhere.rglob("*"):
        os.utime(path, (0, 2_000_000_000))
    (elsewhere / "recipes/small/slurm.sh").chmod(0o644)  # a file system without modes
    (tmp_path / "out").mkdir()
    again = build_zips.build(elsewhere / "recipes/small", tmp_path / "out", elsewhere / "LICENSE")
    assert again.read_bytes() == first


def test_what_is_in_it(repository, tmp_path):
    path = build_zips.build(repository / "recipes/small", tmp_path, repository / "LICENSE")
    assert zipfile.ZipFile(path).namelist() == [
        "small/GUIDE.md", "small/LICENSE", "small/README.md", "small/data/README.md",
        "small/hydra_config/defaults.yaml", "small/requirements.txt", "small/slurm.sh",
    ]  # fmt: skip
    subprocess.run(["python3", "-m", "zipfile", "-t", path], check=True)
    assert zipfile.ZipFile(path).read("small/README.md").decode() == (
        "# Small, a recipe\nread [me](https://github.com/OWNER/small/blob/main/docs/a.md#b) and [this](slurm.sh), "
        "[ci/lint.sh](https://github.com/OWNER/small/blob/main/ci/lint.sh), "
        "[releases](https://github.com/OWNER/small/releases)\n"
        "[batches](GUIDE.md#batches), [one](GUIDE.md#a-step)\n[keys](GUIDE.md#every-key-small), [licence](LICENSE)\n"
    )
    assert zipfile.ZipFile(path).read("small/data/README.md").decode().endswith("(../GUIDE.md#batches)\n")
    modes = {entry.filename: entry.external_attr >> 16 for entry in zipfile.ZipFile(path).infolist()}
    assert modes["small/slurm.sh"] & 0o100 and not modes["small/README.md"] & 0o100


def test_the_guide(repository):
    text = guide.guide(repository / "recipes/small")
    assert text.startswith("# Guide to small\n")
    assert "- [Batches](#batches)\n- [Checkpoints](#checkpoints)\n" in text
    assert (
        "## Batches\n[keys](#every-key-small), [here](#a-step),\n[saved](#checkpoints), [start](README.md)\n" in text
    )
    assert (
        "### A step\n[picture](https://github.com/OWNER/small/blob/main/docs/images/a.png) "
        "[what was tried](https://github.com/OWNER/small/blob/main/docs/log.md#packing)\n```sh\n# a comment\n"
    ) in text
    assert "### small\n| run | on CPU |" in text and "nothing" not in text
    assert "\n## Every key: Small\n" in text and "| `size` | `???` | how large |" in text


def test_the_address_that_ci_names(repository, monkeypatch):
    assert "The repository: <https://github.com/OWNER/small>\n" in guide.guide(repository / "recipes/small")
    monkeypatch.setenv("REPOSITORY_URL", "https://github.com/lab/small")
    assert "The repository: <https://github.com/lab/small>\n" in guide.guide(repository / "recipes/small")


def test_the_guide_has_all_of_its_pages():
    assert [name for name in guide.PAGES if not (ROOT / "docs" / f"{name}.md").is_file()] == []


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("docs/checkpoints.md", "# Checkpoints", "# Checkpoints\n## A step", "more than one heading is #a-step"),
        ("recipes/small/hydra_config/defaults.yaml", "  # how large", "", "size has no comment"),
    ],
)
def test_a_guide_that_cannot_be(repository, tmp_path, name, old, new, told):
    page = repository / name
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(SystemExit) as stopped:
        build_zips.main(["--out", str(tmp_path / "out"), str(repository / "recipes/small")])
    assert told in str(stopped.value) and not (tmp_path / "out").exists()


def test_every_recipe_has_one_and_the_sums_agree(tmp_path, capsys):
    assert build_zips.main(["--out", str(tmp_path)]) == 0
    zips = {path.stem for path in tmp_path.glob("*.zip")}
    assert zips == {path.parent.name for path in ROOT.glob("recipes/*/README.md")}
    for line in (tmp_path / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
        names = zipfile.ZipFile(tmp_path / name).namelist()
        assert not [n for n in names if "__pycache__" in n or "outputs/" in n or n.startswith("/") or ".." in n]
        folder = name.removesuffix(".zip")
        assert {f"{folder}/{n}" for n in ("README.md", "GUIDE.md", "LICENSE", "requirements.txt")} <= set(names)
        zipfile.ZipFile(tmp_path / name).extractall(tmp_path)
        for page in (tmp_path / folder).rglob("*.md"):
            assert bad_links(page) == [], page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "new.fasta").write_text(">a\nM\n"), "git does not know new.fasta: git add them or"),
        (lambda folder: (folder / "README.md").unlink(), "no recipe, it has no README.md"),
        (lambda folder: (folder / "requirements.txt").unlink(), "no recipe, it has no requirements.txt"),
        (lambda folder: (folder / "slurm.sh").unlink() or (folder / "slurm.sh").symlink_to("README.md"),
         "slurm.sh: symbolic links cannot be in a zip"),
        (shutil.rmtree, "no such folder"),
        (lambda folder: shutil.rmtree(folder.parents[1] / ".git"), "is in no git repository"),
    ],
)  # fmt: skip
def test_what_is_refused(repository, tmp_path, change, told):
    change(repository / "recipes/small")
    with pytest.raises(SystemExit) as stopped:
        build_zips.main(["--out", str(tmp_path / "out"), str(repository / "recipes/small")])
    assert told in str(stopped.value) and not (tmp_path / "out").exists()


def test_what_runs_leave_is_no_recipe(repository, monkeypatch):
    (repository / "recipes/gone/__pycache__").mkdir(parents=True)
    (repository / "recipes/gone/__pycache__/a.pyc").write_text("bytes")
    monkeypatch.setattr(build_zips, "ROOT", repository)
    assert build_zips.recipes() == [repository / "recipes/other", repository / "recipes/small"]
