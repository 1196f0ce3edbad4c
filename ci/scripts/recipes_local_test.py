#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the tests of recipe or model folders, each from a copy outside the repository.

./ci/scripts/recipes_local_test.py recipes/esm2_native_te/ [-k plan ...]
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Test the folders that come first; what follows goes to pytest."""
    folders = [Path(a) for a in arguments if Path(a).is_dir()]
    if not folders:
        print("usage: recipes_local_test.py FOLDER ... [pytest arguments]", file=sys.stderr)
        return 2
    status = 0
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copytree(folder, Path(scratch) / folder.resolve().name)
            command = [sys.executable, "-m", "pytest", *(a for a in arguments if not Path(a).is_dir())]
            status |= subprocess.run(command, cwd=copy).returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
