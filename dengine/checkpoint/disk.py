"""Room on a disk for large files: taken at once, and given back aside."""

import ctypes
import errno
import functools
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["release", "reserve", "wait_for_room"]

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a reader never sees room that is not written yet
_ASIDE_BYTES = 1 << 20  # less than this is freed faster than a thread starts

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


def release(path: Path) -> None:
    """Remove the file `path`. Its name is gone at once; its blocks are freed aside, which takes long for a large one.

    Whoever holds a file open keeps its blocks, so all that the thread does is to close it; where the process ends
    before, the system does.

    Raises:
        OSError: it cannot be removed.
    """
    descriptor = None
    with suppress(OSError):  # it may be unreadable; then it is removed as any other
        if path.stat().st_size >= _ASIDE_BYTES:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.unlink(path)
    finally:
        if descriptor is not None:
            freeing = threading.Thread(target=os.close, args=(descriptor,), name="dengine-checkpoint-free", daemon=True)
            with _lock:
                _freeing.append(freeing)
                freeing.start()


def wait_for_room() -> None:
    """Until what was released is free: a disk with room for one more file has none before."""
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
