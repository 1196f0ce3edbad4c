#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The recipes' slurm.sh on a real Slurm with two virtual nodes (slurm/cluster.sh): trained, warned near its time limit, ended by
# scancel, requeued, swept, and compared with a local run; before that, what a job has of a node that holds jobs to what they asked
# for (slurm/cluster.sh up 1 confined). Three minutes on two cores. With -m "slow or not slow", as CI does weekly, also the other
# trainers, scancel --signal=USR1, requeued by an operator, a node that dies, a run without ckpt_dir, and all other recipes that have
# a slurm.sh, by two nodes' training: a quarter of an hour and more.
# RECIPE=recipes/NAME tries that one. The others' slurm.sh differ in a name and a configuration (ci/tests/test_manifests.py).
# Exit code 77: it cannot be tried here, because Slurm's packages are missing or no cluster comes up. Where CI=true, the latter is
# a failure: else nobody would see that Slurm is not tested any more.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
if [ -n "${RECIPE:-}" ]; then
  [ -f "$RECIPE/slurm.sh" ] || { echo "error: RECIPE=$RECIPE: no such recipe, or it has no slurm.sh." >&2; exit 2; }
  recipes=("$RECIPE/slurm.sh")
elif [[ " $* " == *" slow"* ]]; then
  recipes=(recipes/esm2_native_te/slurm.sh)
  for script in recipes/*/slurm.sh; do [ "$script" = "${recipes[0]}" ] || recipes+=("$script"); done
else
  recipes=(recipes/esm2_native_te/slurm.sh)
fi
SLURM_HOME=$(mktemp -d)
export SLURM_HOME TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
trap 'bash "$root/slurm/cluster.sh" down; rm -rf "$SLURM_HOME"' EXIT
source slurm/env.sh
up() {
  bash slurm/cluster.sh up "$@" || {
    code=$?
    [ $code -ne 77 ] || exit 77
    tail -n 20 "$SLURM_HOME"/*.log >&2 2> /dev/null || true
    [ "${CI:-}" != true ] || exit 1
    exit 77
  }
}
status=0
tests() {  # of recipes/NAME/slurm.sh, ARGUMENTS of pytest
  echo "--- $1"
  (
    if [ -z "${VIRTUAL_ENV:-}" ]; then source ci/environment.sh --of "$(dirname "$1")" || exit; fi
    RECIPE=$(dirname "$1") python -m pytest -p no:cacheprovider "${@:2}"
  ) || { code=$?; [ $code -eq 5 ] || status=$code; }  # 5: no test was selected
}
up 1 confined
tests "${recipes[0]}" "$@" slurm/tests/test_confined.py
bash slurm/cluster.sh down
up 2
how=()
for script in "${recipes[@]}"; do
  tests "$script" ${how[@]+"${how[@]}"} "$@" slurm/tests/test_cluster.py
  how=(-k two_nodes)
done
exit $status
