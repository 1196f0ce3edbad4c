# SPDX-License-Identifier: Apache-2.0
"""An import that leaves its room is found, wherever it stands, and what is allowed is not."""

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

from check_imports import main, rules  # noqa: E402


import_problems = rules(ROOT).import_problems
ROOM = "; a file in {} imports the standard library, pinned packages{} and common/ only."
IN_COMMON, IN_TOKENS = ROOM.format("common/", ""), ROOM.format("tokens/", ", tokens/")


@pytest.fixture
def recipe(tmp_path):
    """A small one in which every file imports what it may."""
    files = {
        "requirements.txt": "# a comment\npytest==9.2.0\nhydra-core==1.3.8\n", "requirements-te.txt": "numpy==2.4.6\n",
        "train_ddp.py": "from common import RECIPE, quiet\nfrom tokens import layers\nimport dataset\n",
        "dataset.py": "import hydra\nimport tokens.layers\nfrom common.files import read\n",
        "common/__init__.py": "import pathlib\nRECIPE = 1\n",
        "common/quiet.py": "import pytest\nfrom common import RECIPE\n",
        "common/files.py": "from common import quiet\n", "common/new.py": "",
        "common/contract/__init__.py": "", "common/contract/running.py": "from common.contract import ranks\n",
        "common/contract/ranks.py": "from common.files import read\n",
        "tokens/__init__.py": "", "tokens/layers.py": "import numpy\nfrom common.files import read\n",
        "tokens/kernels.py": "from tokens.layers import a\n", "atoms/__init__.py": "", "atoms/graph.py": "",
        "tests/test_a.py": "import helper\nfrom make import b\nfrom common.contract.running import c\n",
        "tests/deep/test_b.py": "import helper\nimport dataset\n", "tests/helper.py": "", "data/make.py": "",
        "outputs/x.py": "import no\n",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "recipes/one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "recipes/one"


def test_all_is_well(recipe):
    assert import_problems(recipe) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("common/new.py", "import os\nimport dataset\n", "common/new.py:2: imports dataset" + IN_COMMON),
        ("common/new.py", "from tokens.layers import a, b\n", ":1: imports a, b of tokens.layers" + IN_COMMON),
        ("common/new.py", "def f():\n    from tokens import layers\n", ":2: imports layers of tokens" + IN_COMMON),
        ("common/new.py", "x = importlib.import_module('dataset')\n", ":1: imports dataset" + IN_COMMON),
        ("common/contract/ranks.py", "import train_ddp\n", "ranks.py:1: imports train_ddp" + IN_COMMON),
        ("tokens/kernels.py", "import dataset\n", "tokens/kernels.py:1: imports dataset" + IN_TOKENS),
        ("tokens/layers.py", "from atoms.graph import a\n", "imports a of atoms.graph" + IN_TOKENS),
        ("common/new.py", "import torch\n", "new.py:1: imports torch, which no line of requirements*.txt gives."),
        ("tests/test_a.py", "import torch.nn\n", "test_a.py:1: imports torch.nn, which no line of"),
        ("dataset.py", "from .common import quiet\n", "dataset.py:1: a relative import; name the module"),
        ("common/files.py", "from . import quiet\n", "common/files.py:1: a relative import"),
        ("dataset.py", "import tests.helper\n", "dataset.py:1: imports tests.helper; nothing imports tests."),
        ("dataset.py", "from tests import helper\n", "imports helper of tests; nothing imports tests."),
        ("dataset.py", "import helper\n", "dataset.py:1: imports helper; there is no such file here"),
        ("data/make.py", "import helper\n", "data/make.py:1: imports helper; there is no such file here"),
        ("dataset.py", "from common import gone\n", None),  # a name of common/__init__.py, for all that can be seen
        ("dataset.py", "from common.gone import a\n", "imports a of common.gone; there is no such file here"),
        ("dataset.py", "from common.contract import ranks\n", "common/contract/ is for tests only."),
        ("requirements.txt", "pytest>=9\nhydra-core==1.3.8\n", "requirements.txt:1: pytest has no version; pin it"),
        ("requirements.txt", "pytest==9\n", "dataset.py:1: imports hydra, which no line"),
    ],
)  # fmt: skip
def test_what_is_found(recipe, name, text, problem):
    (recipe / name).write_text(text)
    found = import_problems(recipe)
    assert len(found) == (problem is not None) and all(problem in one for one in found), found


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        (
            {"common/quiet.py": "import os\nfrom common.files import read\n"},
            "common/files.py:1 imports common.quiet, common/quiet.py:2 imports common.files: a circle;",
        ),
        (
            {"common/__init__.py": "from common import files\nRECIPE = 1\n"},
            "common/__init__.py:1 imports common.files, common/files.py:1 imports common.quiet, "
            "common/quiet.py:2 imports common: a circle;",
        ),
        ({"dataset.py": "import train_ddp\n"}, "dataset.py:1 imports train_ddp, train_ddp.py:3 imports dataset: a"),
        ({"dataset.py": "if True:\n    class A:\n        import train_ddp\n"}, "dataset.py:3 imports train_ddp"),
        ({"dataset.py": "def f():\n    import train_ddp\n"}, None),
        ({"dataset.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import train_ddp\n"}, None),
    ],
)
def test_circles(recipe, files, circle):
    for name, text in files.items():
        (recipe / name).write_text(text)
    found = import_problems(recipe)
    assert len(found) == (circle is not None) and all(circle in one for one in found), found


def test_a_model_needs_the_packages_of_what_it_loads_only(recipe):
    """Its copy of `common/` has files for trainers too; these are held to their packages in the recipes."""
    (recipe / "train_ddp.py").unlink()
    (recipe / "requirements.txt").write_text("pytest\nnumpy>=2\n")
    (recipe / "dataset.py").write_text("from tokens import layers\n")
    (recipe / "common/trainer.py").write_text("import hydra\n")
    assert import_problems(recipe) == []
    (recipe / "common/files.py").write_text("import hydra\n")
    (found,) = import_problems(recipe)
    assert "common/files.py:1: imports hydra, which no line" in found


def test_the_command(recipe, tmp_path, capsys):
    contract = recipe / "common/contract/imports.py"
    contract.write_text((next(ROOT.glob("recipes/*/common/contract/imports.py"))).read_text())
    assert main([], tmp_path) == 0
    (recipe / "common/files.py").write_text("import dataset\n")
    assert main([], tmp_path) == 1 and main([str(recipe)], tmp_path) == 1
    assert capsys.readouterr().err.startswith("error: recipes/one/common/files.py:1: imports dataset;")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)], tmp_path)
    assert "is no recipe or model: it has no requirements.txt" in capsys.readouterr().err


def test_no_file_of_a_model_is_long():
    """Those of recipes are held to it by common/contract/test_source.py."""
    files = [path for path in ROOT.glob("models/*/**/*.py") if "tests" not in path.parts and path.stem != "layers_cpp"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: n for name, n in lengths.items() if n > 400}
