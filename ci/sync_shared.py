#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check that files with a shared name have the same bytes everywhere, or spread one edited copy.

python ci/sync_shared.py                                  # check; exit 1 if copies differ
python ci/sync_shared.py recipes/esm2_native_te/layers.py # overwrite the other copies with this one
"""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def copies(name: str) -> list[Path]:
    """Every copy of a shared file."""
    return sorted(p for top in ("models", "recipes") for p in (ROOT / top).glob(f"*/{name}"))


def main(arguments: list[str]) -> int:
    """Spread the named files, then compare all."""
    lines = (ROOT / "ci" / "shared_files.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    for argument in arguments:
        source = Path(argument).resolve()
        if source not in copies(source.name) or source.name not in names:
            print(f"error: {argument} is no copy of a file in ci/shared_files.txt.", file=sys.stderr)
            return 2
        for copy in copies(source.name):
            copy.write_bytes(source.read_bytes())
    status = 0
    for name in names:
        found = copies(name)
        if not found:
            print(f"ci/shared_files.txt names {name}, which no folder has.", file=sys.stderr)
            status = 1
        elif len({copy.read_bytes() for copy in found}) > 1:
            print(f"{name} differs: {', '.join(str(c.relative_to(ROOT)) for c in found)}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
