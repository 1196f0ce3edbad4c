# SPDX-License-Identifier: Apache-2.0
"""Nested keys, numbers that JSON does not have, lines that are whole or not there, folders that can be written to."""

import json
import math
import subprocess
import sys

import pytest

from common import RECIPE
from common.files import append_line, finite, flat, make_folder, short


def test_flat():
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": [1, {"g": 2}]}
    assert flat(nested) == {"a.b": 1, "a.c.d": None, "e": {}, "f": [1, {"g": 2}]}
    assert flat(nested, keep_empty=False) == {"a.b": 1, "a.c.d": None, "f": [1, {"g": 2}]}
    assert flat({"a": {"b": {}}}, keep_empty=False) == {}
    assert flat({"a": {"b": {}}}, prefix="x.") == {"x.a.b": {}}


def test_finite():
    line = {"a": math.nan, "b": {"c": -math.inf, "d": 1.5}, "e": [math.inf, 2, ("x", math.nan)]}
    as_json = json.dumps(finite(line), allow_nan=False)
    assert json.loads(as_json) == {"a": None, "b": {"c": None, "d": 1.5}, "e": [None, 2, ["x", None]]}


def test_small_numbers_keep_their_digits():
    numbers = (2.34567, 0.1, 0.012345, -0.000123456, 0.0, 12345.6, math.nan)
    assert [short(x) for x in numbers] == ["2.3457", "0.1000", "0.01235", "-0.0001235", "0.0000", "12345.6000", "nan"]
    assert short(0.0123456, 3) == "0.0123"


def test_lines_are_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    assert append_line(path, "one") is None and append_line(path, "two") is None

    class Full:
        def __init__(self, *_):
            self.file = path.open("a")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:3])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", Full)
    assert append_line(path, "three") == "No space left on device"
    monkeypatch.undo()
    assert path.read_text() == "one\ntwo\n"
    assert append_line(tmp_path / "nowhere" / "lines", "x") == "No such file or directory"


def test_folders(tmp_path):
    make_folder("key", tmp_path / "a" / "b", rank=3)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"key=.*below cannot be written: Not a directory; give another folder\.$"):
        make_folder("key", tmp_path / "file" / "below", rank=0)


def test_commands_that_use_them_do_not_wait_for_torch():
    command = "import sys, common.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=RECIPE).returncode == 0
