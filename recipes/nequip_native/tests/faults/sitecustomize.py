# SPDX-License-Identifier: Apache-2.0
"""Kills a rank at a chosen file operation: Python imports this by itself where PYTHONPATH names its folder.

The file that the environment names as BOMB says where: {"at": what the path contains, "after": so many operations,
"rank": whose}. It is removed before the kill, so the rank that takes over lives.
"""

import json
import os
import signal
import sys


RANK, BOMB = os.environ.get("RANK"), os.environ.get("BOMB")
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
seen = {"bomb": None, "number": 0, "removing": ""}


def watch(event, arguments):
    """An audit hook: called before each of the interpreter's operations on files."""
    if event not in OPERATIONS:
        return
    path = " ".join(str(a) for a in arguments[:2])
    if path.startswith(BOMB):
        return
    if event == "shutil.rmtree":
        seen["removing"] = path
    elif event in ("os.remove", "os.rmdir"):  # inside rmtree they name no folder
        path = f"{seen['removing']} {path}"
    try:
        with open(BOMB) as file:
            bomb = json.load(file)
    except (OSError, ValueError):
        return
    if bomb["rank"] != int(RANK) or bomb["at"] not in path:
        return
    if seen["bomb"] != bomb["number"]:
        seen["bomb"], seen["number"] = bomb["number"], 0
    if seen["number"] == bomb["after"]:
        os.rename(BOMB, f"{BOMB}.gone")
        os.kill(os.getpid(), signal.SIGKILL)
    seen["number"] += 1


if RANK and BOMB:
    sys.addaudithook(watch)
