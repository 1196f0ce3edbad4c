# SPDX-License-Identifier: Apache-2.0
"""The first command of the README that trains works as it stands there, cut short."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from common import RECIPE
from common.contract.running import environment, metrics


def first_command() -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (RECIPE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return next(line for line in commands if re.search(r"\btrain_\w+\.py\b", line)).partition("  #")[0]


def test_the_first_command(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", ".venv", "outputs")
    copy = shutil.copytree(RECIPE, tmp_path / "recipe", ignore=ignored)
    short = "num_train_steps=2"
    if "max_rows:" in (RECIPE / "hydra_config" / "defaults.yaml").read_text():
        short += " validation.max_rows=8"
    command = f"{first_command()} {short} logger.log_dir={tmp_path}/run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=copy,
        env=environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(tmp_path / "run", "train", "step")[-1] == 2
