"""The sockets of a process group: how a rank notices that a peer is gone, and how one that waits is freed.

Gloo's wait is in C++ and ends only when a connection closes or the group's timeout passes: neither a signal nor
`abort()` on the group frees it, nor does destroying the group once DDP holds it. Shutting the sockets does, at once.

Only for reading, though: if a write fails, Gloo keeps what it was about to send until the socket can be written
again, closes the connection at the next read, and leaves whoever waits for that send waiting (pair.cc, where
`signalException` passes over what is queued in `tx_`). So nothing is done by which a rank that comes late to a
collective could meet a connection that can no longer be written to.
"""

import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

from dengine import torch_internals
from dengine.launch.abandonable import unless_given_up

__all__ = ["Connections", "abort_group", "existing_connections", "new_connections", "unless_hung_up"]

T = TypeVar("T")
_Address: TypeAlias = tuple[str, int]
_Ends: TypeAlias = tuple[_Address, _Address]  # here, there

_FOLDER = "/proc/self/fd"

# The sockets of groups that were left by a failure: if closed, they would refuse what a late rank has yet to send.
_left_open: list[socket.socket] = []


@contextmanager
def new_connections(store_port: int) -> Iterator[list[socket.socket]]:
    """The connections that are made inside the `with` block, except those to the store. Linux only; else none.

    They are duplicates: the number of a descriptor of our own is not reused when the group closes its own one.
    """
    made: list[socket.socket] = []
    before = set(_socket_numbers().values())
    yield made
    for number, name in _socket_numbers().items():
        if name not in before:  # by name: the number of a closed socket is reused
            with suppress(OSError):
                made.extend(_connection(number, store_port))


def existing_connections(exchange: Callable[[list[_Ends]], list[list[_Ends]]], store_port: int) -> list[socket.socket]:
    """The connections between ranks that exist already, except those to the store; as duplicates.

    They are those with one end in this process and the other in another rank.

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


def unless_hung_up(action: Callable[[], T], peers: Sequence[socket.socket]) -> T:
    """The result of `action`, run in a thread, which is abandoned if a peer hangs up first.

    Raises: ConnectionError: one has. What `action` raises.
    """
    mine, its = socket.socketpair()
    poll = select.poll()
    for each in (mine, *peers):
        poll.register(each, select.POLLRDHUP)
    with mine:
        return unless_given_up(action, lambda _: poll.poll(), ConnectionError("a peer has hung up"), at_end=its.close)


class Connections:
    """The connections of one group, and a way to sleep until a peer closes one of them."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        while _left_open:  # all ranks are here, so none is left in a group before this one
            _left_open.pop().close()
        self._sockets = sockets
        self._processes: list[int] = []
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        for each in sockets:
            self._poll.register(each, select.POLLRDHUP)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until `wake()`, or until a peer hangs up. Gives whether one did; each counts once."""
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
        """Have `wait` also return when this process of this host ends: its children may hold its connections open."""
        with suppress(OSError, AttributeError):  # it has ended, or the system has no such thing (Linux 5.3)
            number = os.pidfd_open(pid)
            self._processes.append(number)
            self._poll.register(number, select.POLLIN)

    def wake(self) -> None:
        with suppress(OSError):
            self._waker.send(b"!")

    def abort(self) -> None:
        """Free whoever waits in a collective of the group on this rank, now and later, by an error there."""
        self._shut(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Have the peers notice that this rank, which is in no collective, takes no further part."""
        self._shut(socket.SHUT_WR)

    def _shut(self, way: int) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(way)

    def close(self, *, is_failing: bool) -> None:
        """Close our duplicates of the connections. If this rank is failing they stay open until this process ends or is
        in another group.
        """
        for each in (self._waker, self._woken):
            each.close()
        if is_failing:
            _left_open.extend(self._sockets)
        else:
            for each in self._sockets:
                each.close()
        for number in self._processes:
            os.close(number)
        self._sockets, self._processes = [], []


def abort_group() -> None:
    """Abort what is under way on the device, without waiting for it: NCCL's connections are not among the sockets."""
    with suppress(Exception):  # nothing more can be done for a rank that waits on the device
        torch_internals.abort_process_groups()


def _address(name: tuple[Any, ...]) -> _Address:
    return name[0].removeprefix("::ffff:"), name[1]  # as IPv4, if it is IPv4 within IPv6


def _socket_numbers() -> dict[int, str]:
    """The kernel's name of each socket of this process, by its descriptor."""
    numbers = {}
    with suppress(FileNotFoundError):
        for number in os.listdir(_FOLDER):
            with suppress(OSError):
                name = os.readlink(f"{_FOLDER}/{number}")
                if name.startswith("socket:"):
                    numbers[int(number)] = name
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
