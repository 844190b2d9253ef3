# shellcheck shell=bash
# Sourced by hosts/hosts.sh and slurm/cluster.sh: machines within this one. Each is a few kernel namespaces, a host name
# of its own among them, that a sleep holds open. Whatever runs on one is found by its namespace and killed with it.
# All state is in $DIR/ns.
#
#   make_machine NAME SETUP [OPTION...]   SETUP: shell commands on it, with $name and $DIR; OPTIONs go to unshare
#   holder NAME                           the process that holds it open
#   crash NAME                            SIGKILL to all on it
#   remove_machine NAME                   and an end to it
#   die, cannot, usage                    the ends of the script that sources this

die() { echo "$(basename -- "$0"): $*" >&2; exit 1; }
cannot() {
    echo "$*" >&2
    rmdir -- "$DIR" 2>/dev/null || true # where nothing was begun yet
    exit 77
}
usage() { sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

need_tools() { # PACKAGES TOOL...
    local packages=$1 tool
    shift
    for tool in "$@"; do
        command -v "$tool" >/dev/null || cannot "no $tool: apt-get install -y --no-install-recommends $packages"
    done
}

holder() { cat "$DIR/ns/$1.pid"; }

make_machine() {
    local name=$1 setup=$2 pid
    shift 2
    mkdir -p "$DIR/ns"
    # Not with our output, or who reads it through a pipe would wait for ever. The sleep ends where nobody ends it.
    name=$name DIR=$DIR setsid unshare "$@" --uts --mount --propagation private bash -c "
        set -e
        hostname \"\$name\"
        $setup
        touch \"\$DIR/ns/\$name.ready\"
        exec sleep 21600" </dev/null >"$DIR/ns/$name.log" 2>&1 &
    pid=$!
    disown "$pid"
    until [[ -e "$DIR/ns/$name.ready" ]]; do
        kill -0 "$pid" 2>/dev/null || cannot "no namespaces for this user: $(cat "$DIR/ns/$name.log")"
        sleep 0.02
    done
    echo "$pid" >"$DIR/ns/$name.pid"
}

inside() { # the processes of a machine, its holder excepted
    local pid
    pid=$(holder "$1")
    find /proc/[0-9]*/ns/uts -maxdepth 0 -printf '%l %p\n' 2>/dev/null |
        awk -F '[ /]' -v ns="$(readlink "/proc/$pid/ns/uts")" -v holder="$pid" \
            'ns != "" && $1 == ns && $4 != holder { print $4 }' || true
}

crash() {
    local left pid
    for _ in $(seq 50); do # again: one may have started another between the look and the kill
        left=$(inside "$1")
        [[ -n "$left" ]] || return 0
        for pid in $left; do kill -9 "$pid" 2>/dev/null || true; done
        sleep 0.05
    done
    echo "$(basename -- "$0"): still on $1 after SIGKILL: $left" >&2
}

remove_machine() {
    crash "$1"
    kill -9 "$(holder "$1")" 2>/dev/null || true
}
