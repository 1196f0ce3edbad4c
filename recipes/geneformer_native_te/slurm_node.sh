#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What slurm.sh starts on each node: torchrun, with as many processes as the node has GPUs, or one.
# Usage: slurm_node.sh TRAINER ARGUMENTS...
set -uo pipefail

asked=0 go_on_later=0 meeting_place='' rendezvous=()
trap 'asked=1 go_on_later=1' USR1
trap 'asked=1' TERM
unheard() { trap '' USR1 TERM; exec "$@"; }  # in a process of its own

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"; [ -z "$meeting_place" ] || kill -KILL "$meeting_place"' EXIT
export STOPPED_EARLY=$scratch/stopped_early  # the trainer makes this file when it leaves before its last step

processes=${SLURM_GPUS_ON_NODE:-1}
(unheard nvidia-smi -L) > /dev/null 2>&1 || processes=1
# torchrun sets one thread a process, unless told.
[ "$processes" -eq 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}"

# Where nodes meet is a process of its own on the first: hosted by torchrun, as it would be, it is gone while others still say
# goodbye, and a run that ended well ends in a page of errors.
if [ "$SLURM_NNODES" -gt 1 ]; then
  rendezvous=(--rdzv-conf=is_host=0)
  if [ "$SLURM_NODEID" -eq 0 ]; then
    unheard python -c "import signal, torch.distributed as d
store = d.TCPStore('localhost', ${RDZV_ENDPOINT##*:}, is_master=True, wait_for_workers=False)
signal.pause()" &
    meeting_place=$!
  fi
fi

# torchrun kills its processes 30 s after it is told to stop, and fails. So it hears nothing of it: the processes are told, save
# after their step and leave, and torchrun ends with them. Slurm sends USR1 shortly before the time limit (--signal), and TERM when
# the job is to end for good, to some or all of the processes, depending on its plugins.
unheard torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" \
  ${rendezvous[@]+"${rendezvous[@]}"} "$@" &
agent=$!

# Told again and again: a process that still loads its data or its model does not hear it.
while kill -0 "$agent" 2> /dev/null; do
  if [ $asked -eq 1 ]; then
    # shellcheck disable=SC2013  # words are meant
    for pid in $(cat /proc/"$agent"/task/*/children 2> /dev/null); do kill -USR1 "$pid" 2> /dev/null; done
  fi
  (unheard sleep 2)
done
wait "$agent"; status=$?
[ -z "$meeting_place" ] || [ $status -ne 0 ] || (unheard sleep 3)
# A run that had come to its end all the same is not to begin again.
[ $status -eq 0 ] && [ $go_on_later -eq 1 ] && [ -e "$STOPPED_EARLY" ] && exit 75
exit $status
