#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# source ci/environment.sh NAME REQUIREMENTS...: make .venv/NAME once, install into it what the files list, activate it.
# PYTHON=python3.12 chooses the interpreter.
name=$1; shift
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old; Python 3.11 or newer is needed: PYTHON=python3.12 bash $0" >&2; exit 2; }
# A torch that is in the environment already is kept: CPU-only and older builds do.
stamp=$("$python" --version; cat "$@" | cksum)
if [ "$(cat ".venv/$name/stamp" 2>/dev/null)" != "$stamp" ]; then
  echo "Installing into .venv/$name ..."
  "$python" -m venv ".venv/$name"
  packages=$(mktemp)
  cat "$@" > "$packages"
  if ".venv/$name/bin/python" -c 'import torch' 2>/dev/null; then sed -i.bak '/^torch==/d' "$packages"; fi
  ".venv/$name/bin/python" -m pip install --quiet --requirement "$packages"
  rm -f "$packages" "$packages.bak"
  echo "$stamp" > ".venv/$name/stamp"
fi
# shellcheck disable=SC1090
source ".venv/$name/bin/activate"
