#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=torchrun.sh
source "$ROOT/launch/torchrun.sh"

usage() {
    cat <<'TEXT'
Run a script under torchrun on several machines: the same line on each of them, in any order, within a minute.

  NNODES=2 HEAD=node1 bash launch/multinode.sh SCRIPT [arguments of the script]

The script, and what it needs, lie at the same place everywhere. One process per GPU, or two on a machine without one.
SIGUSR1, SIGUSR2 and SIGTERM to one torchrun reach its ranks, which have two minutes to save then.

  NNODES            number of machines
  HEAD              name or address of the first, by which the others reach it: there the ranks meet
  PORT              the port there (default: 29400)
  RUN_ID            distinguishes this run from others on the same machines (default: dengine)
  NPROC=n           number of processes on this machine instead
  OMP_NUM_THREADS   CPU threads per process (default without a GPU: 1)
  DENGINE_VENV      the environment's folder (default: .venv of this repository); it is to be there already
TEXT
}

case "${1:-}" in -h | --help) usage; exit ;; esac
check_script "$@"
check_processes
[[ "${NNODES:-}" =~ ^[1-9][0-9]*$ ]] || fail "NNODES=${NNODES:-} is no number of machines: see --help"
meeting_command ""
command+=("$@")
show_command
exec "${command[@]}"
