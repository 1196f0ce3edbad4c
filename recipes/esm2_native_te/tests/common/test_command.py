# SPDX-License-Identifier: Apache-2.0
"""A command ends with one sentence at a mistake, and quietly where nobody reads on."""

import subprocess
import sys

import pytest

from common import RECIPE
from common.command import command, writing
from common.contract.running import environment, torchrun


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("this is\nwrong"), "error: this is wrong\n"),
        (PermissionError(13, "Permission denied", "/x/y"), "error: /x/y: Permission denied\n"),
    ],
)
def test_a_mistake_is_one_sentence(error, sentence, capsys):
    with pytest.raises(SystemExit) as stopped, command():
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == sentence


@pytest.mark.parametrize("mistaken", ["0 1", "1"])
def test_of_ranks_one_says_it(mistaken, tmp_path):
    """All of them have the same mistake before they meet, or one has it and the others wait for that one."""
    (tmp_path / "wrong.py").write_text(
        "import os, time\nfrom common.command import command\nfrom common.distributed import end_of_process\n"
        "with end_of_process(), command():\n"
        f"    if os.environ['RANK'] in '{mistaken}'.split(): raise ValueError('this is wrong')\n"
        "    time.sleep(30)\n"
    )
    command_line = [*torchrun(2), str(tmp_path / "wrong.py")]
    environ = environment() | {"PYTHONPATH": str(RECIPE)}
    done = subprocess.run(command_line, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("error: this is wrong\n") == 1 and done.returncode != 0


def test_what_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()
    sentence = r"model cannot be written \(.*Not a directory\); make room or give another name"
    with pytest.raises(ValueError, match=sentence), writing(tmp_path / "model"):
        (tmp_path / "file" / "below").mkdir()


def test_a_reader_that_goes_away_is_no_mistake():
    """As `| head -1` does; Python would say BrokenPipeError, and end with code 120."""
    program = "from common.command import command\nwith command():\n    for i in range(99999): print(i)"
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=RECIPE, stdout=-1, stderr=-1, text=True)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == "" and writer.wait(60) == 0
