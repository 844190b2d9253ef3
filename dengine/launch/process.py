"""Which process this is, so that another one of the same host can find out whether it lives."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dengine.launch.network import network_of_this_host

__all__ = ["identity", "is_alive"]


def identity() -> dict[str, Any]:
    """This process, so that a process of the same host can find out whether it lives. Linux only; else no host."""
    host = ""
    with suppress(OSError):
        # The namespace too: two containers of one host see each other's numbers as other processes.
        host = network_of_this_host() + os.readlink("/proc/self/ns/pid")
    return {"host": host, "pid": os.getpid(), "start": _start_of(os.getpid())}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the process of this host that told this lives."""
    start: str = process["start"]
    return start != "" and start == _start_of(process["pid"])


def _start_of(pid: int) -> str:
    """When a living process began, in the kernel's ticks; "" where there is none. A number may be used again."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            return fields[18]
    return ""
