#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check that files with a shared name have the same bytes everywhere, or spread one edited copy.

python ci/sync_shared.py                                  # check; exit 1 if copies differ
python ci/sync_shared.py recipes/esm2_native_te/layers.py # overwrite the other copies with this one

ci/shared_files.txt names files, or folders with a slash at the end, as they lie in the folders under models/ and
recipes/. Files that git ignores do not count.
"""

import argparse
import subprocess
import sys
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from pathlib import Path

from repository import NoGit, paths_of


ROOT = Path(__file__).resolve().parents[1]
# What every folder has of its own, alike as it may be for a while. A star stands for slashes too.
ALONE = (
    "README.md", "requirements*.txt", "pytest.ini", "tests/conftest.py", "train_*.py", "hydra_config/*", "data/*",
    "tokenizer/*", "Dockerfile", ".dockerignore", "slurm.sh", "slurm_node.sh", "sky.yaml", "trainjob.yaml",
)  # fmt: skip


class Mistake(Exception):
    """What the caller asked for cannot be done; the text says why."""


def listed(root: Path) -> list[str]:
    """The names in `ci/shared_files.txt`."""
    lines = (line.partition("#")[0].strip() for line in (root / "ci" / "shared_files.txt").read_text().splitlines())
    return [line for line in lines if line]


def paths(root: Path) -> list[Path]:
    """Files and links under models/ and recipes/."""
    try:
        return [path for path in paths_of(root) if path.relative_to(root).parts[0] in ("models", "recipes")]
    except NoGit:  # a copy
        found = (path for top in ("models", "recipes") for path in root.glob(f"{top}/**/*"))
        return [path for path in found if path.is_symlink() or (path.is_file() and "__pycache__" not in path.parts)]


def folders(root: Path) -> dict[Path, dict[str, Path]]:
    """Each model's and recipe's files by their names in it."""
    found: dict[Path, dict[str, Path]] = {}
    for path in paths(root):
        parts = path.relative_to(root).parts
        if len(parts) > 2 and path.is_file():
            found.setdefault(root / parts[0] / parts[1], {})["/".join(parts[2:])] = path
    return dict(sorted(found.items()))


def is_listed(name: str, names: list[str]) -> bool:
    """Whether a file is shared, by itself or by a folder around it."""
    return any(name == one or (one.endswith("/") and name.startswith(one)) for one in names)


def is_alone(name: str) -> bool:
    """Whether a file of this name is each folder's own."""
    return any(fnmatchcase(name, pattern) for pattern in ALONE)


def is_code(name: str) -> bool:
    """Whether a file of a name that others have too can be a copy of theirs."""
    return name.endswith((".py", ".cpp", ".sh")) and not name.endswith("__init__.py")


def is_near(name: str, content: bytes, shared: str, of_shared: bytes) -> bool:
    """Whether a file is a copy of a shared one, if need be with a few lines changed."""
    if content == of_shared:
        return True
    if Path(name).suffix != Path(shared).suffix or not is_code(name):
        return False
    ours, theirs = content.splitlines(), of_shared.splitlines()
    if not 0.8 < len(ours) / max(1, len(theirs)) < 1.25:
        return False
    return SequenceMatcher(None, ours, theirs, autojunk=False).ratio() > 0.8


def problems(root: Path) -> list[str]:
    """What is wrong, a sentence each."""
    names, all_files = listed(root), folders(root)
    found = []

    def told(paths: list[Path]) -> str:
        return ", ".join(str(path.relative_to(root)) for path in paths)

    if links := [path for path in paths(root) if path.is_symlink()]:
        found.append(f"{told(links)}: no symbolic links here, a folder is copied alone; put the file there.")
    for name in names:
        holders = {folder: files for folder, files in all_files.items() if any(is_listed(f, [name]) for f in files)}
        if not holders:
            found.append(f"ci/shared_files.txt names {name}, which no folder has.")
        for file in sorted({f for files in holders.values() for f in files if is_listed(f, [name])}):
            copies = [files[file] for files in holders.values() if file in files]
            lacking = [folder / file for folder, files in holders.items() if file not in files]
            if len({copy.read_bytes() for copy in copies}) > 1:
                found.append(f"{file} differs: {told(copies)}. Spread the right one: python ci/sync_shared.py PATH")
            if lacking:
                found.append(f"{name} is shared as a whole: {told(copies)} stands alone, there is no {told(lacking)}.")
    shared = {name: path.read_bytes() for files in all_files.values() for name, path in files.items()
              if is_listed(name, names)}  # fmt: skip
    basenames = {name.rpartition("/")[2]: name for name in shared}
    seen: dict[bytes, tuple[Path, str]] = {}
    same: dict[tuple[Path, Path], list[str]] = {}
    for folder, files in all_files.items():
        for name, path in files.items():
            content = path.read_bytes()
            if not content.strip() or is_alone(name) or is_listed(name, names):
                continue
            if (original := basenames.get(name.rpartition("/")[2])) and is_code(name):
                found.append(
                    f"{told([path])} has the name of the shared {original}, and is not it: remove or rename it."
                )
            elif original := next(
                (one for one, bytes_ in shared.items() if is_near(name, content, one, bytes_)), None
            ):
                found.append(f"{told([path])} is a copy of the shared {original} under another name.")
            elif content in seen and seen[content][0] != folder:
                other, its_name = seen[content]
                same.setdefault((other, folder), []).append(name if name == its_name else f"{its_name} as {name}")
            seen.setdefault(content, (folder, name))
    for (one, other), files in same.items():
        found.append(
            f"{told([one])} and {told([other])} have the same {', '.join(files)}, which will drift apart: name what "
            "shall stay the same in ci/shared_files.txt, under one name, and change, rename or delete the others."
        )
    return found


def committed(root: Path, path: Path) -> bytes | None:
    """The file as the last commit has it, if it does."""
    command = ["git", "-C", str(root), "show", f"HEAD:./{path.relative_to(root).as_posix()}"]
    done = subprocess.run(command, capture_output=True)
    return None if done.returncode else done.stdout


def spread(root: Path, source: Path) -> list[Path]:
    """Overwrite the other copies of a shared file; which they were. Raises Mistake, and then writes none."""
    paths_of(root)  # ends where no git can say what a copy would lose
    all_files = folders(root)
    for folder, files in all_files.items():
        for name, path in files.items():
            if path.resolve() == source and is_listed(name, listed(root)):
                others = [other[name] for one, other in all_files.items() if one != folder and name in other]
                others = [other for other in others if other.read_bytes() != source.read_bytes()]
                # A new copy is in no commit; what it was copied from may be.
                changed = [other for other in others
                           if other.read_bytes() not in (committed(root, other), committed(root, path))]  # fmt: skip
                if changed:
                    raise Mistake(
                        f"{', '.join(str(other.relative_to(root)) for other in changed)} would lose a change that is "
                        f"not committed; commit it, undo it, or move it into {path.relative_to(root)} first."
                    )
                for other in others:
                    other.write_bytes(source.read_bytes())
                return others
    raise Mistake(f"{source} is no copy of a file in ci/shared_files.txt.")


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Spread the named files, then compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="*", metavar="PATH", help="a copy that shall overwrite the others")
    try:
        for source in parser.parse_args(arguments).paths:
            if not source.is_file():
                raise Mistake(f"{source}: no such file.")
            for path in spread(root, source.resolve()):
                print(f"wrote {path.relative_to(root)}")
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    found = problems(root)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
