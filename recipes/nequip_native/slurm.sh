#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sbatch slurm.sh                                          two nodes, FSDP2, the bundled alloys
# sbatch --nodes=4 slurm.sh --config-name L0_sanity micro_batches_per_step=32     what follows the name goes to the trainer
# TRAINER=train_ddp.py sbatch slurm.sh
# SWEEP=sweep.txt sbatch --array=1-4 --output=%x-%A_%a.out slurm.sh     one run for each line; then: python compare_runs.py
# Most clusters want to know more: --partition=NAME --account=NAME.
#SBATCH --job-name=nequip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# All cores and all memory of each node: without these two a job has one core. For a part of a node give others when you submit:
# sbatch --oversubscribe --nodes=1 --gpus-per-node=1 --cpus-per-task=16 --mem=100G slurm.sh
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}"
container=() inside=()

# ---- environment: change this part to match your cluster
# source /path/to/venv/bin/activate
# In a container, which needs this folder, the data and ckpt_dir at the same place inside; with Pyxis or with Apptainer:
# container=(--container-image=/path/to/image.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# inside=(apptainer exec --nv --bind "$PWD" /path/to/image.sif)
# ----

stop() { echo "error: $*" >&2; exit 2; }
trainer=${TRAINER:-train_fsdp2.py}
[ -f "$trainer" ] || stop "TRAINER=$trainer: no such file in $PWD"
[ $# -gt 0 ] || set -- micro_batches_per_step=null --config-name L0_sanity
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  sweep=${SWEEP:-sweep.txt}
  [ -f "$sweep" ] || stop "SWEEP=$sweep: no such file in $PWD; each of its lines has the overrides of one run"
  line=$(grep -v '^[[:space:]]*\(#\|$\)' "$sweep" | sed -n "${SLURM_ARRAY_TASK_ID}p") || true
  [ -n "$line" ] || stop "--array: $sweep has no run $SLURM_ARRAY_TASK_ID"
  echo "Run $SLURM_ARRAY_TASK_ID of $sweep: $line"
  # Spaces and quotes as in a shell, but nothing is expanded or run.
  words=$(xargs printf '%s\n' <<< "$line" 2> /dev/null) || stop "$sweep: a quote is not closed in: $line"
  mapfile -t overrides <<< "$words"
  folder=outputs/sweep_$SLURM_ARRAY_JOB_ID/run_$SLURM_ARRAY_TASK_ID
  set -- "$@" "logger.log_dir=$folder" "checkpoint.ckpt_dir=$folder" "${overrides[@]}"
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export RDZV_ENDPOINT=${address:-$first}:$((20000 + SLURM_JOB_ID % 20000))
# What the job has of each node, the smallest number where nodes differ: "64(x2),32". A step would take one core by itself.
cores=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p)

status=0
srun --cpus-per-task="$cores" --cpu-bind=cores ${container[@]+"${container[@]}"} ${inside[@]+"${inside[@]}"} bash slurm_node.sh "$trainer" "$@" || status=$?
# 75: SIGUSR1 came, from Slurm shortly before the time limit (--signal above) or by hand, and all is saved.
if [ $status -eq 75 ]; then
  echo "Stopped by SIGUSR1, sent before the time limit or by hand: saved, and requeued to resume from there."
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60  # for Slurm to end this script
fi
exit $status
