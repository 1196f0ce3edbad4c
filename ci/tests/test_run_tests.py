# SPDX-License-Identifier: Apache-2.0
"""bash ci/test.sh runs what it is asked for, goes on after a failure, and says at the end what came of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


CI = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CI))

from environments import environments, main  # noqa: E402


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path):
    """A repository of two recipes, one of which fails a test, with environments that are there already."""
    for name in ("test.sh", "run_tests.py", "environments.py", "environment.sh", "repository.py"):
        (tmp_path / "ci").mkdir(exist_ok=True)
        shutil.copy(CI / name, tmp_path / "ci")
    write(tmp_path, {
        "ci/requirements.txt": "",
        "ci/lint.sh": "echo lint was here; echo 'failed: ruff; to fix it: ruff format .' >&2; exit 1\n",
        ".gitignore": ".venv/\n__pycache__/\n",
        "recipes/good/requirements.txt": "torch==2\n", "recipes/other/requirements.txt": "torch==1\n",
        "recipes/esm2_native_te/requirements.txt": "torch==2\n", "docs/requirements.txt": "",
        "recipes/good/tests/common/test_room.py": "def test_c():\n    pass\n",
        "recipes/good/test_a.py": "import os\ndef test_a():\n    assert os.environ['STUB'] == 'test'\n",
        "recipes/other/test_a.py": "import os\ndef test_b():\n    assert os.environ['STUB'] == 'test-other'\n"
                                   "def test_wrong():\n    assert False\n",
        "ci/tests/test_c.py": "def test_c():\n    pass\n", "ci/benchmarks/a.py": "",
        "ci/run_docs.py": "import sys\nprint('pages of', sys.argv[1:])\n", "ci/build_zips.py": "",
        "slurm/test.sh": "exit 77\n",
    })  # fmt: skip
    for name in ("test", "test-other", "docs"):
        write(tmp_path, {f".venv/{name}/bin/activate": f"export STUB={name}\nmkdocs() {{ :; }}\n"})
        files = f"$({sys.executable} ci/environments.py recipes/{'other' if 'other' in name else 'good'})"
        files = "$(set -- " + files + "; shift; echo $*)" if name != "docs" else "docs/requirements.txt"
        stamp = f"{{ {sys.executable} --version; cat {files} | cksum; }} > .venv/{name}/stamp"
        subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def run(root, *arguments):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PYTHON": sys.executable, "PATH": path, "GITHUB_STEP_SUMMARY": str(root / "summary.md")}
    done = subprocess.run(["bash", "ci/test.sh", *arguments], cwd=root, env=env, capture_output=True, text=True)
    table = dict(re.findall(r"^\| (\S.*?) \| [\d.]+ \| (.*?) \|$", done.stdout, re.MULTILINE))
    return done, {part: result for part, result in table.items() if part != "all"}


def test_all_of_it(root):
    done, table = run(root)
    assert table == {
        "lint": "FAILED", "tables in docs": "FAILED", "recipes/esm2_native_te": "no test selected",
        "recipes/good": "ok", "recipes/good/tests/common": "ok", "recipes/other": "FAILED",
        "ci/benchmarks": "no test selected", "ci/tests": "ok",
        "commands in docs (test)": "ok", "commands in docs (test-other)": "ok", "Slurm": "left out", "site": "ok",
        "zips": "ok", "environments": "ok",
    }, done.stdout + done.stderr  # fmt: skip
    end = done.stdout.partition("| all |")[2]
    assert "lint failed:\n  failed: ruff; to fix it: ruff format .\n" in end
    assert re.search(r"recipes/other failed:\n  FAILED test_a.py::test_wrong.*\n", end), end
    assert done.returncode == 1 and "lint was here" in done.stdout
    assert "pages of ['recipes/esm2_native_te', 'recipes/good', 'docs', '.']\n" in done.stdout
    assert "pages of ['recipes/other']\n" in done.stdout
    assert (root / "summary.md").read_text().splitlines()[-1].startswith("| all |")


def test_one_folder(root):
    done, table = run(root, "./recipes/good/")
    assert table == {"environments": "ok", "recipes/good": "ok"} and done.returncode == 0
    done, table = run(root, "recipes/good", str(root / "recipes/other"), "-k", "not wrong")
    assert {*table} == {"environments", "recipes/good", "recipes/good/tests/common", "recipes/other"}
    assert {*table.values()} == {"ok"} and done.returncode == 0


def test_options_of_pytest_alone(root):
    _, table = run(root, "-k", "test_b or test_c")
    assert table["recipes/good"] == "no test selected"
    assert table["recipes/other"] == table["recipes/good/tests/common"] == table["ci/tests"] == "ok"
    assert "Slurm" not in table and "lint" in table


def test_the_repository_alone(root):
    _, table = run(root, "--only-repository")
    assert "ci/tests" in table and "zips" in table and not any(name.startswith("recipes/") for name in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/none"], "recipes/none is no recipe or model; there are recipes/esm2_native_te, recipes/good,"),
        (["ci"], "ci is no recipe or model"),
        (["--only-repository", "recipes/good"], "--only-repository tests no folder; leave it or recipes/good out."),
    ],
)
def test_mistakes(root, arguments, message):
    done, _ = run(root, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_without_git(root):
    shutil.rmtree(root / ".git")
    done, table = run(root)
    assert done.returncode != 0 and "this needs a git clone" in done.stderr and not table


@pytest.mark.parametrize(
    ("pins", "groups"),
    [
        ({"recipes/a": "x==1", "recipes/b": "x==1\ny==2", "models/c": "y==2\nz"},
         {"test": ["recipes/a", "recipes/b", "models/c"]}),
        ({"recipes/a": "x==1", "recipes/b": "x==2", "recipes/c": "X==1 # why"},
         {"test": ["recipes/a", "recipes/c"], "test-b": ["recipes/b"]}),
        ({"recipes/a": "x-y[z]==1", "models/b": "x_y==2"}, {"test": ["recipes/a"], "test-b": ["models/b"]}),
        ({"recipes/a": "x==1", "models/b": "x>=1"}, {"test": ["recipes/a", "models/b"]}),
    ],
)  # fmt: skip
def test_an_environment_for_each_set_of_pins(tmp_path, pins, groups, capsys):
    write(tmp_path, {f"{folder}/requirements.txt": text for folder, text in pins.items()})
    assert environments(tmp_path) == groups
    for name, folders in groups.items():
        assert main([f"./{folders[0]}/"], tmp_path) == 0
        words = capsys.readouterr().out.split()
        assert words == [name, *(f"{folder}/requirements.txt" for folder in folders), "ci/requirements.txt"]
    assert main(["recipes/none"], tmp_path) == 2


def test_here_without_an_environment_names_what_to_do(tmp_path):
    command = [sys.executable, "-S", str(CI / "scripts" / "recipes_local_test.py"), "--here", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        f"has no pytest. Activate an environment that has it (pip install -r {tmp_path}/requirements.txt"
        in done.stderr
    )
