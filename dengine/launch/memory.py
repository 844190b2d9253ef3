"""The free memory of this host."""

from contextlib import suppress
from pathlib import Path

__all__ = ["host_memory_free"]

# A container's limit, and its use.
_CGROUPS = {
    "/sys/fs/cgroup/memory.max": "/sys/fs/cgroup/memory.current",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "/sys/fs/cgroup/memory/memory.usage_in_bytes",
}


def host_memory_free() -> int:
    """The free bytes on this host, or in this container if these are fewer; 2**62 if that is unknown."""
    free = 1 << 62
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    for limit, used in _CGROUPS.items():
        with suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free
