#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to a trained protein language model, on any machine with Python 3.11 or newer. Arguments are passed on
# to the trainer: bash ci/quickstart.sh num_train_steps=500
set -euo pipefail
cd "$(dirname "$0")/.."
source ci/environment.sh quickstart recipes/esm2_native_te/requirements.txt
run=$PWD/outputs/quickstart
if [ -e "$run" ]; then mv "$run" "$run.$(date +%Y%m%d-%H%M%S)"; fi
cd recipes/esm2_native_te
# Half the cores for each of the two processes.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')}
export OMP_NUM_THREADS

echo "--- Training a small ESM-2 on the bundled sample, two processes"
torchrun --nproc_per_node=2 train_fsdp2.py --config-name L0_sanity \
  checkpoint.ckpt_dir="$run" checkpoint.save_every_n_steps=50 checkpoint.save_final_model=true logger.log_dir="$run" "$@"

echo "--- What it has learnt"
python ../../ci/report.py "$run" data/train.parquet data/validation.parquet

echo "--- Opening the final model where only transformers is imported"
cd "$run"
python "$OLDPWD/../../ci/fill_masks.py" final_model
echo "--- Done in $((SECONDS / 60)) min $((SECONDS % 60)) s; curves in $run/metrics.png, numbers in $run/summary.json"
