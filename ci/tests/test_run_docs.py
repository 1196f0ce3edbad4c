# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a page are run, and that none is left out by mistake."""

import subprocess
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run_docs


def test_what_is_run(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("```bash\na\n```\n```sh\nb\n```\n```text\nc\n```\n\n```python\nd\n```\n")
    assert [(b.line, b.language, b.text) for b in run_docs.blocks(page, "a.md")] == [
        (1, "bash", "a\n"), (11, "python", "d\n"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n```console\n$ a\n```\n", "a.md:2: a block marked `console`"),
        ("```bash title=x\na\n```\n", "a.md:1: a block marked `bash title=x`"),
        ("```sh\na\n```\n- list\n\n  ```bash\n  a\n  ```\n", "a.md:6: a block has to begin and end"),
        ("~~~bash\na\n~~~\n", "a.md:1: a block has to begin and end"),
        ("```bash\na\n", "a.md:1: a block has to begin and end"),
    ],
)
def test_what_would_be_left_out(tmp_path, text, message):
    page = tmp_path / "a.md"
    page.write_text(text)
    with pytest.raises(ValueError) as error:
        run_docs.blocks(page, "a.md")
    assert message in str(error.value)


def test_pages_that_are_none(tmp_path, capsys):
    (tmp_path / "a.md").write_text("")
    for page, message in ((tmp_path / "b.md", "b.md: no such page"), (tmp_path / "a.md", "not in this repository")):
        with pytest.raises(SystemExit, match="2"):
            run_docs.main([str(page)])
        assert message in capsys.readouterr().err


def test_where_commands_are_typed(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("```bash\na\n```\n<!-- typed in recipes/x -->\n```bash\nb\n```\n")
    for name, places in (("docs/a.md", [".", "recipes/x"]), ("recipes/y/README.md", ["recipes/y", "recipes/x"])):
        assert [block.folder for block in run_docs.blocks(page, name)] == places
    page.write_text("<!-- typed in a recipe -->\n```bash\na\n```\n")
    assert [block.folder for block in run_docs.blocks(page, "docs/a.md", "recipes/z")] == ["recipes/z"]


def test_a_place_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_docs, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("<!-- typed in recipes/gone -->\n```bash\na\n```\n")
    with pytest.raises(SystemExit, match="2"):
        run_docs.main([str(tmp_path)])
    assert "a.md: its commands are typed in recipes/gone, which is no folder here." in capsys.readouterr().err


def test_commands_find_what_a_user_would_have(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipes/x"
    (recipe / "tests").mkdir(parents=True)
    (recipe / "tests/this_recipe.py").write_text("def write_examples(folder):\n    (folder / 'my.csv').touch()\n")
    (recipe / "README.md").write_text("```bash\ncat my.csv\n```\n```python\nopen('my.csv')\n```\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(run_docs, "ROOT", tmp_path)
    assert run_docs.main([str(recipe)]) == 0
    assert "2 of 2 blocks ran" in capsys.readouterr().out and not (recipe / "my.csv").exists()
    (recipe / "README.md").write_text("```bash\ncat other.csv\n```\n")
    assert run_docs.main([str(recipe)]) == 1
    assert "FAILED recipes/x/README.md:1" in capsys.readouterr().out


def test_steps_are_few(tmp_path, monkeypatch):
    assert run_docs.shortened("python train_ddp.py num_train_steps=400\\\n  a=1  # why") == (
        "python train_ddp.py num_train_steps=8 a=1 validation.max_rows=20  # why"
    )
    monkeypatch.setattr(run_docs, "ROOT", tmp_path)  # a recipe that has no such key
    (tmp_path / "x/hydra_config").mkdir(parents=True)
    (tmp_path / "x/hydra_config/defaults.yaml").write_text("seed: 1\n")
    assert run_docs.shortened("python train_ddp.py", "x") == "python train_ddp.py num_train_steps=4"
