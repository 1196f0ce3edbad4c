# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a page are run, and that none is left out by mistake."""

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
    ("text", "told"),
    [
        ("\n```console\n$ a\n```\n", "a.md:2: a block marked `console`"),
        ("```bash title=x\na\n```\n", "a.md:1: a block marked `bash title=x`"),
        ("```sh\na\n```\n- list\n\n  ```bash\n  a\n  ```\n", "a.md:6: a block has to begin and end"),
        ("~~~bash\na\n~~~\n", "a.md:1: a block has to begin and end"),
        ("```bash\na\n", "a.md:1: a block has to begin and end"),
    ],
)
def test_what_would_be_left_out(tmp_path, text, told):
    page = tmp_path / "a.md"
    page.write_text(text)
    with pytest.raises(ValueError) as error:
        run_docs.blocks(page, "a.md")
    assert told in str(error.value)


def test_pages_that_are_none(tmp_path, capsys):
    (tmp_path / "a.md").write_text("")
    for page, told in ((tmp_path / "b.md", "b.md: no such page"), (tmp_path / "a.md", "not in this repository")):
        with pytest.raises(SystemExit, match="2"):
            run_docs.main([str(page)])
        assert told in capsys.readouterr().err


def test_steps_are_few():
    assert run_docs.shortened("python train_ddp.py num_train_steps=400\\\n  a=1  # why") == (
        "python train_ddp.py num_train_steps=8 a=1 validation.max_rows=20  # why"
    )
