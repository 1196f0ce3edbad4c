#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Format, spelling, shell scripts, Dockerfiles, YAML and JSON, links, files that must be the same. Needs ci/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
git=$(git rev-parse 2>&1) || { echo "error: bash ci/lint.sh needs a git clone; git says: ${git%%$'\n'*}" >&2; exit 2; }
ruff format --check .
ruff check .
codespell
git ls-files -z --cached --others --exclude-standard '*.sh' .ci/run | xargs -0 shellcheck --external-sources
git ls-files -z --cached --others --exclude-standard '*Dockerfile*' | xargs -0 hadolint
python ci/check_files.py
python ci/sync_shared.py
python ci/knobs.py --check
