"""Files that can be read to an end: no pipe, device or folder, and no larger than what they are to hold."""

import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from dengine.checkpoint.disk.calls import check_calls

__all__ = ["check_archive", "open_regular", "read_regular"]

_HEADER_BYTES = 30  # of a part of an archive, before its name


def open_regular(path: Path) -> BinaryIO:
    """`path`, to be read. A pipe is not waited for.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
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
    """All of `path`, which is to begin with `start` (blanks before it do not count) and have at most `most_bytes`.

    Raises:
        OSError: as `open_regular`. ValueError: it begins otherwise, or is longer.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > most_bytes:
            raise ValueError(f"it has {num_bytes} bytes, which is more than any has")
        if not file.read(len(start) + 16).lstrip().startswith(start):
            raise ValueError(f"it does not begin with {start.decode()}")
        file.seek(0)
        return file.read(most_bytes)


def check_archive(file: BinaryIO) -> None:
    """See that the parts of a zip archive are as long as they seem: not packed, and none of them twice; and that what
    its pickle calls takes no memory for what is not in the file.

    Cost: its table of contents is read, and the pickle.

    Raises:
        ValueError: they are longer than the file, or it has such a call. zipfile.BadZipFile: it is no archive.
    """
    parts = zipfile.ZipFile(file).infolist()
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise ValueError("it has parts that are packed, which torch.save never does")
    if sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
        raise ValueError("its parts are together longer than the file")
    if min((part.header_offset for part in parts), default=0):
        raise ValueError("it does not begin with its first part, so that two readers may find two archives in it")
    for part in parts:
        if part.filename.lower().endswith(".pkl"):
            check_calls(_content(file, part))


def _content(file: BinaryIO, part: zipfile.ZipInfo) -> bytes:
    """The bytes of a part that is not packed. Without its CRC-32, which a checkpoint does not have."""
    file.seek(part.header_offset)
    name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(_HEADER_BYTES).ljust(_HEADER_BYTES, b"\0"))
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    return file.read(part.file_size)
