#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check that files and folders with a shared name are the same everywhere, or spread one edited copy.

python ci/sync_shared.py                                            # check; exit 1 if copies differ
python ci/sync_shared.py recipes/esm2_native_te/common              # make the other copies of the folder like this one
python ci/sync_shared.py recipes/esm2_native_te/common/scheduler.py # one file of it

ci/shared_files.txt names files, or folders with a slash at the end, as they lie in the folders under models/ and
recipes/. Files that git ignores do not count. What git has never stored is not overwritten and not removed.
"""

import argparse
import shutil
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
    "tokenizer/*", "Dockerfile", ".dockerignore", "slurm.sh", "sky.yaml", "trainjob.yaml",
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
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    return matcher.quick_ratio() > 0.8 and matcher.ratio() > 0.8


def problems(root: Path) -> list[str]:
    """What is wrong, a sentence each."""
    names, all_files = listed(root), folders(root)
    found = []

    def shown(paths: list[Path]) -> str:
        return ", ".join(str(path.relative_to(root)) for path in paths)

    if links := [path for path in paths(root) if path.is_symlink()]:
        found.append(f"{shown(links)}: no symbolic links here, a folder is copied alone; put the file there.")
    for name in names:
        holders = {folder: files for folder, files in all_files.items() if any(is_listed(f, [name]) for f in files)}
        if not holders:
            found.append(f"ci/shared_files.txt names {name}, which no folder has.")
        lacking: dict[Path, list[str]] = {}
        for file in sorted({f for files in holders.values() for f in files if is_listed(f, [name])}):
            copies = [files[file] for files in holders.values() if file in files]
            if len({copy.read_bytes() for copy in copies}) > 1:
                found.append(f"{file} differs: {shown(copies)}. Spread the right one: python ci/sync_shared.py PATH")
            for folder, files in holders.items():
                if file not in files:
                    lacking.setdefault(folder / name, []).append(file.removeprefix(name))
        for folder, files in lacking.items():
            found.append(
                f"{name} is shared as a whole, and {shown([folder])} lacks {', '.join(files)}, which others have. "
                "Spread the right folder: python ci/sync_shared.py PATH"
            )
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
                    f"{shown([path])} has the name of the shared {original}, and is not it: remove or rename it."
                )
            elif original := next(
                (one for one, bytes_ in shared.items() if is_near(name, content, one, bytes_)), None
            ):
                found.append(f"{shown([path])} is a copy of the shared {original} under another name.")
            elif content in seen and seen[content][0] != folder:
                other, its_name = seen[content]
                same.setdefault((other, folder), []).append(name if name == its_name else f"{its_name} as {name}")
            seen.setdefault(content, (folder, name))
    for (one, other), files in same.items():
        found.append(
            f"{shown([one])} and {shown([other])} have the same {', '.join(files)}, which will drift apart: name what "
            "shall stay the same in ci/shared_files.txt, under one name, and change, rename or delete the others."
        )
    return found


def git(root: Path, *words: str, content: bytes | None = None) -> subprocess.CompletedProcess:
    """Run git in `root`, with `content` on its standard input."""
    return subprocess.run(["git", "-C", str(root), *words], input=content, capture_output=True)


def is_stored(root: Path, content: bytes) -> bool:
    """Whether git has these bytes: from a commit, from `git add`, or because `spread` wrote them."""
    name = git(root, "hash-object", "--stdin", content=content).stdout.decode().strip()
    return git(root, "cat-file", "-e", name).returncode == 0


def source_of(root: Path, source: Path) -> tuple[Path, str]:
    """The recipe's or model's folder around `source`, and its name in there. Raises Mistake if it is not shared."""
    names = listed(root)
    shared_folders = ", ".join(name for name in names if name.endswith("/"))
    parts = source.relative_to(root).parts if source.is_relative_to(root) else ()
    name = "/".join(parts[2:]) + "/" * source.is_dir()
    in_shared_folder = any(one.endswith("/") and name.startswith(one) for one in names)
    if not source.exists():
        if in_shared_folder and source.parent.is_dir():
            parent = source.parent.relative_to(root)
            raise Mistake(f"{source}: no such file; to remove it from other copies, spread its folder: {parent}.")
        raise Mistake(f"{source}: no such file or folder.")
    if parts[:1] not in (("models",), ("recipes",)) or not (name in names or in_shared_folder):
        if source.is_dir():
            raise Mistake(f"{source} is no shared folder; ci/shared_files.txt names {shared_folders or 'none'}.")
        raise Mistake(f"{source} is no copy of a file in ci/shared_files.txt.")
    return root / parts[0] / parts[1], name


def spread(root: Path, source: Path) -> tuple[list[Path], list[Path]]:
    """Make the other copies of a shared file or folder like this one; which were written and which removed.

    Raises Mistake, and then does nothing.
    """
    paths_of(root)  # ends where no git can say what a copy would lose
    own, name = source_of(root, source)
    all_files = folders(root)
    whole = next((one for one in listed(root) if one.endswith("/") and name.startswith(one)), None)
    ours = {one: path.read_bytes() for one, path in all_files.get(own, {}).items() if is_listed(one, [name])}
    if not ours:
        raise Mistake(f"{source.relative_to(root)} has no file that git would take; what it ignores is not spread.")
    written, removed = [], []
    for folder, files in all_files.items():
        if folder == own or not any(is_listed(one, [whole or name]) for one in files):
            continue
        theirs = {one: path.read_bytes() for one, path in files.items() if is_listed(one, [name])}
        written += [folder / one for one, content in ours.items() if theirs.get(one) != content]
        removed += [folder / one for one in theirs if one not in ours]
    # Ignored files count here: they are lost like others.
    unsaved = [p for p in written + removed if p.exists() and (p.is_dir() or not is_stored(root, p.read_bytes()))]
    if unsaved:
        raise Mistake(
            f"{', '.join(str(path.relative_to(root)) for path in unsaved)} would lose a change that git does "
            f"not have; commit it or git add it, undo it, or move it into {own.relative_to(root)} first."
        )
    for content in ours.values():
        git(root, "hash-object", "-w", "--stdin", content=content)  # so that the next spread may overwrite it
    for path in removed:
        path.unlink()
        for parent in path.parents:
            if any(parent.iterdir()):
                break
            parent.rmdir()
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(own / path.relative_to(root / Path(*path.relative_to(root).parts[:2])), path)
    return written, removed


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Spread the named files, then compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", type=Path, nargs="*", metavar="PATH", help="a shared file or folder that the other copies shall equal"
    )
    try:
        for source in parser.parse_args(arguments).paths:
            written, removed = spread(root, source.resolve())
            for what, paths in (("wrote", written), ("removed", removed)):
                for path in paths:
                    print(f"{what} {path.relative_to(root)}")
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    found = problems(root)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
