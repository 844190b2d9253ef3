#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

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

num_processes="${NPROC:-}"
[[ -z "$num_processes" || "$num_processes" =~ ^[1-9][0-9]*$ ]] ||
    fail "NPROC=$num_processes is no number of processes: give 1 or more, or unset it for one per GPU"

set_up examples

num_gpus="$("$VENV_PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if ((num_gpus == 0)); then
    # PyTorch would start one thread per core in every process, and they would fight for the cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    : "${num_processes:=2}"
fi
: "${num_processes:=$num_gpus}"

# Through the environment's python: torchrun's own first line breaks when the repository is moved.
# A scheduler's warning is to reach the ranks, and they are to have the time to save: SIGUSR1 would else kill torchrun
# and leave its workers behind.
command=("$VENV_PYTHON" "$VENV/bin/torchrun" --standalone "--nproc-per-node=$num_processes"
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2" --shutdown-timeout=120
    "$ROOT/examples/digits.py" "$@")
# Short where it can be: seen from this folder, the printed line does the same.
printed="$(printf ' %q' "${command[@]#"$PWD/"}")"
printf '%s\n' "${OMP_NUM_THREADS:+OMP_NUM_THREADS=$OMP_NUM_THREADS }${printed# }"
exec "${command[@]}"
