#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Format, spelling, shell scripts, Dockerfiles, YAML and JSON, links, files that must be the same, imports. Needs
# ci/requirements.txt. All of it runs; what failed is named at the end, with how to fix it.
set -euo pipefail
cd "$(dirname "$0")/.."
git=$(git rev-parse 2>&1) || { echo "error: bash ci/lint.sh needs a git clone; git says: ${git%%$'\n'*}" >&2; exit 2; }
failed=()
check() {  # HOW-TO-FIX-IT COMMAND...
  "${@:2}" || failed+=("${*:2}; to fix it: $1")
}
tracked() {  # PATTERN... -- COMMAND...
  local patterns=()
  while [ "$1" != -- ]; do patterns+=("$1"); shift; done
  git ls-files -z --cached --others --exclude-standard "${patterns[@]}" | xargs -0 "${@:2}"
}
check "ruff format ." ruff format --check .
check "ruff check --fix ." ruff check .
check "codespell --write-changes, or the word in pyproject.toml" codespell
check "shellcheck.net/wiki has a page for each SC number" tracked '*.sh' .ci/run -- shellcheck --external-sources
check "edit the lines named above" tracked '*Dockerfile*' -- hadolint
check "edit the lines named above" python ci/check_files.py
check "python ci/sync_shared.py PATH, with the file or folder that is right" python ci/sync_shared.py
check "edit the lines named above" python ci/check_imports.py
check "python ci/knobs.py" python ci/knobs.py --check
check "python ci/recipes_table.py" python ci/recipes_table.py --check
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
