# SPDX-License-Identifier: Apache-2.0
"""What tests of mistakes share: a start that is refused, and what its sentence has to say."""

from collections.abc import Callable
from pathlib import Path

import pytest

import train_fsdp2
from common.contract.running import run_here


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusals(folder: Path, capfd, monkeypatch) -> Callable[..., str]:
    """A function that starts a trainer in this folder, sees it refuse and write nothing, and returns what it says."""

    def built(*_):
        raise AssertionError("a model was built")

    def start(*overrides: str) -> str:
        before = files(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_here("train_fsdp2", "log", *overrides)
        sentence = capfd.readouterr().err
        assert stopped.value.code == 2
        assert sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
        assert files(folder) == before
        return sentence

    monkeypatch.setattr(train_fsdp2, "materialize", built)
    monkeypatch.chdir(folder)
    return start


def assert_in(sentence: str, *parts: str) -> None:
    missing = [part for part in parts if part not in sentence]
    assert not missing, f"{missing} not in: {sentence}"
