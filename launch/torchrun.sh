# shellcheck shell=bash
# Sourced, after common.sh, by the scripts that train: torchrun as they all call it.
#
#   check_script "$@"           there is a script to run
#   check_number NAME           the variable of that name is empty, or a whole number
#   torchrun_command OPTION...  sets $command to torchrun with these, NPROC processes, and what signals need
#   meeting_command CONF OPTION...   the same for NNODES machines that meet at HEAD:PORT; CONF goes on --rdzv-conf
#   show_command                prints it so that it can be typed
#
# Environment: NPROC (processes on this machine; default: one per GPU, or two without any); see multinode.sh for others.

check_script() {
    (($# > 0)) || fail "no script to run: see --help"
    [[ -f "$1" ]] || fail "there is no script $1 in $PWD"
}

check_number() {
    [[ -z "${!1:-}" || "${!1}" =~ ^[0-9]+$ ]] || fail "$1=${!1} is no whole number"
}

check_processes() {
    [[ -z "${NPROC:-}" || "$NPROC" =~ ^[1-9][0-9]*$ ]] ||
        fail "NPROC=$NPROC is no number of processes: give 1 or more, or unset it for one per GPU"
}

# Machines that share a folder would install into it at the same time, so the scripts for several install nothing.
# It looks for PyTorch but does not import it, which takes seconds.
need_environment() {
    "$VENV_PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null ||
        fail "no environment with PyTorch in $VENV: make it once with bash launch/single.sh --install" \
            "or set DENGINE_VENV to one"
}

torchrun_command() {
    local num_processes=${NPROC:-} num_gpus=""
    [[ -n "$num_processes" && -n "${OMP_NUM_THREADS:-}" ]] || num_gpus="$(count_gpus)" # an import of PyTorch
    if [[ "$num_gpus" == 0 ]]; then
        # PyTorch would start one thread per core in every process, and they would fight for the cores.
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        : "${num_processes:=2}"
    fi
    : "${num_processes:=$num_gpus}"
    # Rank 0 is to host the store, and not the agent, which keeps it over a restart, and its address with it: an agent that
    # joins again would wait in vain for the others to say it. And if an agent is killed, its ranks still save.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Through the environment's python: torchrun's own first line breaks when the repository is moved.
    # A scheduler's warning is to reach the ranks, and they are to have the time to save: SIGUSR1 would else kill
    # torchrun without ending its workers.
    # shellcheck disable=SC2034 # for who sources this
    command=("$VENV_PYTHON" "$VENV/bin/torchrun" "$@" "--nproc-per-node=$num_processes"
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2" --shutdown-timeout=120)
}

meeting_command() {
    local conf=$1
    shift
    check_number PORT
    need_environment
    find_head
    torchrun_command "--nnodes=$NNODES" --rdzv-backend=c10d "--rdzv-endpoint=$HEAD:${PORT:-29400}" \
        "--rdzv-id=${RUN_ID:-dengine}" "--rdzv-conf=is_host=$is_head$conf" "$@"
}

show_command() {
    # Short if it can be: seen from this folder, the printed line does the same.
    local printed
    printed="$(printf ' %q' "${command[@]#"$PWD/"}")"
    printf '%s\n' "${OMP_NUM_THREADS:+OMP_NUM_THREADS=$OMP_NUM_THREADS }TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1${printed}"
}

# Sets $is_head: HEAD is this machine if its name, or address, stands for an address that is ours. Asked here because
# torchrun goes by this machine's own name: Debian gives it 127.0.1.1, and no machine then takes itself for the host.
find_head() {
    [[ -n "${HEAD:-}" ]] || fail "HEAD is not set: give the name or address of the first machine; see --help"
    is_head="$("$VENV_PYTHON" -c '
import socket, sys
try:
    found = socket.getaddrinfo(sys.argv[1], 0, type=socket.SOCK_DGRAM)
except OSError as error:
    sys.exit(str(error))
for family, kind, _, _, address in found:
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(address)
        except OSError:
            continue
        sys.exit(print("true"))
print("false")
' "$HEAD")" || fail "HEAD=$HEAD is not known here: give a name that every machine knows, or an address"
}
