"""Files and folders that are complete or not there: written beside their final name, flushed, then renamed."""

import itertools
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

__all__ = [
    "begin",
    "commit",
    "discard",
    "end",
    "make_folder",
    "recover",
    "remove_leftovers",
    "sync",
    "temporary_path",
    "write_beside",
    "write_file",
    "write_folder",
]

T = TypeVar("T")

_REPLACED = ".replaced"  # .{final name}.replaced: a folder that makes room for a new one of its name
# .{final name}.{process}-{count}@{host}.tmp
_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-\d+@(?P<host>[^/]*)\.tmp")
_NAME_LENGTH = 40  # of the final name in a temporary one: a name has at most 255 bytes
_count = itertools.count()
_under_way: set[str] = set()  # names, each used once, that this process writes or is yet to commit, in any thread
_lock = threading.Lock()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by the file that `write` makes at the path it is given, once that is on the disk.

    Raises: OSError, or what `write` raises; `path` is as it was then.
    """

    def flushed(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)  # left by a killed process of this number, or a link to somewhere else
        write(temporary)
        sync(temporary)

    temporary, _ = _beside(path, flushed)
    commit(temporary, path)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make the folder `path`, or replace an empty one, by what `fill` puts into the folder it is given, once all of
    that is on the disk.

    Raises: OSError, or what `fill` raises; `path` is as it was then.
    """
    make_folder(path.parent)
    temporary = temporary_path(path)
    begin(temporary)
    try:
        temporary.mkdir()
        fill(temporary)
        for each in temporary.rglob("*"):
            sync(each)
        sync(temporary)
        if path.is_dir():
            path.rmdir()  # an error if somebody has filled it meanwhile
        commit(temporary, path)
    except BaseException:
        discard(temporary)
        raise
    finally:
        end(temporary)


def write_beside(path: Path, write: Callable[[int], T]) -> tuple[Path, T]:
    """Have `write` fill a temporary file (by its descriptor) in the folder of `path`, and flush it to the disk.

    In the same folder, since a rename is atomic only within one file system. If anything fails, the temporary file is
    gone again, and `path` is as it was. Until it is committed, no other thread takes it for a leftover.

    Returns:
        The temporary file's path, and what `write` gave.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """

    def flushed(temporary: Path) -> T:
        # Not through a link, which would lead somewhere else.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(temporary, flags, 0o666)
        try:
            result = write(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return result

    return _beside(path, flushed)


def _beside(path: Path, write: Callable[[Path], T]) -> tuple[Path, T]:
    make_folder(path.parent)
    temporary = temporary_path(path)
    begin(temporary)
    try:
        with _interrupts_raised():
            result = write(temporary)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        end(temporary)
        raise
    return temporary, result


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raise the interrupt (Ctrl-C, an exit by a signal's handler) instead of the error that it led to.

    torch's writer, for one, complains if its file is closed before the end.
    """
    handled = sys.exc_info()[1]  # before this block: no error of it comes from that one
    try:
        yield
    except Exception as error:
        cause = error.__context__
        while cause is not None and cause is not handled:
            if not isinstance(cause, Exception):
                raise cause from None
            cause = cause.__context__
        raise


def temporary_path(path: Path) -> Path:
    """A name beside `path` that says which process of which host writes it, new with each call."""
    return path.with_name(f".{path.name[:_NAME_LENGTH]}.{os.getpid()}-{next(_count)}@{_host()}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Give the finished file or folder its final name. From then on it survives a power cut.

    To replace a folder takes two renames: the old one gets another name, then the new one its final name. The old one
    is deleted afterwards. After a kill between the two, `recover` finds the old one under its other name.

    Raises:
        OSError: it cannot be renamed, or the folder not be flushed; the temporary file is gone then, and `path` is as
            it was (except for what had that name before, if that was replaced by then). After an interrupt (Ctrl-C),
            `path` is as it was, or has what is new.
    """
    is_new, is_folder = not os.path.lexists(path), temporary.is_dir()
    try:
        if is_folder:
            _swap_folders(temporary, path)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        if os.path.lexists(temporary):
            discard(temporary)
        elif is_new and isinstance(error, Exception):
            discard(path)
        raise
    finally:
        end(temporary)
    if is_folder:
        discard(_aside(path))


def discard(path: Path) -> None:
    """Remove a file, or a folder with its content. What cannot be removed stays, without an error."""
    if path.is_dir():
        with _interrupts_raised():
            shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def recover(folder: Path) -> None:
    """Give folders in `folder` back their names if a kill left them aside while they were being replaced."""
    for aside in folder.glob(f".*{_REPLACED}"):
        path = folder / aside.name.removeprefix(".").removesuffix(_REPLACED)
        if path.is_dir():
            discard(aside)
            continue
        with suppress(OSError):
            os.rename(aside, path)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files and folders in `folder` that a killed process of this host left; give their paths.

    A file is left alone while its process lives, and if another host wrote it: nobody here knows whether that process
    lives. What cannot be removed stays.
    """
    removed = []
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _host() and not _is_written(path, int(match["pid"])):
            discard(path)
            if not os.path.lexists(path):
                removed.append(path)
    return removed


def sync(path: Path) -> None:
    """Flush a file, or a folder: a rename is in the folder, and reaches the disk with it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, and flush each parent to the disk."""
    if folder.is_dir():
        return
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def _swap_folders(temporary: Path, path: Path) -> None:
    aside = _aside(path)
    if not os.path.lexists(path):
        os.rename(temporary, path)
        return
    discard(aside)
    try:
        os.rename(path, aside)
        os.rename(temporary, path)
    except BaseException:
        if not os.path.lexists(path):
            os.rename(aside, path)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_REPLACED}")


def begin(temporary: Path) -> None:
    """Protect `temporary` from now on: no thread of this process takes it for a leftover."""
    with _lock:
        _under_way.add(temporary.name)


def end(temporary: Path) -> None:
    """End the protection of `temporary`: if it is still there, it is a leftover."""
    with _lock:
        _under_way.discard(temporary.name)


def _is_written(path: Path, pid: int) -> bool:
    if pid == os.getpid():
        # In a container, a requeued process often gets the number of the one that was killed.
        with _lock:
            return path.name in _under_way
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def _host() -> str:
    return socket.gethostname().replace("/", "_")
