#!/usr/bin/env bash
# A real SLURM cluster on one machine, for the tests: munged, slurmctld and several slurmd out of one private folder,
# without systemd, database or cgroups, and without touching /etc or the machine's network. Needs root.
#
# Every node is a pair of kernel namespaces (uts and mount): a host name of its own (node1, ...), and an /etc/hosts of
# its own that knows them all; node K is 127.77.0.K. So the host names in a job differ and resolve, as on a real
# cluster. Whatever runs on a node is found by its namespace and killed with it, also where it has left its job.
#
#   cluster.sh up FOLDER [--nodes N] [--cpus N] [--gpus N] [--owner PID]
#                                    returns when all nodes are idle; goes down with the owner
#   cluster.sh crash FOLDER NODE     SIGKILL to all on it: a power cut, for those who look from outside
#   cluster.sh boot FOLDER NODE      start its slurmd again
#   cluster.sh logs FOLDER           the last lines of all daemons
#   cluster.sh down FOLDER           cancel, stop, kill what is left, delete the folder
#
# What is promised of CPUs and GPUs is a lie that SLURM believes. Clients need SLURM_CONF=FOLDER/slurm.conf. Exit code
# 77: this machine cannot do it, and what is missing is said.
#
# Times are those of a test: a lost node is down after 6 s (SLURM's default: 300), a process that was told to end is
# killed after 15 s (30), and a requeued job may begin again after 5 s (120).
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../machines.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../machines.sh"

(($# >= 2)) || usage
command=$1
mkdir -p -- "$2"
DIR=$(cd -- "$2" && pwd)
shift 2
# Of this cluster, whatever the environment says; and not in a job that this itself may run in.
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}"
export SLURM_CONF=$DIR/slurm.conf

# ---- nodes ----

nodes() { [[ ! -f "$DIR/nodes" ]] || cat "$DIR/nodes"; }

# shellcheck disable=SC2016 # what is in it is for the node's shell
make_node() {
    make_machine "$1" 'mount --bind "$DIR/hosts" /etc/hosts'
    echo "$1" >>"$DIR/nodes"
}

boot() {
    mkdir -p "$DIR/spool/$1"
    # In the foreground (-D) of a process of its own; --wd, since entering a mount namespace leads to / otherwise.
    nsenter --target "$(holder "$1")" --uts --mount --wd="$PWD" -- setsid slurmd -D -N "$1" -f "$SLURM_CONF" \
        </dev/null >>"$DIR/log/slurmd-$1.out" 2>&1 &
    disown "$!"
}

# shellcheck disable=SC2016 # what is in it is for the shell that watches
watch_over() { # what a test run that is killed leaves would stay for ever
    setsid bash -c 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; exec "$2" down "$3"' \
        _ "$1" "$0" "$DIR" </dev/null >/dev/null 2>&1 &
    echo "$!" >"$DIR/watch.pid"
    disown "$!"
}

# ---- daemons ----

check_tools() {
    [[ "$(id -u)" == 0 ]] || cannot "a SLURM cluster for the tests needs root"
    need_tools "slurmctld slurmd slurm-client munge" munged slurmctld slurmd sinfo scontrol sbatch srun
    need_tools util-linux unshare nsenter setsid
}

free_ports() { # the first of $1 ports in a row on which nobody listens
    local number=$1 first=17100 port used
    used=" $(awk 'FNR > 1 && $4 == "0A" {split($2, part, ":"); print part[2]}' /proc/net/tcp /proc/net/tcp6 2>/dev/null |
        while read -r port; do printf '%d ' "0x$port"; done) "
    for ((; first < 30000; first += 100)); do
        for ((port = first; port < first + number; port++)); do [[ "$used" != *" $port "* ]] || continue 2; done
        echo "$first"
        return
    done
    die "no $number free ports in a row"
}

start_munge() {
    # Of its own key and socket: not for anybody who is not of this cluster.
    (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
    munged --force --num-threads=2 --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" \
        --log-file="$DIR/log/munged.log" --pid-file="$DIR/munge/pid" --seed-file="$DIR/munge/seed" ||
        die "munged did not start: $(tail -n 3 "$DIR/log/munged.log")"
}

write_configuration() { # NODES CPUS GPUS FIRST_PORT
    local k gres="" device
    if (($3 > 0)); then
        gres="Gres=gpu:$3"
        # SLURM wants devices; these are twins of /dev/null.
        for ((k = 0; k < $3; k++)); do mknod -m 666 "$DIR/dev/nvidia$k" c 1 3; done
        device=nvidia$( (($3 > 1)) && echo "[0-$(($3 - 1))]" || echo 0)
        echo "Name=gpu File=$DIR/dev/$device" >"$DIR/gres.conf"
    fi
    cat <<TEXT
ClusterName=tests
# Not 1 for every cluster: jobs derive a port from it, and all clusters of a machine share its loopback.
FirstJobId=$((1000 + RANDOM))
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$4
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
SlurmdTimeout=6
SlurmctldTimeout=6
ReturnToService=2
PropagateResourceLimits=NONE
$( (($3 == 0)) || echo GresTypes=gpu)
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10
TEXT
    for k in $(seq "$1"); do
        echo "NodeName=node$k NodeHostname=node$k NodeAddr=127.77.0.$k Port=$(($4 + k)) CPUs=$2 RealMemory=100000 $gres"
    done
}

num_idle() { timeout 5 sinfo --noheader --Node --format='%N %t' 2>/dev/null | awk '$2 == "idle"' | sort -u | wc -l; }

up() {
    local num_nodes=2 cpus=8 gpus=0 owner="" k node end
    while (($# > 0)); do
        case $1 in
            --nodes) num_nodes=$2 ;;
            --cpus) cpus=$2 ;;
            --gpus) gpus=$2 ;;
            --owner) owner=$2 ;;
            *) usage ;;
        esac
        shift 2
    done
    check_tools
    mkdir -p "$DIR"/{ns,state,spool,log,run,munge,dev}
    chmod 755 "$DIR" && chmod 711 "$DIR/munge" # munged refuses a folder that others may write to
    trap 'down >&2' EXIT
    trap 'exit 143' TERM INT HUP
    {
        echo "127.0.0.1 localhost"
        for k in $(seq "$num_nodes"); do echo "127.77.0.$k node$k"; done
    } >"$DIR/hosts"
    for k in $(seq "$num_nodes"); do make_node "node$k"; done
    start_munge
    write_configuration "$num_nodes" "$cpus" "$gpus" "$(free_ports $((num_nodes + 1)))" >"$SLURM_CONF"
    slurmctld -f "$SLURM_CONF" >"$DIR/log/slurmctld.out" 2>&1 || die "no slurmctld: $(cat "$DIR/log/slurmctld.out")"
    for node in $(nodes); do boot "$node"; done
    end=$((SECONDS + 60))
    until [[ "$(num_idle)" == "$num_nodes" ]]; do
        # slurmctld leaves for the background before it reads most of its configuration: its exit code says little.
        ! grep -h fatal: "$DIR"/log/* >&2 || die "a daemon gave up"
        ((SECONDS < end)) || die "not all nodes are idle after 60 s: $(logs)"
        sleep 0.1
    done
    [[ -z "$owner" ]] || watch_over "$owner"
    trap - EXIT TERM INT HUP
}

down() {
    local node pid
    [[ ! -e "$DIR/watch.pid" ]] || [[ "$(cat "$DIR/watch.pid")" == "$$" ]] || kill -9 "$(cat "$DIR/watch.pid")" || true
    if [[ -f "$SLURM_CONF" ]] && pid=$(cat "$DIR/run/slurmctld.pid" 2>/dev/null); then
        timeout 5 scancel --quiet --user=root || true
        timeout 5 scontrol shutdown || true # of all daemons
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        ! grep -qs slurmctld "/proc/$pid/comm" || kill -9 "$pid" 2>/dev/null || true
    fi
    for node in $(nodes); do remove_machine "$node"; done
    [[ ! -S "$DIR/munge/socket" ]] || munged --stop --socket="$DIR/munge/socket" >/dev/null 2>&1 || true
    [[ ! -d "$DIR/munge" ]] || rm -rf -- "$DIR"
}

logs() {
    local file
    for file in "$DIR"/log/*; do
        [[ ! -s "$file" ]] || { echo "== $file" && tail -n 25 "$file"; }
    done
}

case $command in
    up) up "$@" ;;
    crash | boot) (($# == 1)) && "$command" "$1" ;;
    down | logs) "$command" ;;
    *) usage ;;
esac
