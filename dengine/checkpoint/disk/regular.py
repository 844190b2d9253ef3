"""Open and read regular files only: no pipe, device or folder, and nothing larger than expected."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_regular", "read_regular"]


def open_regular(path: Path) -> BinaryIO:
    """Open `path` for reading. Does not wait for a pipe.

    Raises:
        OSError: it does not exist, cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, start: bytes, most_bytes: int) -> bytes:
    """The content of `path`, which must begin with `start` (after blanks) and have at most `most_bytes`.

    Raises:
        OSError: as `open_regular`. ValueError: it begins with something else, or is longer.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > most_bytes:
            raise ValueError(f"it has {num_bytes} bytes, which is more than it can have")
        if not file.read(len(start) + 16).lstrip().startswith(start):
            raise ValueError(f"it does not begin with {start.decode()}")
        file.seek(0)
        return file.read(most_bytes)
