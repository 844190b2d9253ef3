"""The store of a launch, through which its ranks find each other."""

import errno
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from dengine.launch.env import Launch, is_agents_store
from dengine.torch_internals import LIBUV_TAKES_LISTENER, TCPStore

__all__ = ["open_store"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_WAIT_S = 0.005, 0.05, 5.0
_BACKLOG = 4096  # ranks may all come at once; the kernel's own limit is the lower one


def open_store(launch: Launch, timeout_s: float) -> TCPStore:
    """Connect to the store: the agent's under torchrun, else rank 0's, which lives as long as a connection is open.

    Does not wait for the other ranks, so that the caller can name those that are missing.

    Raises: OSError, DistError: it cannot be hosted, or not be reached within `timeout_s`.
    """
    address = (launch.master_addr, launch.master_port)
    is_host = launch.rank == 0 and not is_agents_store(os.environ)
    # If this process hosts a store at this port already, torch makes both share that server.
    options: dict[str, Any] = {
        "is_master": is_host,
        "timeout": timedelta(seconds=timeout_s),
        "wait_for_workers": False,
        "multi_tenant": is_host,
    }
    if is_host and (listener := _listening(address, is_one_host=launch.local_size == launch.size)) is not None:
        options["master_listen_fd"] = listener.detach()  # the store's, even if it cannot be made
        options["use_libuv"] = LIBUV_TAKES_LISTENER
    elif not is_host and launch.local_size == launch.size:
        _await_listener(address, timeout_s)
    return TCPStore(*address, launch.size, **options)


def _await_listener(address: tuple[str, int], timeout_s: float) -> None:
    """Wait a little until somebody listens there: torch itself tries again only half a second after it was refused.

    For ranks on the host of the store: there may be many on others, and a connection more of each costs the store the
    time to look up their names.
    """
    pause_s, end_s = _FIRST_PAUSE_S, time.monotonic() + min(timeout_s / 2, _LONGEST_WAIT_S)
    while time.monotonic() < end_s:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except ConnectionRefusedError:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except OSError:
            return  # torch's error says so


def _listening(address: tuple[str, int], *, is_one_host: bool) -> socket.socket | None:
    """A socket for the store to listen on, at the one address by which the ranks know its host.

    It listens on all interfaces if that address is not one of this host (a forwarded one), or if there are several
    hosts and this one knows its own name only as loopback. None: torch is to open its own socket, since the port is
    taken (perhaps by this process), or since other hosts may know the master by an IPv6 address that this one does not
    know.

    The socket is of IPv4 if the master has an IPv4 address. The store's own socket is of both kinds and shows clients
    of IPv4 as `::ffff:127.0.0.1`, which no /etc/hosts lists. The store looks up the name of each client in the thread
    that answers all requests, so that a name server that does not answer stops it for 5 s and more.
    """
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return None  # torch's error says so
    addresses = [str(sockaddr[0]) for family, *_, sockaddr in found if family == socket.AF_INET]
    if addresses and not is_one_host:
        addresses = [each for each in addresses if not each.startswith("127.")]
        if not addresses:
            return None
    is_ipv6 = not addresses
    own = addresses or [str(sockaddr[0]) for _, *_, sockaddr in found]
    try:
        for each in dict.fromkeys(own):
            with suppress(_NotOurs):
                return _bound(each, port, is_ipv6=is_ipv6)
        return _bound("", port, is_ipv6=is_ipv6)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise


class _NotOurs(Exception):
    """The address is one of another host, or of none."""


def _bound(address: str, port: int, *, is_ipv6: bool) -> socket.socket:
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        return socket.create_server(
            (address, port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_ipv6 and not address
        )
    except OSError as error:
        if address and error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            raise _NotOurs from error
        raise
