"""Find the network interface that leads to the other hosts, if the name of this host does not say so."""

import os
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dengine.launch.env import Launch

__all__ = [
    "address_towards",
    "chosen_interface",
    "interface_to",
    "interfaces",
    "is_reached_by_name",
    "network_of_this_host",
]

_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>
# An address reserved for documentation, which no host has: to find the route that leads out. Nothing is sent.
_OUTSIDE = "192.0.2.1"


def chosen_interface(env: Mapping[str, str], launch: Launch | None) -> str | None:
    """The interface for Gloo: `GLOO_SOCKET_IFNAME`, or one found here if there are several hosts. None: Gloo
    chooses.
    """
    named = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named or launch is None or launch.local_size == launch.size:
        return named or None
    return interface_to(launch.master_addr)


def interface_to(master_addr: str) -> str | None:
    """The name of the interface through which the hosts reach each other; None if Gloo finds it itself.

    Gloo takes the address of the host's own name. On Debian that is 127.0.1.1, and in some images there is none: then
    the other hosts would look for this one on themselves. So this gives the interface that leads to the master; on the
    master, the one that leads out, or the only one. It is for `GLOO_SOCKET_IFNAME`, if that is not set. Linux only;
    None on other systems.
    """
    if sys.platform != "linux" or not _is_loopback(socket.gethostname()):
        return None
    found = {address: name for name, address in interfaces().items() if not address.startswith("127.")}
    for target in (master_addr, _OUTSIDE):
        name = found.get(address_towards(target))
        if name is not None:
            return name
    return next(iter(found.values())) if len(found) == 1 else None


def is_reached_by_name(env: Mapping[str, str]) -> bool:
    """Whether Gloo, by itself or by `GLOO_SOCKET_IFNAME`, gives other hosts an address that is not a loopback."""
    return bool(env.get("GLOO_SOCKET_IFNAME")) or sys.platform != "linux" or not _is_loopback(socket.gethostname())


def network_of_this_host() -> str:
    """An identifier that two processes share if they share a loopback interface; not on Linux, the host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot + os.readlink("/proc/self/ns/net")  # containers of one machine may have networks of their own
    except OSError:
        return socket.gethostname()


def address_towards(target: str) -> str:
    """The address of this host from which it would send packets to `target`; "" if it cannot. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((target, 9))
        return str(probe.getsockname()[0])
    return ""


def interfaces() -> dict[str, str]:
    """The IPv4 address of each interface, by the name of the interface. Empty if the system is not Linux."""
    if sys.platform != "linux":
        return {}
    import fcntl  # not on every system

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _is_loopback(host: str) -> bool:
    """Whether `host` has only loopback addresses. Not all of 127/8 counts: tests use some of them as hosts."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return True
    return all(address.startswith("127.0.") or address == "::1" for address in addresses)
