"""Where the store of the ranks listens."""

import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistError, TCPStore

from dengine.launch import store
from dengine.launch.env import Launch
from dengine.launch.store import _listening, open_store


def at(port: int) -> Launch:
    return Launch(
        "environment", 0, 1, local_rank=0, local_size=1, node_rank=0, master_addr="127.0.0.1", master_port=port
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("localhost", socket.AF_INET), ("::1", socket.AF_INET6)]
)
def test_the_store_listens_by_ipv4_where_the_master_has_such_an_address(host: str, family: int) -> None:
    """Clients of IPv4 are shown as ::ffff:127.0.0.1 by a socket of both kinds, and no /etc/hosts names that."""
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    listener = _listening((host, 0), is_one_host=True)
    assert listener is not None
    with listener:
        assert listener.family == family


@pytest.mark.parametrize("is_torchs", [False, True])
def test_a_process_that_hosts_a_store_there_already_shares_it(is_torchs: bool) -> None:
    """As the doctor's exchange, or init_process_group() of the user's own, has left one."""
    port = free_port()
    options: dict[str, Any] = {
        "is_master": True,
        "wait_for_workers": False,
        "multi_tenant": True,
        "timeout": timedelta(seconds=5),
    }
    first = TCPStore("127.0.0.1", port, 1, **options) if is_torchs else open_store(at(port), 5.0)
    first.set("said", "1")
    assert open_store(at(port), 5.0).get("said") == b"1"


def test_a_rank_on_the_host_of_the_store_asks_torch_only_when_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for half a second after it was refused once."""
    port, begun = free_port(), threading.Event()
    seen: list[bool] = []

    def serve() -> None:
        time.sleep(0.2)
        begun.set()
        servers.append(socket.create_server(("127.0.0.1", port)))

    servers: list[socket.socket] = []
    monkeypatch.setattr(store, "TCPStore", lambda *arguments, **options: seen.append(begun.is_set()))
    thread = threading.Thread(target=serve)
    thread.start()
    open_store(replace(at(port), rank=1, size=2, local_rank=1, local_size=2), 60.0)
    thread.join()
    servers[0].close()
    assert seen == [True]


def test_a_port_that_another_process_holds_is_an_error() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(DistError, match="EADDRINUSE|in use"):
        open_store(at(taken.getsockname()[1]), 2.0)


def test_a_store_that_cannot_be_reached_leaves_descriptors_alone() -> None:
    """torch closes the one it was given; another file may have its number by then."""
    launch = replace(at(free_port()), master_addr="192.0.2.1")  # of documentation: nobody's
    with pytest.raises(DistError):
        open_store(launch, 0.5)


def test_a_name_that_is_loopback_on_this_host_alone_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's 127.0.1.1: the other hosts may know the master by IPv6."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    assert _listening(("master", 0), is_one_host=False) is None
    listener = _listening(("master", 0), is_one_host=True)
    assert listener is not None
    listener.close()
