"""How the ranks of one start find each other, in a store that may still hold what an earlier start left there.

torchrun's agent keeps its store when it restarts its ranks, so a rank that reads the address of a peer there may read
that of an earlier start. No variable of a launcher identifies a start: an agent that joins again counts its restarts
from 0. So each rank publishes a unique token, and rank 0 answers that token:

    every rank                                    rank 0
    publishes its token, over an older one
                                                  reads the tokens, and answers each with the name of this start
    reads the answer to its own token,
    and reports under that name that it is there
                                                  publishes under that name that all are, or who is missing
"""

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, Store

from dengine.errors import LaunchError, StallError
from dengine.launch.abandonable import unless_given_up
from dengine.launch.env import Launch, is_agents_store
from dengine.launch.mesh import other_meshes_text, shown_ranks
from dengine.launch.network import is_reached_by_name, network_of_this_host
from dengine.launch.parsing import has_fields, parse_object
from dengine.launch.store import open_store
from dengine.torch_internals import PrefixStore

__all__ = ["rendezvous"]

_POLL_S = 0.01  # how often rank 0 looks for new ranks
_LEAST_STALL_S = 30.0  # ranks do not begin at once: each imports what it needs
_EXTRA_WAIT_S = 2.0  # how much longer than rank 0 the others wait, for its answer
_ACKNOWLEDGE_S = 2.0  # how long rank 0 waits until the others have read its answer
_NUM_SHOWN = 64

T = TypeVar("T")

# By address: the store of a job, which outlives its groups.
_stores: dict[tuple[str, int], Store] = {}


@dataclass(frozen=True)
class _Peer:
    """What a rank reports about itself, so that rank 0 knows whether the others can reach it."""

    rank: int
    host: str
    network: str
    is_reached: bool
    mesh: str


def rendezvous(
    launch: Launch, timeout_s: float, stall_timeout_s: float = math.inf, *, mesh: str = ""
) -> tuple[Store, str]:
    """Find the other ranks: the store of this launch, and a name in it that is new and shared by its ranks alone.

    `stall_timeout_s`: as in `process_group()`, but at least 30 s, since ranks start at different times. `mesh`: the
    mesh that this rank asks for, as text, which must be the same on all ranks.

    Collective. Cost: at most a hundredth of a second after the last rank has come; two requests a rank in that time to
    the store, by rank 0.

    Raises:
        LaunchError: on every rank that has come, if some have not within `timeout_s`, if Gloo would give other hosts an
            address that they cannot reach, or if ranks ask for different meshes.
        StallError: instead, naming a missing rank, if `stall_timeout_s` was the shorter of the two limits.
    """
    deadline = _Deadline(timeout_s, max(stall_timeout_s, _LEAST_STALL_S))
    try:
        store = within(deadline.limit_s, lambda: _store_of(launch, timeout_s))
        common = PrefixStore("dengine/meet", store)
        return store, (_coordinate if launch.rank == 0 else _join)(common, _this_peer(launch, mesh), launch, deadline)
    except (DistError, OSError) as error:
        who = "torchrun's agent" if is_agents_store(os.environ) else "rank 0"
        text = (
            f"Rank {launch.rank} of {launch.size} did not meet the others within {deadline.shown} s in the store at "
            f"{launch.master_addr}:{launch.master_port}, which {who} hosts: {error}. See that MASTER_ADDR is the "
            "address of that host on every rank, that its port is free, and that rank 0 has started; "
            "`python -m dengine doctor`, started like this, tells more."
        )
        raise deadline.error(text, 0) from error


class _Deadline:
    """How long a rank waits for the others, and the error that it raises then."""

    def __init__(self, timeout_s: float, stall_timeout_s: float) -> None:
        self.limit_s = min(timeout_s, stall_timeout_s)
        self.end_s = time.monotonic() + self.limit_s
        self._is_stall = stall_timeout_s < timeout_s
        self.shown = f"{'stall_timeout' if self._is_stall else 'timeout'}={self.limit_s:g}"

    def error(self, text: str, rank: int) -> LaunchError | StallError:
        """The error to raise. `rank` is the first one that is missing."""
        return StallError(text, rank=rank) if self._is_stall else LaunchError(text)


def within(timeout_s: float, action: Callable[[], T]) -> T:
    """The result of `action`, run in a thread that is abandoned after `timeout_s`.

    torch's store takes up to three times its own timeout to give up, and never does if the other end stays silent.

    Raises: TimeoutError, and what `action` raises.
    """
    gave_up = TimeoutError("no store has answered there")
    return unless_given_up(action, lambda thread: thread.join(timeout_s), gave_up)


def _store_of(launch: Launch, timeout_s: float) -> Store:
    """The store of this launch. There is one for all groups: if rank 0 hosted a second one on the same port, an early
    rank could take it for the first.
    """
    address = (launch.master_addr, launch.master_port)
    if address not in _stores:
        _stores[address] = open_store(launch, timeout_s)
    store = _stores[address]
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _join(store: Store, peer: _Peer, launch: Launch, deadline: _Deadline) -> str:
    token = uuid.uuid4().hex
    store.set(f"number/{launch.rank}", token)
    name = _read(store, f"answer/{token}", deadline.end_s)
    store.set(f"{name}/{launch.rank}", json.dumps(asdict(peer)))
    store.add(f"{name}/come", 1)
    try:
        refusal = _read(store, f"{name}/refusal", deadline.end_s + _EXTRA_WAIT_S)
    except DistError:  # rank 0 started later, and still waits
        missing = [rank for rank in range(1, launch.size) if not store.check([f"{name}/{rank}"])]
        if not missing:
            raise
        raise deadline.error(_absence_text(missing, launch, deadline), missing[0]) from None
    store.add(f"{name}/heard", 1)
    if refusal:
        missing = [rank for rank in range(1, launch.size) if not store.check([f"{name}/{rank}"])]
        raise _refusal_error(refusal, missing, deadline)
    return name


def _refusal_error(refusal: str, missing: Sequence[int], deadline: _Deadline) -> LaunchError | StallError:
    return deadline.error(refusal, missing[0]) if missing else LaunchError(refusal)


def _coordinate(store: Store, peer: _Peer, launch: Launch, deadline: _Deadline) -> str:
    name = uuid.uuid4().hex
    others = range(1, launch.size)
    missing = set(_answer_others(store, name, others, deadline.end_s))
    peers = [peer]
    peers += [_read_peer(store.get(f"{name}/{rank}"), rank, launch) for rank in others if rank not in missing]
    refusal = (
        _absence_text(sorted(missing), launch, deadline)
        if missing
        else _unreachable_text(peers) or other_meshes_text([each.mesh for each in peers])
    )
    store.set(f"{name}/refusal", refusal)
    # This process may take the store with it: let the others read first that it ends, and why.
    _wait_until(lambda: store.add(f"{name}/heard", 0) >= len(peers) - 1, time.monotonic() + _ACKNOWLEDGE_S)
    if refusal:
        raise _refusal_error(refusal, sorted(missing), deadline)
    for rank in others:
        store.delete_key(f"{name}/{rank}")
    return name


def _read_peer(text: bytes, rank: int, launch: Launch) -> _Peer:
    """What `rank` reported about itself. Raises: LaunchError: the content is not a report."""
    fields = parse_object(text)
    if fields is None or not has_fields(fields, rank=int, host=str, network=str, is_reached=bool, mesh=str):
        raise LaunchError(
            f"The entry of rank {rank} in the store at {launch.master_addr}:{launch.master_port} was not written by "
            "that "
            "rank: another program writes to that port. Set MASTER_PORT to one that nobody else uses."
        )
    return _Peer(fields["rank"], fields["host"], fields["network"], fields["is_reached"], fields["mesh"])


def _answer_others(store: Store, name: str, others: Sequence[int], end_s: float) -> list[int]:
    """Answer every token with `name` until all others have joined under it. Gives the ranks that are missing at
    `end_s`.
    """
    answered: dict[int, str] = {}

    def have_all_joined() -> bool:
        for rank in others:
            key = f"number/{rank}"
            token = store.get(key).decode() if store.check([key]) else ""
            # A rank that joined and failed meanwhile is here again for the next group, not for this one.
            if token and answered.get(rank) != token and not store.check([f"{name}/{rank}"]):
                answered[rank] = token
                store.set(f"answer/{token}", name)
        return bool(store.add(f"{name}/come", 0) == len(others))

    is_complete = _wait_until(have_all_joined, end_s)
    for token in answered.values():
        if is_complete:
            store.delete_key(f"answer/{token}")
    return [] if is_complete else [rank for rank in others if not store.check([f"{name}/{rank}"])]


def _wait_until(predicate: Callable[[], bool], end_s: float) -> bool:
    while not predicate():
        if time.monotonic() >= end_s:
            return False
        time.sleep(_POLL_S)
    return True


def _read(store: Store, key: str, end_s: float) -> str:
    store.wait([key], timedelta(seconds=max(end_s - time.monotonic(), 0.001)))
    return str(store.get(key).decode())


def _this_peer(launch: Launch, mesh: str) -> _Peer:
    return _Peer(launch.rank, socket.gethostname(), network_of_this_host(), is_reached_by_name(os.environ), mesh)


def _absence_text(missing: Sequence[int], launch: Launch, deadline: _Deadline) -> str:
    who = f"{shown_ranks(missing, _NUM_SHOWN)} of {launch.size} {'have' if len(missing) > 1 else 'has'}"
    return (
        f"The process group was not made, as {who} not come within the {deadline.shown} s of process_group(): it was "
        "not "
        f"started, has ended, or cannot reach the store at {launch.master_addr}:{launch.master_port}. See its output."
    )


def _unreachable_text(peers: Sequence[_Peer]) -> str:
    """The reason why Gloo could not connect the hosts; "" if it can. Its own attempt may outlast the group's
    timeout.
    """
    if len({peer.network for peer in peers}) == 1:
        return ""
    unreachable = {peer.network: f"{peer.host} (rank {peer.rank})" for peer in reversed(peers) if not peer.is_reached}
    if not unreachable:
        return ""
    hosts = " and ".join(reversed(unreachable.values()))
    return (
        f"Gloo would not connect the hosts, since on {hosts} the host's own name stands for no address by which others "
        "reach it, as with the line 127.0.1.1 of Debian's /etc/hosts, and it was not to be found which interface leads "
        "to them. Set GLOO_SOCKET_IFNAME there to that interface (`ip -br addr` lists them), or give the name its real "
        "address."
    )
