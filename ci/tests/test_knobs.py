# SPDX-License-Identifier: Apache-2.0
"""The README's table of keys is written, checked, and refused where it would be wrong without a word."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from knobs import BEGIN, END, main


DEFAULTS = """defaults:
  - _self_

# ---- model
size: ???       # how large
part:           # some of it
  depth: 3      # layers

hydra:
  run: {dir: .}
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "recipes/one/hydra_config").mkdir(parents=True)
    (tmp_path / "recipes/one/hydra_config/defaults.yaml").write_text(DEFAULTS)
    (tmp_path / "recipes/one/README.md").write_text(f"# One\n{BEGIN}\n{END}\nend\n")
    return tmp_path


def test_written_and_checked(root, capsys):
    readme = root / "recipes/one/README.md"
    assert main(["--check"], root) == 1 and "its table of keys is old" in capsys.readouterr().err
    assert main([], root) == 0 and main(["--check"], root) == 0
    assert "| `size` | `???` | how large |\n| `part` |  | *some of it* |\n| `part.depth` | `3` | layers |" in (
        readme.read_text()
    )
    assert readme.read_text().startswith("# One\n") and readme.read_text().endswith("\nend\n")


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("README.md", END, "", "README.md: there is no one pair of the lines"),
        ("README.md", f"{BEGIN}\n{END}", f"{END}\n{BEGIN}", "README.md: there is no one pair of the lines"),
        ("README.md", END, f"{END}\n{BEGIN}\n{END}", "README.md: there is no one pair of the lines"),
        ("hydra_config/defaults.yaml", "  # layers", "", "defaults.yaml: part.depth has no comment"),
        ("hydra_config/defaults.yaml", "# ---- model\n", "", "defaults.yaml: size stands before the first line"),
    ],
)
def test_what_is_refused(root, name, old, new, told, capsys):
    path, readme = root / "recipes/one" / name, root / "recipes/one/README.md"
    path.write_text(path.read_text().replace(old, new))
    before = readme.read_text()
    for arguments in ([], ["--check"]):
        assert main(arguments, root) == 1
        assert told in capsys.readouterr().err and readme.read_text() == before


def test_an_unknown_option_writes_nothing(root):
    before = (root / "recipes/one/README.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["--chekc"], root)
    assert (root / "recipes/one/README.md").read_text() == before
