#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=torchrun.sh
source "$ROOT/launch/torchrun.sh"

usage() {
    cat <<'TEXT'
Run a script under torchrun on as many machines as there are, between two bounds: the same line on each of them.

  NNODES=1:4 HEAD=node1 bash launch/elastic.sh [--fast-dir[=FOLDER]] SCRIPT [arguments of the script]

If a machine goes or comes, or a rank fails, all ranks are started again on those that are there; the script goes on
from its newest checkpoint (Checkpoint.resume), in a folder that all machines share. A machine whose torchrun ends by an
error joins again. HEAD must stay: the ranks meet there. SIGUSR1, SIGUSR2 and SIGTERM end it, and its ranks have two
minutes to save.

  --fast-dir        a folder of this run's own in /dev/shm, or in FOLDER, for Checkpoint(placement="node"): its name is in
                    DENGINE_FAST_DIR. It is removed when this line ends, and stays while the ranks are started again.
  NNODES            least and largest number of machines, as 1:4
  HEAD              name or address of the first, by which the others reach it
  RESTARTS          how often the ranks, and each torchrun, are begun again after a failure (default: 10)
  LAST_CALL         seconds for which those that are enough wait for more (default: 30)
  PORT              the port on HEAD (default: 29400)
  RUN_ID            distinguishes this run from others on the same machines (default: dengine)
  NPROC=n           number of processes on this machine instead
  OMP_NUM_THREADS   CPU threads per process (default without a GPU: 1)
  DENGINE_VENV      the environment's folder (default: .venv of this repository); it is to be there already
TEXT
}

case "${1:-}" in -h | --help) usage; exit ;; esac
fast_dirs=""
case "${1:-}" in
    --fast-dir) fast_dirs=/dev/shm ;;
    --fast-dir=*) fast_dirs=${1#*=} ;;
esac
[[ -z "$fast_dirs" ]] || shift
check_script "$@"
check_processes
[[ "${NNODES:-}" =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "NNODES=${NNODES:-} must be two numbers of machines, as 1:4"
for name in RESTARTS LAST_CALL; do check_number "$name"; done
restarts=${RESTARTS:-10}
meeting_command ",last_call_timeout=${LAST_CALL:-30}" "--max-restarts=$restarts"
command+=("$@")
show_command

if [[ -n "$fast_dirs" ]]; then
    export DENGINE_FAST_DIR=$fast_dirs/dengine-$UID-${RUN_ID:-dengine}
    [[ -d "$DENGINE_FAST_DIR" ]] || mkdir -m 700 -- "$DENGINE_FAST_DIR" ||
        fail "no folder can be made in $fast_dirs: give --fast-dir=FOLDER"
    trap 'rm -rf -- "$DENGINE_FAST_DIR"' EXIT
fi
agent="" received=""
for name in TERM INT HUP USR1 USR2; do
    # shellcheck disable=SC2064 # which signal it is, is known now
    trap "received=$name; [[ -z \"\$agent\" ]] || kill -s $name \"\$agent\" 2>/dev/null || true" "$name"
done
for ((attempt = 1; ; attempt++)); do
    "${command[@]}" &
    agent=$!
    [[ -z "$received" ]] || kill -s "$received" "$agent" 2>/dev/null || true # it came before there was an agent
    code=0 own=0
    while kill -0 "$agent" 2>/dev/null; do
        code=0
        wait "$agent" || code=$?
    done
    # `wait` returns at a signal, too, with that signal's code, even if the agent ends at that moment: so it is called
    # again once the agent has ended. If both came at once, bash has lost the agent's code, and gives -1.
    wait "$agent" || own=$?
    ((own < 0)) || code=$own
    agent=""
    if ((code == 0)) || [[ -n "$received" ]] || ((attempt > restarts)); then
        exit "$code"
    fi
    say "torchrun ended with $code; it joins again, for the ${attempt}. time of $restarts"
    sleep 3
done
