"""The store of a launch, through which its ranks find each other."""

import errno
import os
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dengine.distributed.launch import Launch, is_agents_store

__all__ = ["open_store"]

_BACKLOG = 4096  # ranks may all come at once; the kernel's own limit is the lower one


def open_store(launch: Launch, timeout_s: float) -> TCPStore:
    """A new connection to the store: the agent's under torchrun; else rank 0 hosts it, for as long as one is open.

    It does not wait for the other ranks: who has not come is to be named.

    Raises: OSError, DistError: it cannot be hosted, or not be reached within `timeout_s`.
    """
    address = (launch.master_addr, launch.master_port)
    is_host = launch.rank == 0 and not is_agents_store(os.environ)
    # Where this process hosts a store at this port already, torch has both share that server.
    options: dict[str, Any] = {
        "is_master": is_host,
        "timeout": timedelta(seconds=timeout_s),
        "wait_for_workers": False,
        "multi_tenant": is_host,
    }
    listener = _listening(address) if is_host else None
    if listener is None:
        return TCPStore(*address, launch.size, **options)
    with listener:
        store = TCPStore(*address, launch.size, master_listen_fd=listener.fileno(), **options)
        listener.detach()  # the store's, now
    return store


def _listening(address: tuple[str, int]) -> socket.socket | None:
    """A socket for the store to listen at, on all interfaces; None where the port is taken, by this process maybe.

    Of IPv4, where the master has an address of that. The store's own socket is of both kinds and shows clients of IPv4
    as `::ffff:127.0.0.1`, which no /etc/hosts lists; the store looks up the name of each client, by the thread that
    answers all requests, so that a name server which does not answer stops it for 5 s and more.
    """
    host, port = address
    try:
        families = {info[0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        families = set()
    is_ipv6 = families == {socket.AF_INET6}
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET, backlog=_BACKLOG, dualstack_ipv6=is_ipv6
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise
