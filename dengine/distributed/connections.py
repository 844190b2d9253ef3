"""The connections of a process group: who notices that a peer is gone, and how a rank that waits in one is freed.

Gloo's wait is in C++ and ends only when a connection closes or the group's timeout passes: neither a signal nor
`abort()` on the group frees it, nor does destroying the group once DDP holds it. Shutting the sockets does, at once, on
both of their ends.
"""

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch.distributed as dist

__all__ = ["Connections", "abort_group", "found", "recorded"]

_Address: TypeAlias = tuple[str, int]
_Ends: TypeAlias = tuple[_Address, _Address]  # here, there

_FOLDER = "/proc/self/fd"


@contextmanager
def recorded(store_port: int) -> Iterator[list[socket.socket]]:
    """The connections that are made inside the `with` block, but for those to the store. Linux only; else none.

    They are duplicates: a number of our own cannot come to mean another file when the group closes its one.
    """
    made: list[socket.socket] = []
    before = _socket_numbers()
    yield made
    for number in _socket_numbers() - before:
        with suppress(OSError):
            made.extend(_connection(number, store_port))


def found(exchange: Callable[[list[_Ends]], list[list[_Ends]]], store_port: int) -> list[socket.socket]:
    """The connections between ranks that were made before, but for those to the store: those of whose two ends this
    process has one, and another rank the other. Duplicates, as in `recorded`.

    Collective: `exchange` gives the ends of all ranks, in their order, for those of this one.
    """
    mine: dict[_Ends, socket.socket] = {}
    for number in _socket_numbers():
        for each in _connection(number, store_port):
            mine[_address(each.getsockname()), _address(each.getpeername())] = each
    # From the others' side. One that a process has with itself has both ends here, and is none of them.
    theirs = {(there, here) for ends in exchange(list(mine)) for here, there in ends} - {
        (there, here) for here, there in mine
    }
    for ends in mine.keys() - theirs:
        mine[ends].close()
    return [each for ends, each in mine.items() if ends in theirs]


class Connections:
    """The connections of one group, and a way to sleep until one of them hangs up."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets
        self._processes: list[int] = []
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        for each in sockets:
            self._poll.register(each, select.POLLRDHUP)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until `wake()`, or until a peer hangs up: whether one did. Each is told of once."""
        has_hung_up = False
        for number, _ in self._poll.poll(timeout_s * 1000):
            if number == self._woken.fileno():
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:
                self._poll.unregister(number)
                has_hung_up = True
        return has_hung_up

    def watch_process(self, pid: int) -> None:
        """Have `wait` tell of the end of a process of this host too: what it forked may hold its connections open."""
        with suppress(OSError, AttributeError):  # it has ended, or the system has no such thing (Linux 5.3)
            number = os.pidfd_open(pid)
            self._processes.append(number)
            self._poll.register(number, select.POLLIN)

    def wake(self) -> None:
        with suppress(OSError):
            self._waker.send(b"!")

    def shut(self) -> None:
        """Free whoever waits in a collective of the group, on this rank and on its peers. They see an error there."""
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Forget the connections. What the group itself still holds stays open."""
        for each in (*self._sockets, self._waker, self._woken):
            each.close()
        for number in self._processes:
            os.close(number)
        self._sockets, self._processes = [], []


def abort_group() -> None:
    """End what is under way on the device, without waiting for it: NCCL's connections are none of these."""
    with suppress(Exception):  # nothing more can be done for a rank that waits on the device
        dist.distributed_c10d._abort_process_group()


def _address(name: tuple[Any, ...]) -> _Address:
    return name[0].removeprefix("::ffff:"), name[1]  # as IPv4, where it is that within IPv6


def _socket_numbers() -> set[int]:
    numbers = set()
    with suppress(FileNotFoundError):
        for name in os.listdir(_FOLDER):
            with suppress(OSError):
                if os.readlink(f"{_FOLDER}/{name}").startswith("socket:"):
                    numbers.add(int(name))
    return numbers


def _connection(number: int, store_port: int) -> list[socket.socket]:
    duplicate = socket.socket(fileno=os.dup(number))
    try:
        here, there = duplicate.getsockname(), duplicate.getpeername()
        if isinstance(here, tuple) and isinstance(there, tuple) and store_port not in (here[1], there[1]):
            return [duplicate]
    except OSError:  # it listens; shut, it would take the process down
        pass
    duplicate.close()
    return []
