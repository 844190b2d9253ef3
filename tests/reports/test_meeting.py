"""Entering the process group ends within the time that was given, and where the store of rank 0 listens."""

import socket
import threading
from dataclasses import replace
from typing import Any

import pytest

from dengine import distributed
from dengine.errors import LaunchError
from dengine.launch import rendezvous as meeting
from dengine.launch.env import Launch
from dengine.launch.store import _listening, open_store


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 1 of 2, and nobody is rank 0."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("second_rank")
def test_a_port_at_which_something_mute_listens_is_a_launch_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's store waits there for ever."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("MASTER_PORT", str(mute.getsockname()[1]))
        with pytest.raises(LaunchError, match="Rank 1 of 2 did not meet the others within timeout=1 s"):
            distributed.process_group(timeout=1.0).__enter__()


@pytest.mark.usefixtures("second_rank")
def test_a_store_that_takes_longer_than_the_timeout_to_give_up_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_given_up = threading.Event()

    def opened(launch: Launch, timeout_s: float) -> Any:
        has_given_up.wait(60.0)
        raise OSError("the store gave up, long after")

    monkeypatch.setattr(meeting, "open_store", opened)
    monkeypatch.setenv("MASTER_PORT", "23457")
    with pytest.raises(LaunchError, match="no store has answered there"):
        distributed.process_group(timeout=0.2).__enter__()
    assert not has_given_up.is_set()
    has_given_up.set()


def at(host: str, port: int) -> Launch:
    return Launch("environment", 0, 2, local_rank=0, local_size=2, node_rank=0, master_addr=host, master_port=port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_store_of_one_host_listens_on_no_other_interface(host: str) -> None:
    listener = _listening((host, 0), is_one_host=True)
    assert listener is not None
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_of_several_hosts_it_listens_at_the_masters_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.1.1", "10.9.8.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    asked = []

    def created(address: tuple[str, int], **options: Any) -> socket.socket:
        asked.append(address[0])
        return socket.socket()

    monkeypatch.setattr(socket, "create_server", created)
    listener = _listening(("master", 0), is_one_host=False)
    assert listener is not None
    listener.close()
    assert asked == ["10.9.8.7"]


def test_an_address_that_is_forwarded_to_this_host_is_served_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container's service: no interface of this host has it."""
    listener = _listening(("192.0.2.1", 0), is_one_host=False)  # of documentation: nobody's
    assert listener is not None
    with listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_the_ranks_reach_a_store_that_is_bound_to_their_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    host = open_store(at("127.0.0.1", port), 5.0)
    host.set("said", "1")
    assert open_store(replace(at("127.0.0.1", port), rank=1), 5.0).get("said") == b"1"
