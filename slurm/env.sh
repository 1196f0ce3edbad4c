# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0
# source slurm/env.sh: let sbatch, squeue and the others of this shell speak to the cluster of slurm/cluster.sh.
SLURM_CONF=$(realpath -m "${SLURM_HOME:-$HOME/.local/state/slurm_on_one_machine}")/slurm.conf
export SLURM_CONF
