#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One zip a recipe, with the licence and the guides as GUIDE.md: what users unpack in an empty folder and run.

python ci/build_zips.py                     # dist/<recipe>.zip and dist/SHA256SUMS
python ci/build_zips.py --out /tmp/zips recipes/esm2_native_te

The same files give the same bytes, on any machine: names are in order, times and owners left out. What git ignores is
left out too; a file that git does not know yet is an error.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from guide import NAME, guide, in_zip
from repository import paths_of


ROOT = Path(__file__).resolve().parents[1]
DAY_ONE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can name
LINK = 0o120000  # git's mode of a symbolic link
NEEDED = ("README.md", "requirements.txt")


def git_files(folder: Path, *options: str) -> list[str]:
    """What `git ls-files` says of a folder."""
    git = subprocess.run(["git", "-C", str(folder), "ls-files", "-z", *options, "."], capture_output=True, text=True)
    if git.returncode:
        sys.exit(f"error: {folder} is in no git repository, which would say what belongs to it.")
    return [line for line in git.stdout.split("\0") if line]


def files_of(folder: Path) -> dict[Path, int]:
    """The files of a recipe that git knows, with their modes by git: a file system may not keep them.

    Ends with one sentence if the zip would lack something that belongs to it.
    """
    if not folder.is_dir():
        sys.exit(f"error: {folder}: no such folder.")
    if folder.is_symlink():
        sys.exit(f"error: {folder} is a symbolic link; a recipe is a folder of its own.")
    lines = git_files(folder, "--stage")
    found = {folder / line.partition("\t")[2]: int(line.split()[0], 8) for line in lines}
    if links := [str(path.relative_to(folder)) for path, mode in found.items() if mode == LINK or path.is_symlink()]:
        sys.exit(f"error: {folder}: {', '.join(links)}: symbolic links cannot be in a zip; put the file there.")
    if unknown := git_files(folder, "--others", "--exclude-standard"):
        sys.exit(f"error: {folder}: git does not know {', '.join(unknown)}: git add them or ignore them.")
    files = {path: mode for path, mode in sorted(found.items()) if path.is_file()}
    for name in NEEDED:
        if folder / name not in files:
            sys.exit(f"error: {folder}: no recipe, it has no {name}.")
    return files


def recipes() -> list[Path]:
    """The folders that have a file which git knows or would take: what others hold is left from runs."""
    top = ROOT / "recipes"
    inside = [path.relative_to(top).parts for path in paths_of(ROOT) if top in path.parents]
    return sorted({top / parts[0] for parts in inside if (top / parts[0]).is_dir()})


def contents(folder: Path, licence: Path) -> dict[str, tuple[bytes, int]]:
    """What each file of the zip holds, and its mode; links of pages lead to what is in the zip."""
    found = {"LICENSE": (licence.read_bytes(), 0o100644), NAME: (guide(folder).encode(), 0o100644)}
    for path, mode in files_of(folder).items():
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.suffix == ".md":
            content = in_zip(content.decode(), f"recipes/{folder.name}/{name}", name, folder).encode()
        found[name] = content, mode
    return found


def build(folder: Path, out: Path, licence: Path) -> Path:
    """Write `out/<name>.zip`, which unpacks into one folder of that name."""
    target = out / f"{folder.name}.zip"
    with zipfile.ZipFile(target, "w") as file:
        for name, (content, mode) in sorted(contents(folder, licence).items()):
            entry = zipfile.ZipInfo(f"{folder.name}/{name}", DAY_ONE)
            entry.external_attr, entry.create_system = mode << 16, 3  # Unix
            # Stored, not deflated: compressed bytes depend on the version of zlib.
            file.writestr(entry, content, zipfile.ZIP_STORED)
    return target


def main(arguments: list[str]) -> int:
    """Build those asked for, all if none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="recipes/NAME", help="default: all recipes")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    asked = parser.parse_args(arguments)
    folders = [folder.resolve() for folder in asked.folders] or recipes()
    for folder in folders:  # all, before the first is written
        files_of(folder)
        try:
            guide(folder)
        except ValueError as error:
            sys.exit(f"error: {folder}: {error}")
    asked.out.mkdir(parents=True, exist_ok=True)
    zips = [build(folder, asked.out, ROOT / "LICENSE") for folder in folders]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in zips]
    (asked.out / "SHA256SUMS").write_text("".join(sums))
    for path in zips:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
