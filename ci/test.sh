#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All fast tests, each folder from a copy outside the repository. Arguments go to pytest: bash ci/test.sh -k plan
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
source ci/environment.sh test recipes/*/requirements.txt ci/requirements.txt
export TEST_DATA=${TEST_DATA:-$(dirname "$root")/shared/data}  # real proteins, if they are there
export PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false

ruff format --check .
ruff check .
codespell
python ci/sync_shared.py
# The tables in docs are those that the committed numbers give.
for proof in curve_matrix kill_anywhere; do
  (cd recipes/esm2_native_te && python tests/$proof.py --from ../../docs/results/$proof.json --check ../../docs/exactness.md)
done
for page in docs/speed.md README.md; do
  (cd ci/benchmarks && python train_speed.py --from ../../docs/results/train_speed.json --check ../../$page)
done
(cd ci/benchmarks && python data_speed.py --from ../../docs/results/data_speed.json --check ../../docs/data.md)
(cd ci/benchmarks && python scaling_model.py --from ../../docs/results/scaling_model.json --check ../../docs/scaling.md)
(cd ci/benchmarks && python scaling_ranks.py --from ../../docs/results/scaling_ranks.json --check ../../docs/scaling.md)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
for folder in models/* recipes/* ci/benchmarks; do  # the last one needs the recipes beside it
  echo "--- $folder"
  mkdir -p "$scratch/$(dirname "$folder")"
  cp -r "$folder" "$scratch/$folder"
  # 5: no test was selected, as with -k
  (cd "$scratch/$folder" && python -m pytest -p no:cacheprovider "$@") || { code=$?; [ $code -eq 5 ] || status=$code; }
done
exit $status
