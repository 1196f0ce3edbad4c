#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash ci/test.sh                       everything that CI runs on a machine without a GPU
# bash ci/test.sh recipes/NAME          one folder's tests; also models/NAME, and several
# bash ci/test.sh -k plan               options of pytest come last
# bash ci/test.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old; Python 3.11 or newer is needed: PYTHON=python3.12 bash $0" >&2; exit 2; }
exec "$python" ci/run_tests.py "$@"
