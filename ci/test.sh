#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All fast tests, each folder from a copy outside the repository. Arguments go to pytest: bash ci/test.sh -k plan
# bash ci/test.sh --only-repository: what is no recipe's or model's own. With no -k or the like also: what docs tell users to type,
# Slurm (where slurm-wlm and munge are installed), the site, the zips.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
git=$(git rev-parse 2>&1) || { echo "error: bash ci/test.sh needs a git clone; git says: ${git%%$'\n'*}" >&2; exit 2; }
source ci/environment.sh test recipes/*/requirements.txt models/*/requirements.txt ci/requirements.txt
export TEST_DATA=${TEST_DATA:-$(dirname "$root")/shared/data}  # real proteins, if they are there
export PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false

bash ci/lint.sh
# The tables in docs are those that the committed numbers give.
for proof in curve_matrix kill_anywhere; do
  (cd recipes/esm2_native_te && python tests/$proof.py --from ../../docs/results/$proof.json --check ../../docs/exactness.md)
done
for page in docs/speed.md README.md; do
  (cd ci/benchmarks && python train_speed.py --from ../../docs/results/train_speed.json --check ../../$page)
done
(cd ci/benchmarks && python data_speed.py --from ../../docs/results/data_speed.json --check ../../docs/data.md)
for numbers in scaling_model scaling_ranks largest_model context_memory; do
  (cd ci/benchmarks && python $numbers.py --from ../../docs/results/$numbers.json --check ../../docs/scaling.md)
done
(cd ci/benchmarks && python precision_curves.py --from ../../docs/results/precision_curves.json --check ../../docs/exactness.md)
for page in README.md recipes/esm2_native_te/README.md; do
  (cd ci/benchmarks && python hardware.py --check ../../$page)
done

folders="models/* recipes/*"
if [ "${1:-}" = --only-repository ]; then folders=; shift; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
run() {  # FOLDER PYTEST-OPTIONS...: in two processes, because most of a test's time is waiting for ranks to start
  echo "--- $1"
  (cd "$1" && python -m pytest -p no:cacheprovider -n 2 --dist loadfile "${@:2}") || {
    code=$?; [ $code -eq 5 ] || status=$code; }  # 5: no test was selected, as with -k
}
copy() {  # TO FROM NAME...: without environments and what runs leave
  mkdir "$1" && tar -c -C "$2" --exclude .venv --exclude outputs --exclude __pycache__ -f - "${@:3}" | tar -x -C "$1" -f -
}
for folder in $folders; do
  copy "$scratch/${folder//\//_}" "$(dirname "$folder")" "$(basename "$folder")"
  run "$scratch/${folder//\//_}/$(basename "$folder")" "$@"
done
# These belong to the repository, and need all of it around them.
python ci/repository.py "$scratch/repository"
run "$scratch/repository/ci/benchmarks" "$@"
run "$scratch/repository/ci/tests" "$@"
[ $# -eq 0 ] || exit $status

echo "--- what READMEs and docs tell users to type"
python ci/run_docs.py || status=$?
if command -v slurmctld > /dev/null; then
  echo "--- Slurm"
  bash slurm/test.sh || { code=$?; if [ $code -eq 77 ]; then echo "left out"; else status=$code; fi; }
else
  echo "--- Slurm: left out, slurm-wlm and munge are not installed"
fi
echo "--- the site and the zips"
deactivate
source ci/environment.sh docs docs/requirements.txt
mkdocs build --strict --quiet --site-dir "$scratch/site" || status=$?
python ci/build_zips.py --out "$scratch/zips" || status=$?
exit $status
