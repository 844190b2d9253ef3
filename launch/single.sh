#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=torchrun.sh
source "$ROOT/launch/torchrun.sh"

usage() {
    cat <<'TEXT'
Install what is needed, then run a script under torchrun on this machine.

  bash launch/single.sh SCRIPT [arguments of the script]
  bash launch/single.sh --install      install only, as multinode.sh and elastic.sh need it

One process per GPU, or two on a machine without one. SIGUSR1, SIGUSR2 and SIGTERM reach the script, which has two
minutes to save then.

  NPROC=n           number of processes instead
  OMP_NUM_THREADS   CPU threads per process (default without a GPU: 1)
  PYTHON            the Python to make the environment with (default: the first of 3.10 or newer on PATH)
  DENGINE_VENV      the environment's folder (default: .venv of this repository)
TEXT
}

case "${1:-}" in
    -h | --help) usage; exit ;;
    --install) set_up examples; exit ;;
esac
check_script "$@"
check_processes
set_up examples
# By address: a machine's own name may lead nowhere, as in some containers.
torchrun_command --standalone --local-addr=127.0.0.1
command+=("$@")
show_command
exec "${command[@]}"
