#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# source ci/environment.sh NAME REQUIREMENTS...: make .venv/NAME once, install into it what the files list, activate it.
# source ci/environment.sh --of recipes/NAME: the one that this folder is tested in; ci/environments.py says which.
# PYTHON=python3.12 chooses the interpreter. To be sourced at the repository's top.
activate_environment() {
  local python=${PYTHON:-python3} name=$1 stamp packages words
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; Python 3.11 or newer is needed: PYTHON=python3.12 bash $0" >&2; return 2; }
  if [ "$name" = --of ]; then
    words=$("$python" ci/environments.py "$2") || return 2
    # shellcheck disable=SC2086  # words are meant
    set -- $words
    name=$1
  fi
  shift
  stamp=$("$python" --version; cat "$@" | cksum)
  if [ "$(cat ".venv/$name/stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "Installing into .venv/$name ..."
    "$python" -m venv ".venv/$name" || return 1
    packages=$(mktemp)
    cat "$@" > "$packages"
    # A torch that is in the environment already is kept: CPU-only and older builds do.
    if ".venv/$name/bin/python" -c 'import torch' 2>/dev/null; then sed -i.bak '/^torch==/d' "$packages"; fi
    ".venv/$name/bin/python" -m pip install --quiet --requirement "$packages" || { rm -f "$packages" "$packages.bak"; return 1; }
    rm -f "$packages" "$packages.bak"
    echo "$stamp" > ".venv/$name/stamp"
  fi
  # shellcheck disable=SC1090
  source ".venv/$name/bin/activate"
}
activate_environment "$@"
