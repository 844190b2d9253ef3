"""Files that are complete or not there: written beside their final name, flushed to the disk, then renamed."""

import itertools
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

__all__ = ["commit", "remove", "remove_leftovers", "sync_folder", "write_beside"]

T = TypeVar("T")

# .{final name}.{process}-{count}@{host}.tmp
_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-\d+@(?P<host>[^/]*)\.tmp")
_count = itertools.count()
_under_way: set[str] = set()  # paths that this process is writing now, in whatever thread
_lock = threading.Lock()


def write_beside(path: Path, write: Callable[[int], T]) -> tuple[Path, T]:
    """Have `write` fill a temporary file (its descriptor) in the folder of `path`, down to the disk.

    In the same folder, since a rename is atomic only within one file system. Where anything fails, the temporary file
    is gone again, and `path` is as it was.

    Returns:
        The temporary file's path, and what `write` gave.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    _make_folder(path.parent)
    name = f".{path.name}.{os.getpid()}-{next(_count)}@{_host()}.tmp"
    temporary = path.with_name(name)
    with _marked(temporary):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                result = write(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    return temporary, result


def commit(temporary: Path, path: Path) -> None:
    """Give the finished file its name. From here on it survives a power cut.

    Raises:
        OSError: it cannot be renamed, or the folder not be flushed; the temporary file is gone then, and `path` is as
            it was (but for a file that had that name before, and has been replaced by then).
    """
    is_new = not os.path.lexists(path)
    try:
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary if os.path.lexists(temporary) else path if is_new else temporary)
        raise


def remove(path: Path) -> None:
    """Drop a file that a newer one has made superfluous; one that is gone already is no error."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files in `folder` that a killed process of this host left; give their paths.

    A file is left alone while its process lives, and where another host wrote it: nobody here knows whether that one
    lives. What cannot be removed stays.
    """
    removed = []
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _host() and not _is_written(path, int(match["pid"])):
            with suppress(OSError):
                os.unlink(path)
                removed.append(path)
    return removed


def sync_folder(folder: Path) -> None:
    """A rename is in the folder, and reaches the disk with it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """The folder and those above it, each on the disk in its own parent."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


@contextmanager
def _marked(temporary: Path) -> Iterator[None]:
    with _lock:
        _under_way.add(str(temporary))
    try:
        yield
    finally:
        with _lock:
            _under_way.discard(str(temporary))


def _is_written(path: Path, pid: int) -> bool:
    if pid == os.getpid():
        # In a container, a requeued process often gets the number of the one that was killed.
        with _lock:
            return str(path) in _under_way
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is somebody else's
    return True


def _host() -> str:
    return socket.gethostname().replace("/", "_")
