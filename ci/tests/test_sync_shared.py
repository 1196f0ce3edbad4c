# SPDX-License-Identifier: Apache-2.0
"""Copies that drift, in whatever way, are noticed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sync_shared import main, problems


LONG = "".join(f"line {i}\n" for i in range(20))


@pytest.fixture
def root(tmp_path):
    """Two recipes and a model that share a file and a folder."""
    files = {
        "ci/shared_files.txt": "# a comment\nlayers.py\nlong.py\nparts/\n", "models/one/long.py": LONG,
        "models/one/layers.py": "layers\n", "models/one/README.md": "one\n",
        "recipes/two/layers.py": "layers\n", "recipes/two/parts/a.py": "a\n", "recipes/two/parts/deep/b.py": "b\n",
        "recipes/three/parts/a.py": "a\n", "recipes/three/parts/deep/b.py": "b\n", "recipes/three/own.py": "own\n",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    commit(tmp_path)
    return tmp_path


def commit(root):
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all", "--no-verify"]):
        subprocess.run([*git, *words], check=True)


def test_all_is_well(root):
    assert problems(root) == [] and main([], root) == 0


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("recipes/two/layers.py", "other\n", "layers.py differs: models/one/layers.py, recipes/two/layers.py"),
        ("recipes/three/parts/deep/b.py", "other\n", "parts/deep/b.py differs"),
        (
            "recipes/three/parts/stale.py",
            "stale\n",
            "parts/ is shared as a whole, and recipes/two/parts lacks stale.py, which others have.",
        ),
        (
            "recipes/three/my_layers.py",
            "layers\n",
            "my_layers.py is a copy of the shared layers.py under another name",
        ),
        (
            "recipes/three/deep/layers.py",
            "older\n",
            "deep/layers.py has the name of the shared layers.py, and is not it",
        ),
        ("recipes/three/layers_old.py", "layers\n", "layers_old.py is a copy of the shared layers.py"),
        ("recipes/three/long_old.py", LONG.replace("7", "seven"), "long_old.py is a copy of the shared long.py"),
        ("models/one/own.py", "own\n", "models/one and recipes/three have the same own.py, which"),
        ("models/one/my_own.py", "own\n", "models/one and recipes/three have the same my_own.py as own.py, which"),
        ("ci/shared_files.txt", "layers.py\nlong.py\nparts/\ngone.py\n", "names gone.py, which no folder has"),
    ],
)
def test_what_is_noticed(root, path, text, message, capsys):
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(text)
    assert main([], root) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_one_folder_lacks(root):
    (root / "recipes/three/parts/a.py").unlink()
    (root / "recipes/two/parts/new.py").write_text("new\n")
    (root / "recipes/two/parts/deep/new.py").write_text("new\n")
    (found,) = problems(root)
    assert "recipes/three/parts lacks a.py, deep/new.py, new.py, which others have" in found


def test_what_git_ignores_does_not_count(root):
    (root / ".gitignore").write_text("__pycache__/\n")
    (root / "recipes/three/parts/__pycache__").mkdir()
    (root / "recipes/three/parts/__pycache__/a.pyc").write_text("bytes")
    assert problems(root) == []


@pytest.mark.parametrize("edited", ["recipes/two/layers.py", "recipes/three/parts/deep/b.py"])
def test_spreading_one_copy(root, edited, capsys):
    for text in ("new\n", "newer\n"):  # what it has spread itself it may overwrite
        (root / edited).write_text(text)
        assert main([str(root / edited)], root) == 0
        assert "wrote" in capsys.readouterr().out and problems(root) == []
        assert all(p.read_text() == text for p in root.glob(f"*/*/{'/'.join(edited.split('/')[2:])}"))


def test_spreading_a_folder(root, capsys):
    parts, copy = root / "recipes/two/parts", root / "recipes/three/parts"
    (parts / "a.py").write_text("new\n")
    (parts / "deep/b.py").unlink()
    (parts / "other").mkdir()
    (parts / "other/c.sh").write_text("added\n")
    (parts / "other/c.sh").chmod(0o755)
    assert main([str(parts)], root) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote recipes/three/parts/a.py", "wrote recipes/three/parts/other/c.sh",
        "removed recipes/three/parts/deep/b.py",
    ]  # fmt: skip
    assert sorted(path.name for path in copy.iterdir()) == ["a.py", "other"]  # an empty folder goes too
    assert (copy / "a.py").read_text() == "new\n" and (copy / "other/c.sh").stat().st_mode & 0o100
    assert not (root / "models/one/parts").exists()  # who has none of it gets none


def test_spreading_a_part_of_a_folder(root):
    for name in ("a.py", "deep/b.py", "deep/c.py"):
        (root / "recipes/two/parts" / name).write_text("new\n")
    assert main([str(root / "recipes/two/parts/deep")], root) == 1  # parts/a.py still differs
    assert (root / "recipes/three/parts/a.py").read_text() == "a\n"
    assert (root / "recipes/three/parts/deep/c.py").read_text() == "new\n"
    assert main([str(root / "recipes/two/parts/a.py")], root) == 0


def test_a_new_file_of_a_folder_is_spread_by_itself_too(root):
    (root / "recipes/two/parts/c.py").write_text("new\n")
    assert main([str(root / "recipes/two/parts/c.py")], root) == 0
    assert (root / "recipes/three/parts/c.py").read_text() == "new\n"


@pytest.mark.parametrize("change", ["a.py", "new.py", "ignored.log"])
def test_a_folder_is_not_spread_over_what_git_does_not_have(root, change, capsys):
    (root / ".gitignore").write_text("")
    if change == "ignored.log":
        (root / ".gitignore").write_text("recipes/three/*/ignored.log\n")
    commit(root)
    (root / "recipes/two/parts/deep/b.py").write_text("new\n")
    if change == "ignored.log":
        (root / "recipes/two/parts/ignored.log").write_text("another\n")
    (root / "recipes/three/parts" / change).write_text("mine\n")
    assert main([str(root / "recipes/two/parts")], root) == 2
    assert f"recipes/three/parts/{change} would lose a change that git does not have" in capsys.readouterr().err
    assert (root / "recipes/three/parts" / change).read_text() == "mine\n"
    assert (root / "recipes/three/parts/deep/b.py").read_text() == "b\n"  # nothing at all was written


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("recipes/three/own.py", "own.py is no copy of a file in ci/shared_files.txt."),
        ("recipes/three", "recipes/three is no shared folder; ci/shared_files.txt names parts/."),
        ("recipes/two/parts/gone.py", "to remove it from other copies, spread its folder: recipes/two/parts."),
        ("models/one/parts", "models/one/parts: no such file or folder."),
        ("ci/shared_files.txt", "shared_files.txt is no copy of a file"),
        ("../elsewhere", "elsewhere: no such file or folder."),
        ("..", "is no shared folder"),
        ("recipes/two/none.py", "none.py: no such file or folder."),
    ],
)  # fmt: skip
def test_what_cannot_be_spread(root, path, message, capsys):
    assert main([str(root / path)], root) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_folder_with_nothing_but_ignored_files_is_not_spread(root, capsys):
    (root / ".gitignore").write_text("*.pyc\n")
    (root / "models/one/parts").mkdir()
    (root / "models/one/parts/a.pyc").write_text("bytes")
    assert main([str(root / "models/one/parts")], root) == 2
    assert "models/one/parts has no file that git would take" in capsys.readouterr().err


def test_a_copy_without_git_is_compared_and_not_written(root, capsys):
    shutil.rmtree(root / ".git")
    assert main([], root) == 0
    (root / "recipes/two/parts/a.py").write_text("new\n")
    assert main([], root) == 1 and "parts/a.py differs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([str(root / "recipes/two/parts")], root)
    assert "this needs a git clone" in str(stopped.value)
    assert (root / "recipes/three/parts/a.py").read_text() == "a\n"


def test_a_copied_recipe_gives_one_message_and_its_own_files_none(root):
    for name in ("train_ddp.py", "slurm.sh", "hydra_config/L0.yaml", "tokenizer/vocab.txt", "tests/test_a.py", "c.py"):
        (root / "recipes/three" / name).parent.mkdir(exist_ok=True)
        (root / "recipes/three" / name).write_text(f"{name}\n")
    shutil.copytree(root / "recipes/three", root / "recipes/four")
    (found,) = problems(root)
    assert "recipes/four and recipes/three have the same c.py, own.py, tests/test_a.py, which will drift" in found


@pytest.mark.parametrize("link", ["recipes/two/link.py", "recipes/five"])
def test_links(root, link):
    (root / link).symlink_to(root / "recipes/three")
    (found,) = problems(root)
    assert f"{link}: no symbolic links" in found


def test_another_copys_change_is_not_overwritten(root, capsys):
    (root / "recipes/two/layers.py").write_text("mine\n")
    (root / "models/one/layers.py").write_text("yours\n")
    assert main([str(root / "models/one/layers.py")], root) == 2
    assert "recipes/two/layers.py would lose a change that git does not have" in capsys.readouterr().err
    assert (root / "recipes/two/layers.py").read_text() == "mine\n"
    commit(root)
    assert main([str(root / "models/one/layers.py")], root) == 0


def test_a_new_copy_is_overwritten(root):
    shutil.copytree(root / "recipes/three/parts", root / "models/one/parts")
    (root / "recipes/two/parts/a.py").write_text("new\n")
    assert main([str(root / "recipes/two/parts/a.py")], root) == 0


def test_help(root, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"], root)
    assert "usage:" in capsys.readouterr().out
