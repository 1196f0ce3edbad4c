#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a fresh machine with a GPU: an environment in .venv/gpu, all gpu tests, training speed, and their tables.
#   bash ci/gpu.sh                             all of it; numbers go to docs/results, tables to READMEs and docs
#   bash ci/gpu.sh tests -k two_gpus           a part, with arguments of ci/benchmarks/hardware.py
#   bash ci/gpu.sh speed 650M,3B --rounds 3    sizes, and arguments of ci/benchmarks/train_speed.py
# RECIPE=recipes/NAME takes another recipe: its environment, its tests, and its speed where ci/benchmarks/subject.py has its sizes.
# OUT=folder puts numbers and tables there, those of docs/results included, and leaves the pages alone.
# HERE=1 takes the Python that is there with what it has, without a network. PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
part=${1:-}
case $part in ''|tests|speed) ;; *) echo "error: $part is no part: bash ci/gpu.sh [tests or speed]." >&2; exit 2;; esac
[ $# -eq 0 ] || shift
if [ -n "${OUT:-}" ]; then mkdir -p "$OUT"; OUT=$(realpath "$OUT"); fi
cd "$(dirname "$0")/.."
measured=recipes/esm2_native_te
recipe=${RECIPE:-$measured}; recipe=${recipe%/}
[ -f "$recipe/requirements.txt" ] || { echo "error: RECIPE=$recipe: no such recipe; there are" recipes/*/ >&2; exit 2; }
numbers=train_speed
if [ "$recipe" != "$measured" ]; then
  numbers=train_speed_$(basename "$recipe")
  if ! grep -q "^    \"$(basename "$recipe")\": " ci/benchmarks/subject.py; then
    [ "$part" != speed ] || { echo "error: RECIPE=$recipe: ci/benchmarks/subject.py has no sizes of it to measure." >&2; exit 2; }
    part=tests
  fi
fi
export RECIPE=$recipe

if [ -n "${HERE:-}" ]; then
  python=${PYTHON:-python3}
else
  # With the folders that agree with its pins: their tests run too.
  read -r -a words <<< "$("${PYTHON:-python3}" ci/environments.py "$recipe")"
  source ci/environment.sh "gpu${words[0]#test}" "${words[@]:1:${#words[@]}-2}" ci/benchmarks/requirements.txt
  python=python
fi
"$python" - << 'CHECK' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit("error: Python " + sys.version.split()[0] + " is too old; 3.11 or newer is needed: PYTHON=python3.12")
try:
    import torch
except ImportError as error:
    sys.exit(f"error: torch cannot be imported ({error}).")
if not torch.cuda.is_available():
    build = f"for CUDA {torch.version.cuda}; nvidia-smi tells the driver's" if torch.version.cuda else "for CPUs"
    sys.exit(f"error: there is no GPU that torch can use; {torch.__version__} is a build {build}.")
CHECK

failed=()
run() {  # NAME COMMAND...
  echo "--- $1"
  "${@:2}" || failed+=("$1 (exit code $?)")
}
te=$recipe/requirements-te.txt
if [ -z "${HERE:-}" ] && [ -f "$te" ] && [[ " $* " != *" --without-te "* ]] && ! python -c 'import transformer_engine.pytorch' 2> /dev/null
then
  run "installing what compiles TransformerEngine" python -m pip install --quiet setuptools wheel ninja
  run "installing TransformerEngine" \
    python -m pip install --quiet --no-build-isolation -r "$te"
fi
for name in ${OUT:+gpu_tests "$numbers"}; do
  if [ -e "docs/results/$name.json" ] && [ ! -e "$OUT/$name.json" ]; then cp "docs/results/$name.json" "$OUT"; fi
done
if [ "$part" != speed ]; then
  folder=()
  [ "$recipe" = "$measured" ] || folder=("$recipe/")
  run tests "$python" ci/benchmarks/hardware.py ${OUT:+--output "$OUT/gpu_tests.json"} ${folder[@]+"${folder[@]}"} "$@"
fi
if [ "$part" != tests ]; then
  speed=("$python" ci/benchmarks/train_speed.py) numbers=${OUT:-docs/results}/$numbers.json
  sizes=$(python3 ci/benchmarks/subject.py)
  case ${1:-} in [0-9]*) sizes=$1; shift;; esac
  for size in ${sizes//,/ }; do
    run "speed of $size" "${speed[@]}" --device cuda --sizes "$size" --profile 4 --output "$numbers" "$@"
  done
  run "tables of speed" "${speed[@]}" --from "$numbers" \
    --table "${OUT:-docs}/speed.md" --plot "${OUT:-docs/images}/$(basename "$numbers" .json).png"
  [ -n "${OUT:-}" ] || [ "$recipe" != "$measured" ] || run "summary of speed" "${speed[@]}" --from "$numbers" --table README.md
fi
if [ ${#failed[@]} -gt 0 ]; then printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; fi
