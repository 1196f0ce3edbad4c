#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sbatch slurm.sh                                          two nodes, FSDP2, the 650M configuration
# sbatch --nodes=4 slurm.sh --config-name L1_3B seed=1     what follows the name goes to the trainer
# TRAINER=train_ddp.py sbatch slurm.sh
#SBATCH --job-name=esm2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}"

# ---- environment: change this part to match your cluster
# source /path/to/venv/bin/activate
# ----

trainer=${TRAINER:-train_fsdp2.py}
[ -f "$trainer" ] || { echo "error: TRAINER=$trainer: no such file in $PWD" >&2; exit 2; }
[ $# -gt 0 ] || set -- --config-name L1_650M
gpus=${SLURM_GPUS_ON_NODE:-0}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# TERM reaches torchrun two minutes before the time is up; it passes it on, and the run saves and leaves after its step.
# shellcheck disable=SC2016  # SLURM_NODEID is each node's own
srun bash -c 'exec torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$0" --node-rank="$SLURM_NODEID" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$1:$2" "${@:3}"' \
  "$((gpus > 0 ? gpus : 1))" "$first" "$port" "$trainer" "$@"
