#!/usr/bin/env bash
# Hosts with addresses of their own on one Linux machine, for the tests of launches over several. Needs root, iproute2.
#
# Each host is three kernel namespaces: net (eth0 with 10.77.0.K, a loopback and ports of its own), uts (its name, hK)
# and mount (an /etc/hosts of its own that knows all hosts). Cables lead from them to one switch, a bridge in a net
# namespace of its own. The machine's own network is not touched, and no host reaches anything but the others. All hosts
# see the same files.
#
#   hosts.sh up FOLDER N            N hosts
#   hosts.sh exec FOLDER HOST CMD   CMD on HOST, without a fork: its process is the caller's child
#   hosts.sh cut FOLDER HOST        unplug the cable at the switch: the others just hear nothing any more
#   hosts.sh heal FOLDER HOST       plug it in again
#   hosts.sh crash FOLDER HOST      SIGKILL to all on it
#   hosts.sh down FOLDER            kill what is left, delete the folder; the kernel then frees the namespaces
#
# Exit code 77: this machine cannot do it, and what is missing is said.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../machines.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../machines.sh"

(($# >= 2)) || usage
command=$1
mkdir -p -- "$2"
DIR=$(cd -- "$2" && pwd)
shift 2

on_switch() { nsenter --target "$(holder switch)" --net "$@"; }

# shellcheck disable=SC2016 # what is in it is for the host's shell
make_host() {
    make_machine "$1" '
        ip link set lo up
        cp "$DIR/etc.hosts" "$DIR/$name.hosts"
        mount --bind "$DIR/$name.hosts" /etc/hosts
        mount --bind "$DIR/resolv.conf" /etc/resolv.conf' --net
}

plug() { # HOST: a cable from its eth0 to the switch
    on_switch ip link add "v$1" type veth peer name eth0 netns "$(holder "$1")"
    on_switch ip link set "v$1" master br0 up
    nsenter --target "$(holder "$1")" --net ip addr add "10.77.0.${1#h}/24" dev eth0
    nsenter --target "$(holder "$1")" --net ip link set eth0 up
}

up() {
    local k
    [[ "$(id -u)" == 0 ]] || cannot "hosts of their own for the tests need root"
    need_tools "iproute2 util-linux" ip unshare nsenter setsid
    unshare --net --uts --mount ip link add br0 type bridge 2>/dev/null || cannot "no namespaces, or no bridges, here"
    trap 'down >&2' EXIT
    trap 'exit 143' TERM INT HUP
    {
        echo "127.0.0.1 localhost"
        for k in $(seq "$1"); do echo "10.77.0.$k h$k"; done
    } >"$DIR/etc.hosts"
    # No name server is reached: ask on the host itself, where none answers at once, and do not wait for one.
    echo "nameserver 127.0.0.1" >"$DIR/resolv.conf"
    make_host switch
    # A new port forwards at once instead of after 2 x 15 s.
    on_switch ip link add br0 type bridge forward_delay 0
    on_switch ip link set br0 up
    for k in $(seq "$1"); do
        make_host "h$k"
        plug "h$k"
    done
    trap - EXIT TERM INT HUP
}

down() {
    local file
    for file in "$DIR"/ns/*.pid; do
        [[ ! -e "$file" ]] || remove_machine "$(basename -- "$file" .pid)"
    done
    [[ ! -e "$DIR/etc.hosts" ]] || rm -rf -- "$DIR"
}

case $command in
    up) (($# == 1)) && up "$1" ;;
    exec)
        (($# >= 2)) || usage
        host=$1
        shift
        # --wd, since entering a mount namespace leads to / otherwise.
        exec nsenter --target "$(holder "$host")" --net --uts --mount --wd="$PWD" -- "$@"
        ;;
    cut) on_switch ip link set "v$1" down ;;
    heal) on_switch ip link set "v$1" up ;;
    crash) crash "$1" ;;
    down) down ;;
    *) usage ;;
esac
