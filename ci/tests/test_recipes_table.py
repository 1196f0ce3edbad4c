# SPDX-License-Identifier: Apache-2.0
"""The table of recipes is that of the folders, in the README and on the first page."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recipes_table


@pytest.fixture
def repository(tmp_path):
    for name, text in {
        "b": "# B, plain\n\nTrain [B](b.md), of v1.2 too,\nhere: and more.\n",
        "a": "# A\n\nDo A. Or not.\n",
    }.items():
        (tmp_path / "recipes" / name).mkdir(parents=True)
        (tmp_path / "recipes" / name / "README.md").write_text(text)
    (tmp_path / "docs").mkdir()
    for page in recipes_table.PAGES:
        (tmp_path / page).write_text(f"above\n{recipes_table.BEGIN}old\n{recipes_table.END}\nbelow\n")
    return tmp_path


def test_it_follows_the_folders(repository, capsys):
    assert recipes_table.main(["--check"], repository) == 1
    assert "README.md: its table of recipes" in capsys.readouterr().out
    assert recipes_table.main([], repository) == 0 and recipes_table.main(["--check"], repository) == 0
    text = (repository / "docs/index.md").read_text()
    assert (
        "| [A](../recipes/a/README.md) | Do A |\n| [B](../recipes/b/README.md) | Train B, of v1.2 too, here |\n"
        in text
    )
    assert "old" not in text and text.startswith("above\n") and text.endswith("\nbelow\n")


def test_a_page_without_a_place(repository):
    (repository / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the table"):
        recipes_table.main([], repository)
