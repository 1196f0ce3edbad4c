#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A real Slurm cluster on this one machine, to try sbatch at home: two virtual nodes, no root account of a cluster needed.
#   bash slurm/cluster.sh up [NODES]      start it (2 nodes unless told), then: source slurm/env.sh; sinfo
#   bash slurm/cluster.sh up 1 confined   one that holds jobs to the cores and the memory that they asked for, as clusters do
#   bash slurm/cluster.sh down            stop it and cancel what runs
#   bash slurm/cluster.sh kill NODE       a node falls silent, as a failing machine does; "start NODE" brings it back
#   bash slurm/cluster.sh status
# Needs Debian's or Ubuntu's packages: apt-get install slurm-wlm munge (their own services are not used).
# State and logs lie in $SLURM_HOME, default ~/.local/state/slurm_on_one_machine. Exit code 77: they are not installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=$(realpath -m "${SLURM_HOME:-$HOME/.local/state/slurm_on_one_machine}")
host=$(hostname -s)
export SLURM_CONF=$home/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "error: $*" >&2; exit 1; }
is_ours() { grep -qzxF "SLURM_CONF=$SLURM_CONF" "/proc/$1/environ" 2>/dev/null; }
# A pid file outlives a reboot, and its number may be another process's by now: is it this program, of this cluster?
alive() {  # slurmctld, munged or a node
  local pid program=${1/#node*/slurmd}
  pid=$(cat "$home/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$program" ] && is_ours "$pid"
}
stop() {  # NAME [SIGNAL]
  if alive "$1"; then kill -"${2:-TERM}" "$(cat "$home/$1.pid")" || true; fi
  for _ in $(seq 100); do alive "$1" || break; sleep 0.1; done
  if alive "$1"; then kill -KILL "$(cat "$home/$1.pid")" || true; fi
  rm -f "$home/$1.pid"
}
signal_jobs() {  # NODE SIGNAL
  local file pid
  for file in $(grep -slzxF "SLURMD_NODENAME=$1" /proc/[0-9]*/environ || true); do
    pid=${file//[^0-9]/}
    if is_ours "$pid"; then kill -"$2" "$pid" 2>/dev/null || true; fi
  done
}
node_names() { scontrol show hostnames "$(sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF")"; }
need_node() {
  alive slurmctld || fail "no cluster runs in $home"
  node_names | grep -x "$1" >/dev/null || fail "$1: no such node; there are $(node_names | paste -sd ' ')."
}
wait_for() {  # SECONDS WHAT COMMAND...
  local seconds=$1 what=$2; shift 2
  for _ in $(seq $((seconds * 5))); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  fail "$what did not come up in $seconds s; see the logs in $home"
}
nodes_are_idle() { [ "$(sinfo -h -o %T | sort -u)" = idle ]; }

kill_node() {
  need_node "$1"
  alive "$1" || fail "$1 does not run"
  signal_jobs "$1" STOP  # nothing is heard of them, and their connections are not closed
  stop "$1" KILL
}

start_again() {
  need_node "$1"
  if alive "$1"; then fail "$1 runs"; fi
  signal_jobs "$1" KILL
  start_node "$1"
}

start_node() {
  mkdir -p "$home/spool/$1"
  slurmd -N "$1" -f "$SLURM_CONF" -L "$home/$1.log" || fail "$1 did not start; see $home/$1.log"
}

up() {
  local nodes=${1:-2} kind=${2:-open} program cores memory rules
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "cluster.sh up $nodes: give a number of nodes, 1 or more."
  case $kind in
    open) rules='s|@TASKS@|none|g; s|@GATHER@|none|g; s|@MEMORY_TOO@||g; s|@LIMITS@||g' ;;
    confined)
      rules='s|@TASKS@|affinity|g; s|@GATHER@|linux|g; s|@MEMORY_TOO@|_Memory|g'
      rules+='; s|@LIMITS@|DefMemPerCPU=100\nJobAcctGatherFrequency=task=1\nJobAcctGatherParams=OverMemoryKill|g' ;;
    *) fail "cluster.sh up $nodes $kind: confined, or nothing, comes after the number of nodes." ;;
  esac
  for program in munged mungekey slurmctld slurmd sinfo; do
    command -v "$program" >/dev/null || { echo "error: $program is not installed: apt-get install slurm-wlm munge" >&2; exit 77; }
  done
  if alive slurmctld; then fail "a cluster runs already in $home; bash slurm/cluster.sh down stops it."; fi
  if (exec 3<> /dev/tcp/127.0.0.1/17001) 2> /dev/null; then
    fail "port 17001 is taken: another cluster of this script, with another SLURM_HOME?"
  fi
  mkdir -p "$home/state" && chmod 700 "$home"
  [ -s "$home/munge.key" ] || mungekey --create --keyfile="$home/munge.key"
  # A node has an equal share of cores and memory; at least one core, also where nodes outnumber them.
  cores=$(( $(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) / nodes )); cores=$(( cores > 0 ? cores : 1 ))
  memory=$(( $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) / nodes ))
  sed -e "s|@HOME@|$home|g; s|@HOST@|$host|g; s|@USER@|$(id -un)|g; s|@LAST@|$nodes|g; s|@CORES@|$cores|g" \
    -e "s|@MEMORY@|$memory|g; s|@PORTS@|17011-$((17010 + nodes))|g; $rules" "$here/slurm.conf.template" > "$SLURM_CONF"
  [ "$nodes" -gt 1 ] || sed -i 's/\[1-1\]/1/; s/\[17011-17011\]/17011/' "$SLURM_CONF"
  trap 'down || true' EXIT  # until all is up
  touch "$home"/gpu{0..7}  # in name only: what asks for eight GPUs a node is accepted
  echo "Name=gpu File=$home/gpu[0-7]" > "$home/gres.conf"
  if ! alive munged; then
    munged --key-file="$home/munge.key" --socket="$home/munge.socket" --pid-file="$home/munged.pid" \
      --log-file="$home/munged.log" --seed-file="$home/munged.seed" --force 2>> "$home/munged.log" ||
      fail "munged did not start; see $home/munged.log"
  fi
  wait_for 20 "munged" test -S "$home/munge.socket"
  slurmctld -c -f "$SLURM_CONF" -L "$home/slurmctld.log" || fail "slurmctld did not start; see $home/slurmctld.log"
  for i in $(seq "$nodes"); do start_node "node$i"; done
  wait_for 60 "the cluster" nodes_are_idle
  trap - EXIT
  sinfo
  echo "To use it in this shell: source slurm/env.sh"
}

down() {
  local file pid program
  if alive slurmctld; then timeout 10 scancel --user="$(id -un)" 2>/dev/null || true; sleep 1; fi
  for file in "$home"/node*.pid; do if [ -e "$file" ]; then stop "$(basename "$file" .pid)"; fi; done
  stop slurmctld; stop munged
  # What a killed node left behind, or what had no time to write its pid file.
  for file in "$home"/spool/*; do signal_jobs "$(basename "$file")" KILL; done
  for program in slurmd slurmstepd slurmctld slurmscriptd munged; do
    for pid in $(pgrep -x "$program" || true); do
      if is_ours "$pid"; then kill -KILL "$pid" 2>/dev/null || true; fi
    done
  done
  rm -rf "$home/state" "$home/munge.socket" "$home"/spool
}

case ${1:-} in
  up) up "${2:-2}" "${3:-open}" ;;
  down) down ;;
  kill) kill_node "${2:?which node?}" ;;
  start) start_again "${2:?which node?}" ;;
  status) if alive slurmctld; then sinfo; squeue; else echo "no cluster runs in $home"; exit 1; fi ;;
  *) sed -n '3,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
