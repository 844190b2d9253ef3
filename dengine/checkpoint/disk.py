"""Room on a disk for large files: taken at once, and given back aside."""

import ctypes
import errno
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["free_aside", "reserve", "wait_for_room"]

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a reader never sees room that is not written yet

_freeing: list[threading.Thread] = []
_lock = threading.Lock()


def reserve(descriptor: int, num_bytes: int) -> None:
    """Take the blocks for `num_bytes` at once, where the file system can, so that a full disk is met before any write.

    Not `os.posix_fallocate`, which writes into each block where the file system cannot reserve.

    Raises:
        OSError: there is no room, or not within the quota.
    """
    fallocate = _fallocate()
    if fallocate is None or num_bytes == 0:
        return
    if fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def free_aside(free: Callable[[], object]) -> None:
    """Call `free`, which removes what nobody needs any more, in a thread: it takes long for large files."""
    freeing = threading.Thread(target=free, name="dengine-checkpoint-free", daemon=False)
    with _lock:
        _freeing.append(freeing)
        freeing.start()


def wait_for_room() -> None:
    """Until all that is aside is free: a disk with room for one more file has none before."""
    with _lock:
        while _freeing:
            _freeing.pop().join()


@functools.cache
def _fallocate() -> Any:
    """The C library's function, or None. A call leaves the interpreter to the other threads."""
    try:
        return ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError, TypeError):
        return None
