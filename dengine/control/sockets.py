"""The sockets of a process group, with which a rank notices that a peer is gone, and can free a rank that waits.

Gloo waits in C++, until a connection closes or the group's timeout passes. Neither a signal nor `abort()` on the group
ends the wait, nor does destroying the group while DDP holds it. Shutting down the sockets does, at once.

They are shut down only for reading: if a write fails, Gloo keeps the data until the socket can be written again, closes
the connection at the next read, and never wakes up the thread that waits for that send (pair.cc: `signalException`
skips the queue `tx_`). So a rank that comes late to a collective must never meet a connection that cannot be written
to.

With TORCH_GLOO_LAZY_INIT a group has few connections at first, and more as collectives need them; those of a group
that the script makes come later anyway. So after a failure Gloo's sockets are searched again and again, until no thread
waits. A rank that waits for a peer to connect has no connection yet: its own process gives it one, and closes it at
once.
"""

import os
import select
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from dengine import torch_internals
from dengine.launch.abandonable import unless_given_up

__all__ = [
    "Connections",
    "abort_group",
    "connect_neighbours",
    "existing_connections",
    "new_connections",
    "unless_hung_up",
]

T = TypeVar("T")
_Address: TypeAlias = tuple[str, int]
_Ends: TypeAlias = tuple[_Address, _Address]  # (own address, peer's address)

_FOLDER = "/proc/self/fd"
_NUM_STANDINS = 1024  # of peers that have not connected: each takes a descriptor until the group is destroyed
_STANDIN_S = 1.0

# Sockets of groups that were left by a failure: if they were closed, a late rank could not send any more.
_left_open: list[socket.socket] = []


@contextmanager
def new_connections(store_port: int) -> Iterator[list[socket.socket]]:
    """The connections that are made inside the `with` block, except those to the store. None if the system is not
    Linux.

    They are duplicates: their descriptor numbers are not reused when the group closes its own.
    """
    made: list[socket.socket] = []
    before = set(_socket_numbers().values())
    yield made
    for number, name in _socket_numbers().items():
        if name not in before:  # by name: the number of a closed socket is reused
            made.extend(_connection(number, store_port))


def existing_connections(exchange: Callable[[list[_Ends]], list[list[_Ends]]], store_port: int) -> list[socket.socket]:
    """The existing connections between this rank and others, except those to the store; as duplicates.

    Collective: `exchange` sends the ends of this rank's connections, and gives those of all ranks, in their order.
    """
    mine: dict[_Ends, socket.socket] = {}
    for number in _socket_numbers():
        for each in _connection(number, store_port):
            mine[_address(each.getsockname()), _address(each.getpeername())] = each
    # Seen from the other side. A connection of a process with itself has both ends here, and is left out.
    theirs = {(there, here) for ends in exchange(list(mine)) for here, there in ends} - {
        (there, here) for here, there in mine
    }
    for ends in mine.keys() - theirs:
        mine[ends].close()
    return [each for ends, each in mine.items() if ends in theirs]


def connect_neighbours(group: ProcessGroup | None = None) -> None:
    """Have Gloo connect each rank to those at a distance of 1, 2, 4, ..., if it has not connected all.

    They are those to which its barrier talks, and its other collectives but all-to-all, gather and scatter: if one of
    them is gone, there is a connection that closes.

    Collective. Cost: one barrier.
    """
    if dist.get_backend(group) == "gloo":
        dist.barrier(group)


def unless_hung_up(action: Callable[[], T], peers: Sequence[socket.socket]) -> T:
    """Run `action` in a thread, and give its result; give up if a peer closes its connection first.

    Raises: ConnectionError: one has. What `action` raises.
    """
    mine, its = socket.socketpair()
    poll = select.poll()
    for each in (mine, *peers):
        poll.register(each, select.POLLRDHUP)
    with mine:
        return unless_given_up(action, lambda _: poll.poll(), ConnectionError("a peer has hung up"), at_end=its.close)


class Connections:
    """The connections of one group. A thread can sleep until a peer closes one of them."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        while _left_open:  # all ranks are here, so none is still in an earlier group
            _left_open.pop().close()
        self._sockets = sockets
        # Connections of before, if not of this group: another one's of Gloo, which the script may go on using.
        self._foreign = set(_socket_numbers().values()) - {_name_of(each) for each in sockets}
        self._stood_in: set[str] = set()  # listening sockets
        self._processes: list[int] = []
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        for each in sockets:
            self._poll.register(each, select.POLLRDHUP)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until `wake()`, or until a peer closes its connection. Gives whether one did; each counts once."""
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
        """Let `wait` also return when this process on this host ends: its children may keep its connections open."""
        with suppress(OSError, AttributeError):  # it has ended, or the system cannot do this (before Linux 5.3)
            number = os.pidfd_open(pid)
            self._processes.append(number)
            self._poll.register(number, select.POLLIN)

    def wake(self) -> None:
        with suppress(OSError):
            self._waker.send(b"!")

    def abort(self) -> None:
        """Make each collective on this rank raise an error, now and later, in all connections so far.

        Call it again and again, as a collective may be about to connect.
        """
        self._shut(socket.SHUT_RD)

    def stand_in(self, num_ranks: int) -> None:
        """Connect to this rank in place of peers that have not, and hang up: whoever waits for them here is freed."""
        for listener in _sockets_of_gloo(is_listening=True, but=self._stood_in):
            with listener:
                self._stood_in.add(_name_of(listener))
                for rank in range(min(num_ranks, _NUM_STANDINS)):
                    with suppress(OSError):
                        _hang_up_as(rank, listener.getsockname())

    def hang_up(self) -> None:
        """Show the peers that this rank, which is in no collective, takes no further part."""
        self._shut(socket.SHUT_WR)

    def _shut(self, way: int) -> None:
        self._add_later()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(way)

    def close(self, *, is_failing: bool) -> None:
        """Close our duplicates of the connections.

        If this rank is failing they stay open until this process ends or joins another group.
        """
        for each in (self._waker, self._woken):
            each.close()
        if is_failing:
            self._add_later()
            _left_open.extend([*self._sockets, *_sockets_of_gloo(is_listening=True)])
        else:
            for each in self._sockets:
                each.close()
        for number in self._processes:
            os.close(number)
        self._sockets, self._processes = [], []

    def _add_later(self) -> None:
        """Add the connections that Gloo has made since, in these groups or others."""
        known = self._foreign | {_name_of(each) for each in self._sockets}
        self._sockets += _sockets_of_gloo(is_listening=False, but=known)


def abort_group() -> None:
    """Abort the collectives on the device, without waiting for them: NCCL does not use these sockets."""
    with suppress(Exception):  # nothing else can free a rank that waits on the device
        torch_internals.abort_process_groups()


def _address(name: tuple[Any, ...]) -> _Address:
    return name[0].removeprefix("::ffff:"), name[1]  # as IPv4, if it is an IPv4 address in IPv6 form


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


def _name_of(open_socket: socket.socket) -> str:
    with suppress(OSError):
        return os.readlink(f"{_FOLDER}/{open_socket.fileno()}")
    return ""


def _sockets_of_gloo(*, is_listening: bool, but: Collection[str] = ()) -> list[socket.socket]:
    """Duplicates of the connections of Gloo, or of the sockets at which it listens; `but` those of some names."""
    found: list[socket.socket] = []
    for number, name in _socket_numbers().items():
        if name not in but:
            with suppress(OSError):
                if torch_internals.is_socket_of_gloo(number, is_listening=is_listening):
                    found.append(_duplicate(number))
    return found


def _hang_up_as(rank: int, address: tuple[Any, ...]) -> None:
    """Connect to a listening socket of Gloo as `rank` does, which sends its number, and hang up."""
    with socket.create_connection(address[:2], timeout=_STANDIN_S) as peer:
        peer.sendall(struct.pack("=q", rank))


def _duplicate(number: int) -> socket.socket:
    """Another descriptor of the same socket. Raises: OSError: the number is no socket's, or not any more."""
    duplicate = os.dup(number)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _connection(number: int, store_port: int) -> list[socket.socket]:
    """The connection with that number, but not one to the store; nothing if it is none, or not any more."""
    try:
        duplicate = _duplicate(number)
    except OSError:  # threads of a group that was left close theirs meanwhile
        return []
    try:
        here, there = duplicate.getsockname(), duplicate.getpeername()
        if isinstance(here, tuple) and isinstance(there, tuple) and store_port not in (here[1], there[1]):
            return [duplicate]
    except OSError:  # it listens; to shut it down would end the process
        pass
    duplicate.close()
    return []
