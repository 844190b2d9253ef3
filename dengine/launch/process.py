"""The identity of a process, with which another process on the same host can find out whether it is alive."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dengine.launch.network import network_of_this_host

__all__ = ["identity", "is_alive"]


def identity() -> dict[str, object]:
    """The identity of this process, for `is_alive`. The host is "" if the system is not Linux."""
    host = ""
    with suppress(OSError):
        # The namespace too: two containers of one host see each other's numbers as other processes.
        host = network_of_this_host() + os.readlink("/proc/self/ns/pid")
    return {"host": host, "pid": os.getpid(), "start": _start_of(os.getpid())}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether `process`, which ran on this host, is alive."""
    start: str = process["start"]
    return start != "" and start == _start_of(process["pid"])


def _start_of(pid: int) -> str:
    """When a living process started, in the kernel's ticks; "" if it is dead. A later process with the same number
    has another one.
    """
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            return fields[18]
    return ""
