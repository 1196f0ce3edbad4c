# SPDX-License-Identifier: Apache-2.0
"""The page of a recipe's keys has each with its comment, and a key without one is refused."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from knobs import DEFAULTS, main, page


TEXT = """defaults:
  - _self_

# ---- model
size: ???       # how large
part:           # some of it
  depth: 3      # layers
  widths: null  # by name, e.g. {a: 0.1}

hydra:
  run: {dir: .}
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "recipes/one/hydra_config").mkdir(parents=True)
    (tmp_path / "recipes/one" / DEFAULTS).write_text(TEXT)
    (tmp_path / "recipes/one/README.md").write_text("# One, a recipe\n")
    return tmp_path


def test_printed_and_checked(root, capsys):
    assert main(["--check"], root) == 0 and capsys.readouterr().out == ""
    assert main([str(root / "recipes/one")]) == 0
    text = capsys.readouterr().out
    assert text == page(root / "recipes/one") and text.startswith("# Every key: One\n")
    assert "| `size` | `???` | how large |\n| `part` |  | *some of it* |\n| `part.depth` | `3` | layers |\n" in text
    assert "| `part.widths` | `null` | by name, e.g. `{a: 0.1}` |" in text  # no attributes of the cell
    assert "hydra" not in text.partition("**Model**")[2]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  # layers", "", "defaults.yaml: part.depth has no comment"),
        ("# ---- model\n", "", "defaults.yaml: size stands before the first line"),
    ],
)
def test_what_is_refused(root, old, new, told, capsys):
    path = root / "recipes/one" / DEFAULTS
    path.write_text(TEXT.replace(old, new))
    for arguments in ([str(root / "recipes/one")], ["--check"]):
        assert main(arguments, root) == 1
        said = capsys.readouterr()
        assert told in said.err and said.out == ""


@pytest.mark.parametrize("arguments", [["--chekc"], [], ["recipes/none"]])
def test_a_mistake_on_the_command_line(root, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments, root)
