#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to a trained protein language model, on any machine with Python 3.11 or newer. Arguments are passed on
# to the trainer: bash ci/quickstart.sh num_train_steps=500
# RECIPE=recipes/NAME trains the small model of another recipe, and draws its curves.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${RECIPE:-recipes/esm2_native_te} name=quickstart
[ -f "$recipe/train_fsdp2.py" ] || { echo "error: RECIPE=$recipe: no such recipe; there are" recipes/*/ >&2; exit 2; }
[ -z "${RECIPE:-}" ] || name=quickstart-$(basename "$recipe")
source ci/environment.sh "$name" "$recipe/requirements.txt"
run=$PWD/outputs/$name
if [ -e "$run" ]; then mv "$run" "$run.$(date +%Y%m%d-%H%M%S)"; fi
cd "$recipe"
# Half the cores for each of the two processes.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')}
export OMP_NUM_THREADS

echo "--- Training $(basename "$recipe") on its bundled sample, two processes"
torchrun --nproc_per_node=2 train_fsdp2.py --config-name L0_sanity \
  checkpoint.ckpt_dir="$run" checkpoint.save_every_n_steps=50 checkpoint.save_final_model=true logger.log_dir="$run" "$@"

if [ "$(basename "$recipe")" != esm2_native_te ]; then
  python plot_metrics.py "$run"
  echo "--- Done in $((SECONDS / 60)) min $((SECONDS % 60)) s; curves and the final model are in $run"
  exit
fi
echo "--- What it has learnt"
python ../../ci/report.py "$run" data/train.parquet data/validation.parquet

echo "--- Opening the final model where only transformers is imported"
cd "$run"
python "$OLDPWD/../../ci/fill_masks.py" final_model
echo "--- Done in $((SECONDS / 60)) min $((SECONDS % 60)) s; curves in $run/metrics.png, numbers in $run/summary.json"
