"""Disk space for large files: reserve it before a write, free it in a thread, and start flushing early."""

import ctypes
import errno
import functools
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dengine.atomic_files import begin, discard, end, temporary_path

__all__ = ["remove", "reserve", "start_flush", "wait_for_space"]

_ASIDE_BYTES = 1 << 20  # less than this is freed faster than a thread starts
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a reader never sees reserved space as part of the file
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_freeing: list[threading.Thread] = []
_lock = threading.Lock()


def reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve disk space for `num_bytes`, if the file system can, so that a full disk fails before any write.

    If space is short, wait first for the threads that free some.

    Not `os.posix_fallocate`, which writes into each block if the file system cannot reserve.

    Raises:
        OSError: there is not enough space, or the quota does not allow it.
    """
    if num_bytes == 0:
        return
    left = os.fstatvfs(descriptor)
    if left.f_bavail * left.f_frsize < 2 * num_bytes:  # twice: a file is larger than its tensors
        wait_for_space()
    code = _reserved(descriptor, num_bytes)
    if code != 0:  # a quota, which only this call shows; or the file system cannot reserve
        wait_for_space()
        code = _reserved(descriptor, num_bytes)
    if code in _NO_SPACE:
        raise OSError(code, os.strerror(code))


def start_flush(descriptor: int) -> None:
    """Start writing the file so far to the disk, if the system can. Only fsync makes sure that it is there.

    Raises:
        OSError: the disk is full or fails. If that happens later, fsync raises it.
    """
    call = _of_c_library("sync_file_range")
    if call is not None and call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_BEGIN_WRITING)) != 0:
        code = ctypes.get_errno()
        if code in (*_NO_SPACE, errno.EIO):
            raise OSError(code, os.strerror(code))


def remove(path: Path) -> None:
    """Remove a file or folder that is no longer needed. If it is gone already, that is no error.

    A folder is renamed first, so that it is never seen half removed. A large file is, too, and a thread frees its
    blocks. (It does not unlink the file and close an open descriptor: a process forked meanwhile, such as a loader's
    worker, would keep the blocks for as long as it lives.)
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
    """Call `_free` in a thread: it takes long for large files."""
    freeing = threading.Thread(target=_free, args=(doomed,), name="dengine-checkpoint-free", daemon=False)
    with _lock:
        _freeing[:] = [each for each in _freeing if each.is_alive()]
        _freeing.append(freeing)
        freeing.start()


def wait_for_space() -> None:
    """Wait until all removed files are freed: a disk may have too little space before."""
    with _lock:
        while _freeing:
            _freeing.pop().join()


def _reserved(descriptor: int, num_bytes: int) -> int:
    """Reserve the space, and give the number of the error; 0 if there is none."""
    call = _of_c_library("fallocate")
    if call is None:
        return errno.ENOSYS
    failed = call(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0
    return ctypes.get_errno() if failed else 0


@functools.cache
def _of_c_library(name: str) -> Any:
    """A function of the C library, or None. A call of it lets other threads run."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None
