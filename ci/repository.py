# SPDX-License-Identifier: Apache-2.0
"""What belongs to the repository: the files that git knows or would take.

python ci/repository.py FOLDER   # copies them into that folder, as a repository of its own
"""

import shutil
import subprocess
import sys
from pathlib import Path


class NoGit(SystemExit):
    """Git does not know the folder, as in a downloaded archive; ends a command with one sentence."""


def paths_of(root: Path) -> list[Path]:
    """In order, links among them; what git ignores or has deleted is left out. Raises NoGit."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        raise NoGit(f"error: {root}: this needs a git clone; git says: {why}") from None
    found = {root / name for name in names if name}
    return sorted(path for path in found if path.is_symlink() or path.is_file())


def files_of(root: Path) -> list[Path]:
    """Those of `paths_of` that are files, or links to such."""
    return [path for path in paths_of(root) if path.is_file()]


def copy(root: Path, to: Path) -> None:
    """`files_of`, in a repository of their own. Raises NoGit."""
    for path in files_of(root):
        made = to / path.relative_to(root)
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, made)
    subprocess.run(["git", "init", "-q", to], check=True)
    subprocess.run(["git", "-C", to, "add", "-A"], check=True)


if __name__ == "__main__":
    copy(Path(__file__).resolve().parents[1], Path(sys.argv[1]))
