#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=torchrun.sh
source "$ROOT/launch/torchrun.sh"

usage() {
    cat <<'TEXT'
Install what is needed, then train examples/digits.py under torchrun.

  bash launch/quickstart.sh [arguments of examples/digits.py]

One process per GPU, or two on a machine without one. What is installed stays in one virtual environment.

  NPROC=n           number of processes instead
  OMP_NUM_THREADS   CPU threads per process (default without a GPU: 1)
  PYTHON            the Python to make the environment with (default: the first of 3.10 or newer on PATH)
  DENGINE_VENV      the environment's folder (default: .venv of this repository)
TEXT
}

for argument in "$@"; do
    case "$argument" in -h | --help) usage; exit ;; esac
done

check_processes
set_up examples
# By address: a machine's own name may lead nowhere, as in some containers.
torchrun_command --standalone --local-addr=127.0.0.1
command+=("$ROOT/examples/digits.py" "$@")
show_command
exec "${command[@]}"
