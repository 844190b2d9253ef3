"""Files that are complete or not there: written beside their final name, flushed to the disk, then renamed."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["commit", "remove", "write_beside"]

_SUFFIX = ".tmp"


def write_beside(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Have `write` fill a temporary file in the folder of `path`, down to the disk; give that file's path.

    In the same folder, since a rename is atomic only within one file system. Where anything fails, the temporary file
    is gone again, and `path` is as it was.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The pid: a killed run's leftover must not be the file that its successor writes.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Give the finished file its name. From here on it survives a power cut."""
    os.replace(temporary, path)
    _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Drop a file that a newer one has made superfluous; one that is gone already is no error."""
    path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename is in the folder, and reaches the disk with it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
