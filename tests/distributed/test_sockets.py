"""Descriptors are listed while threads of an earlier group close theirs."""

import os
import socket

import pytest

from dengine.control import sockets


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """What a look at the descriptors of this process finds."""
    found: dict[int, str] = {}
    monkeypatch.setattr(sockets, "_socket_numbers", lambda: dict(found))
    return found


def test_a_socket_that_closes_after_it_was_listed_is_left_out(listed: dict[int, str]) -> None:
    here, there = socket.create_server(("127.0.0.1", 0)), socket.socket()
    gone = there.fileno()
    there.close()
    listed |= {gone: "socket:[1]"}
    assert sockets.existing_connections(lambda mine: [mine], 0) == []
    with sockets.new_connections(0) as made:
        listed |= {gone: "socket:[2]"}
    here.close()
    assert made == []


def test_a_number_that_is_a_file_by_now_is_left_out_and_nothing_stays_open(listed: dict[int, str]) -> None:
    reading, writing = os.pipe()
    listed |= {reading: "socket:[1]"}
    before = open_descriptors()
    assert sockets.existing_connections(lambda mine: [mine], 0) == []
    assert open_descriptors() == before
    os.close(reading)
    os.close(writing)
