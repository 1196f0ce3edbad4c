#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash ci/run_alone.sh recipes/NAME [pytest arguments]: the folder's tests from a copy with no git and no repository around
# it, in a fresh environment with nothing but its requirements.txt. A zip made by ci/build_zips.py will do too.
# TORCH=2.11.0 takes that torch instead of the pinned one; PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
source=${1:?usage: bash ci/run_alone.sh recipes/NAME [pytest arguments]}; shift
[ -e "$source" ] || { echo "error: $source: no such folder or zip." >&2; exit 2; }
source=$(realpath "$source")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -d "$source" ]; then
  tar -c -C "$(dirname "$source")" --exclude .venv --exclude outputs --exclude __pycache__ -f - "$(basename "$source")" |
    tar -x -C "$scratch" -f -
else
  python3 -m zipfile -t "$source" > /dev/null 2>&1 || { echo "error: $source is neither a folder nor a zip." >&2; exit 2; }
  python3 -m zipfile -e "$source" "$scratch"
fi
folder=$(echo "$scratch"/*/)
[ -f "$folder/requirements.txt" ] || { echo "error: $source has no requirements.txt." >&2; exit 2; }
"${PYTHON:-python3}" -m venv "$scratch/.venv"
if [ -n "${TORCH:-}" ]; then
  "$scratch/.venv/bin/pip" install --quiet "torch==$TORCH"
  sed -i.bak '/^torch[=>]/d' "$folder/requirements.txt"
fi
"$scratch/.venv/bin/pip" install --quiet --requirement "$folder/requirements.txt"
cd "$folder"
# shellcheck disable=SC1091
source "$scratch/.venv/bin/activate"
# Found by their names, so that a run from a copy cannot see the repository's.
unset PYTHONPATH TEST_DATA
python -m pytest -p no:cacheprovider "$@"
