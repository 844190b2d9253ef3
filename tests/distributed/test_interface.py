"""Which interface leads to the other hosts. On hosts of their own: tests_dist/hosts/."""

import socket
from typing import Any

import pytest

from dengine.launch import network as interface
from dengine.launch.network import interface_to


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host with these interfaces, the addresses its own name stands for, and the routes it has."""

    def make(found: dict[str, str], own: list[str] | None, routes: dict[str, str]) -> None:
        def getaddrinfo(name: str, port: object) -> list[Any]:
            if own is None:
                raise socket.gaierror("no such name")
            return [(None, None, None, "", (address, 0)) for address in own]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(interface, "interfaces", lambda: {name: address for address, name in found.items()})
        monkeypatch.setattr(interface, "address_towards", lambda target: routes.get(target, ""))

    return make


CARDS = {"10.0.0.5": "eth0", "10.1.0.5": "ib0"}


@pytest.mark.parametrize("own", [["127.0.1.1"], ["127.0.0.1", "::1"], None])
def test_where_the_own_name_leads_nowhere_it_is_the_interface_to_the_master(host: Any, own: list[str] | None) -> None:
    host(CARDS, own, {"10.1.0.1": "10.1.0.5", "192.0.2.1": "10.0.0.5"})
    assert interface_to("10.1.0.1") == "ib0"


def test_on_the_master_itself_it_is_the_one_that_leads_out(host: Any) -> None:
    host(CARDS, ["127.0.1.1"], {"head": "127.0.0.1", "192.0.2.1": "10.0.0.5"})
    assert interface_to("head") == "eth0"


def test_without_a_way_out_it_is_the_only_one_there_is(host: Any) -> None:
    host({"10.0.0.5": "eth0"}, ["127.0.1.1"], {"head": "127.0.0.1"})
    assert interface_to("head") == "eth0"


def test_between_two_nothing_is_guessed(host: Any) -> None:
    host(CARDS, ["127.0.1.1"], {"head": "127.0.0.1"})
    assert interface_to("head") is None


@pytest.mark.parametrize("own", [["10.0.0.5"], ["127.0.1.1", "10.0.0.5"], ["127.77.0.1"]])
def test_where_the_own_name_leads_here_gloo_finds_it(host: Any, own: list[str]) -> None:
    host(CARDS, own, {"head": "10.1.0.5"})
    assert interface_to("head") is None


def test_on_this_machine_an_address_leads_to_an_interface_that_is_there() -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert set(interface.interfaces()) <= names
    assert interface.address_towards("127.0.0.1") == "127.0.0.1"
