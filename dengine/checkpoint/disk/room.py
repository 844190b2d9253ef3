"""Room on a disk for large files: taken at once, given back in a thread; and what a disk can begin with early."""

import ctypes
import errno
import functools
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dengine.atomic_files import begin, discard, end, temporary_path

__all__ = ["remove", "reserve", "start_flush", "wait_for_room"]

_ASIDE_BYTES = 1 << 20  # less than this is freed faster than a thread starts
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a reader never sees room that is not written yet
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_freeing: list[threading.Thread] = []
_lock = threading.Lock()


def reserve(descriptor: int, num_bytes: int) -> None:
    """Take the blocks for `num_bytes` at once, if the file system can, so that a full disk fails before any write.
    If room is scarce, wait for what is being freed in a thread.

    Not `os.posix_fallocate`, which writes into each block if the file system cannot reserve.

    Raises:
        OSError: there is no room, or not within the quota.
    """
    if num_bytes == 0:
        return
    left = os.fstatvfs(descriptor)
    if left.f_bavail * left.f_frsize < 2 * num_bytes:  # twice: a file is larger than its tensors
        wait_for_room()
    code = _reserved(descriptor, num_bytes)
    if code != 0:  # a quota, which only this call knows of; or the file system does not know
        wait_for_room()
        code = _reserved(descriptor, num_bytes)
    if code in _NO_ROOM:
        raise OSError(code, os.strerror(code))


def start_flush(descriptor: int) -> None:
    """Have the disk begin with what the file has so far, if the system can. Nothing is promised: fsync does that.

    Raises:
        OSError: the disk is full or fails. If that happens later, fsync raises it.
    """
    call = _of_c_library("sync_file_range")
    if call is not None and call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_BEGIN_WRITING)) != 0:
        code = ctypes.get_errno()
        if code in (*_NO_ROOM, errno.EIO):
            raise OSError(code, os.strerror(code))


def remove(path: Path) -> None:
    """Drop a file or folder that a newer one has made superfluous; one that is gone already is no error.

    A folder loses its name first, so that it is never seen half removed. So does what is large, and a thread frees the
    rest. Not by way of an open descriptor: a process forked meanwhile (a loader's worker) would hold the blocks for as
    long as it lives.
    """
    is_folder = path.is_dir()
    with suppress(FileNotFoundError):
        is_large = sum(each.stat().st_size for each in (path.iterdir() if is_folder else [path])) >= _ASIDE_BYTES
        if is_folder or is_large:
            doomed = temporary_path(path)
            os.rename(path, doomed)
            begin(doomed)
            (_free_aside if is_large else _free)(doomed)
        else:
            os.unlink(path)


def _free(doomed: Path) -> None:
    discard(doomed)
    end(doomed)


def _free_aside(doomed: Path) -> None:
    """`_free` in a thread: it takes long for large files."""
    freeing = threading.Thread(target=_free, args=(doomed,), name="dengine-checkpoint-free", daemon=False)
    with _lock:
        _freeing[:] = [each for each in _freeing if each.is_alive()]
        _freeing.append(freeing)
        freeing.start()


def wait_for_room() -> None:
    """Until all that is aside is free: a disk with room for one more file has none before."""
    with _lock:
        while _freeing:
            _freeing.pop().join()


def _reserved(descriptor: int, num_bytes: int) -> int:
    """The error's number; 0 if there is none."""
    call = _of_c_library("fallocate")
    if call is None:
        return errno.ENOSYS
    failed = call(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0
    return ctypes.get_errno() if failed else 0


@functools.cache
def _of_c_library(name: str) -> Any:
    """A function, or None. A call leaves the interpreter to the other threads."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None
