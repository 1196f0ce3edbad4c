#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The table of every key in a recipe's README, from the comments in its hydra_config/defaults.yaml.

python ci/knobs.py                          # write it into each README, between its two marks
python ci/knobs.py --check                  # exit 1 if one is not what it would be
"""

import argparse
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- knobs: begin -->", "<!-- knobs: end -->"
KEY = re.compile(r"^( *)(\w+):(?: +(?!#)(.*?))?(?: +# (.*))?$")


def table(defaults: str) -> str:
    """One table for each part that a `# ----` begins. Raises ValueError for a key that it cannot tell of."""
    lines, path = [], []
    for line in defaults.partition("\nhydra:")[0].splitlines():
        if line.startswith("# ---- "):
            title = line.removeprefix("# ---- ")
            lines += ["", f"**{title[0].upper()}{title[1:]}**", "", "| key | default | |", "|---|---|---|"]
        elif (found := KEY.match(line)) and line != "defaults:":  # Hydra's list of those
            indent, name, value, comment = found.groups()
            path = [*path[: len(indent) // 2], name]
            if not lines:
                raise ValueError(f"{name} stands before the first line that begins a part, # ---- <its title>.")
            if not comment:
                raise ValueError(f"{'.'.join(path)} has no comment that says what it is.")
            comment = comment.replace("|", "\\|").replace("<", "&lt;")
            comment = comment if value else f"*{comment}*"
            lines.append(f"| `{'.'.join(path)}` | {f'`{value}`' if value else ''} | {comment} |")
    return "\n".join(lines).strip()


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is old")
    check, wrong = parser.parse_args(arguments).check, []
    for defaults in sorted(root.glob("recipes/*/hydra_config/defaults.yaml")):
        readme = defaults.parents[1] / "README.md"
        text = readme.read_text() if readme.exists() else ""
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        if text.count(BEGIN) != 1 or text.count(END) != 1 or END not in rest:
            wrong.append(f"{readme.relative_to(root)}: there is no one pair of the lines {BEGIN} and {END}.")
            continue
        try:
            new = f"{before}{BEGIN}\n{table(defaults.read_text())}\n{END}{after}"
        except ValueError as error:
            wrong.append(f"{defaults.relative_to(root)}: {error}")
            continue
        if not check:
            readme.write_text(new)
        elif new != text:
            wrong.append(f"{readme.relative_to(root)}: its table of keys is old; python ci/knobs.py")
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
