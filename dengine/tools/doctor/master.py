"""Check with plain sockets that the master can be reached, before torch waits for it."""

import errno
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from dengine.launch.env import Launch, is_agents_store
from dengine.tools.doctor.facts import Facts, MasterFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["MasterError", "judge_master", "reach_master", "unreachable"]

_ATTEMPT_S = 3.0
_PAUSE_S = 0.1
_SLOW_LOOKUP_S = 1.0
_LONGEST_LOOKUP_S = 7.0  # a name server that does not answer is asked again after 5 s


class MasterError(Exception):
    """This rank cannot reach the others through the master. `advice` says what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


def reach_master(launch: Launch | None, timeout_s: float) -> MasterFacts:
    """The address of the master, and the seconds until it answered this rank.

    Raises: MasterError: the address cannot be resolved, hosted (on rank 0), or reached within `timeout_s`.
    """
    if launch is None:
        return {}
    address = _resolved(launch)
    facts: MasterFacts = {"name": launch.master_addr, "address": address, "port": launch.master_port}
    facts["lookup_s"] = _lookup_s(address)
    if launch.rank == 0 and not is_agents_store(os.environ):
        _check_port(launch, address)
        return {**facts, "is_host": True}
    return {**facts, "is_host": False, "connect_s": _connect(launch, address, timeout_s)}


def unreachable(error: Exception) -> Finding:
    """The finding of a rank that could not reach the master, by `reach_master` or by torch's own store."""
    advice = getattr(error, "advice", "see that what listens there is the launcher's store, and nothing else.")
    return Finding("master", Verdict.FAIL, str(error).splitlines()[0], advice)


def judge_master(facts: Facts, hosts: dict[int, str]) -> Finding:
    named = {rank: master for rank, each in facts.items() if (master := each["master"])}
    if not named:
        return Finding("master", Verdict.SKIP, "one process has none")
    addresses = sorted({f"{each['name']}:{each['port']}" for each in named.values()})
    times = {rank: each["connect_s"] for rank, each in named.items() if "connect_s" in each}
    slowest = max(times, key=lambda rank: times[rank], default=None)
    figure = f"{addresses[0]}, hosted by {'rank 0' if any(e['is_host'] for e in named.values()) else 'torchrun'}"
    if slowest is not None:
        figure += f"; connects in {1000 * times[slowest]:.1f} ms at most ({ranks_text([slowest], hosts)})"
    is_loopback = any(each["address"].startswith("127.") for each in named.values())
    if is_loopback and len(set(hosts.values())) > 1:
        return Finding(
            "master",
            Verdict.WARN,
            f"{addresses[0]} is a loopback address, and there are {len(set(hosts.values()))} hosts",
            "it works only if they share a network: set MASTER_ADDR to a name of the first host that all resolve.",
        )
    lookups = {rank: each["lookup_s"] for rank, each in named.items()}
    asks_longest = max(lookups, key=lambda rank: lookups[rank])
    if lookups[asks_longest] > _SLOW_LOOKUP_S:
        return Finding(
            "master",
            Verdict.WARN,
            f"{figure}; to ask a name server what {named[asks_longest]['address']} is called takes "
            f"{lookups[asks_longest]:.1f} s ({ranks_text([asks_longest], hosts)})",
            "torch's store does that for every connection, and all ranks wait meanwhile: see that the "
            "servers in /etc/resolv.conf answer, or export RES_OPTIONS='timeout:1 attempts:1' on all ranks.",
            data={"connect_s": times, "lookup_s": lookups},
        )
    return Finding("master", Verdict.OK, figure, data={"connect_s": times, "lookup_s": lookups})


def _resolved(launch: Launch) -> str:
    try:
        found = socket.getaddrinfo(launch.master_addr, launch.master_port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MasterError(
            f"the master address {launch.master_addr!r} does not resolve: {error.strerror or error}",
            "set MASTER_ADDR (torchrun: --rdzv-endpoint or --master-addr) to a name or address of the first host that "
            "every host knows: try `getent hosts NAME` on each.",
        ) from error
    # As torch does: IPv4 if there is such an address.
    return str(min(found, key=lambda each: each[0] != socket.AF_INET)[4][0])


def _lookup_s(address: str) -> float:
    """The seconds that this host takes to find the name of an address, or that it has none: at most about 7."""
    as_torch_does = address if ":" in address else f"::ffff:{address}"
    began = time.monotonic()

    def look_up() -> None:
        with suppress(OSError):
            socket.getnameinfo((as_torch_does, 0), 0)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_LONGEST_LOOKUP_S)
    return time.monotonic() - began


def _check_port(launch: Launch, address: str) -> None:
    """Check, on rank 0, which hosts the store, that the address is its own and the port is free. Raises:
    MasterError.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise MasterError(
                f"rank 0 runs on {socket.gethostname()}, and the master address {_named(launch, address)} is not one "
                f"of its own ({error.strerror})",
                f"set MASTER_ADDR={socket.gethostname()} (or an address of it that every host reaches) on all ranks, "
                "or start rank 0 on the host it names.",
            ) from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # sockets of an ended run in TIME_WAIT do no harm
        try:
            probe.bind((address, launch.master_port))
        except OSError as error:
            holder = _holder(launch.master_port) if error.errno == errno.EADDRINUSE else ""
            raise MasterError(
                f"rank 0 cannot listen at {_named(launch, address)}:{launch.master_port}: {error.strerror}{holder}",
                "set MASTER_PORT to another port on all ranks, or end what holds it: it may be left over from an "
                "earlier run, or a second rank 0.",
            ) from error


def _connect(launch: Launch, address: str, timeout_s: float) -> float:
    end = time.monotonic() + timeout_s
    where = f"{_named(launch, address)}:{launch.master_port}"
    while True:
        began = time.monotonic()
        try:
            with socket.create_connection((address, launch.master_port), timeout=min(_ATTEMPT_S, timeout_s)):
                return time.monotonic() - began
        except OSError as error:
            if time.monotonic() + _PAUSE_S >= end:
                raise _unreachable(error, where, timeout_s) from error
        time.sleep(_PAUSE_S)


def _unreachable(error: OSError, where: str, timeout_s: float) -> MasterError:
    if isinstance(error, ConnectionRefusedError):
        owner = "torchrun's agent" if is_agents_store(os.environ) else "rank 0"
        return MasterError(
            f"nobody listens at the master's {where} after {timeout_s:g} s (connection refused)",
            f"see that {owner} is running on that host, and that all ranks have the same MASTER_ADDR and MASTER_PORT; "
            "a firewall may also refuse.",
        )
    reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return MasterError(
        f"the master's {where} cannot be reached within {timeout_s:g} s ({reason})",
        "see that MASTER_ADDR is the first host's, on a network that this host is on, and that no firewall drops the "
        f"port: try `ping {where.split(' ')[0].rpartition(':')[0] or where}` from here.",
    )


def _named(launch: Launch, address: str) -> str:
    return address if launch.master_addr == address else f"{launch.master_addr} ({address})"


def _holder(port: int) -> str:
    """The process that uses the port, as ` (held by python3, pid 4711)`; "" if this user may not see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(each) in inodes for each in folder.joinpath("fd").iterdir()):
                name = folder.joinpath("comm").read_text().strip()
                return f" (held by {name}, pid {folder.name})"
    return ""
