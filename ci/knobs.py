#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The page of every key of a recipe, from the comments in its hydra_config/defaults.yaml.

python ci/knobs.py recipes/esm2_native_te   # print it; the site has it, and each zip in its GUIDE.md
python ci/knobs.py --check                  # exit 1 if a key of any recipe has no comment
"""

import argparse
import re
import sys
from pathlib import Path

from pages import title


ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = "hydra_config/defaults.yaml"
KEY = re.compile(r"^( *)(\w+):(?: +(?!#)(.*?))?(?: +# (.*))?$")
PAGE = """# Every key: {name}
From `recipes/{recipe}/{defaults}`. `???` must be given, `${{...}}` is the value of another key. A section is the
keyword arguments of one function or class; an unknown key, a wrong type or an impossible combination stops the run
with one sentence and exit code 2 before a model is built (under `torchrun` its own report follows the sentence, and
its exit code is 1). `python train_ddp.py --help` prints them too, and `--config-name L0_sanity --cfg job --resolve`
what a configuration sets.

{table}
"""


def table(defaults: str) -> str:
    """One table for each part that a `# ----` begins. Raises ValueError for a key without a comment or a part."""
    lines, path = [], []
    for line in defaults.partition("\nhydra:")[0].splitlines():
        if line.startswith("# ---- "):
            heading = line.removeprefix("# ---- ")
            lines += ["", f"**{heading[0].upper()}{heading[1:]}**", "", "| key | default | |", "|---|---|---|"]
        elif (found := KEY.match(line)) and line != "defaults:":  # Hydra's list of those
            indent, name, value, comment = found.groups()
            path = [*path[: len(indent) // 2], name]
            if not lines:
                raise ValueError(f"{name} stands before the first line that begins a part, # ---- <its title>.")
            if not comment:
                raise ValueError(f"{'.'.join(path)} has no comment that says what it is.")
            comment = comment.replace("|", "\\|").replace("<", "&lt;")
            comment = re.sub(r"(\{.*\})$", r"`\1`", comment)  # bare, Markdown takes it for attributes
            comment = comment if value else f"*{comment}*"
            lines.append(f"| `{'.'.join(path)}` | {f'`{value}`' if value else ''} | {comment} |")
    return "\n".join(lines).strip()


def page(recipe: Path) -> str:
    """Every key of a recipe. Raises ValueError as `table` does."""
    name = title((recipe / "README.md").read_text()).partition(",")[0]
    keys = table((recipe / DEFAULTS).read_text())
    return PAGE.format(name=name, recipe=recipe.name, defaults=DEFAULTS, table=keys)


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Print or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("recipe", type=Path, nargs="?", metavar="recipes/NAME")
    group.add_argument("--check", action="store_true", help="print nothing; exit 1 if a key has no comment")
    asked = parser.parse_args(arguments)
    if asked.recipe and not (asked.recipe / DEFAULTS).is_file():
        parser.error(f"{asked.recipe}: no recipe, it has no {DEFAULTS}.")
    every = sorted(path.parents[1] for path in root.glob(f"recipes/*/{DEFAULTS}"))
    status = 0
    for recipe in [asked.recipe] if asked.recipe else every:
        try:
            if asked.check:
                table((recipe / DEFAULTS).read_text())
            else:
                print(page(recipe), end="")
        except ValueError as error:
            print(f"error: {recipe / DEFAULTS}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
