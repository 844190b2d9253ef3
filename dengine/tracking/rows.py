"""Write and read `metrics.jsonl`, which has one JSON object a line."""

import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from dengine.tracking.files import TrackingError
from dengine.tracking.values import Scalar, encode

__all__ = ["ROWS", "RowFile", "mend", "read_rows"]

ROWS = "metrics.jsonl"


class RowFile:
    """Appends rows to a file. Each row goes to the operating system at once, so that a killed process loses none.

    One write a row costs about as much as its JSON, and needs neither a thread nor a timer. If a write fails (a full
    disk), there is a warning, and the rows are kept and tried again with the next one; `close` raises if some are left.

    Raises:
        TrackingError: the file is being written, by this process or another. OSError: it cannot be opened.
    """

    # A lock of `lockf` never conflicts within its process, and one of `flock` would be inherited by forked workers.
    _open_here: ClassVar[dict[str, "RowFile"]] = {}

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        self._real = os.path.realpath(path)
        if self._open_here.setdefault(self._real, self) is not self:
            raise TrackingError(f"{path} is being written by this process: finish() that run before resuming it.")
        self._lock = self._descriptor = -1
        try:
            # The lock has its own file: such a lock is lost as soon as its process closes the file anywhere.
            self._lock = os.open(path.with_name(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self._take_lock()
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            mend(self._descriptor)
        except BaseException:
            self._close()
            raise

    def append(self, row: Mapping[str, Scalar]) -> None:
        line = encode(row)
        if self._waiting:
            line = self._waiting + line
        try:
            self._write(line)
        except OSError as error:
            if not self._waiting:
                warnings.warn(
                    f"{self._path} could not be written ({error}): rows are kept in memory until it can be.",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._waiting = line
            return
        self._waiting = b""

    def close(self) -> None:
        """Write the rows that are left, and close the file. Raises: TrackingError: some rows could not be written."""
        try:
            if self._waiting:
                self._write(self._waiting)
                self._waiting = b""
            with suppress(OSError):  # a file system without fsync
                os.fsync(self._descriptor)
        except OSError as error:
            raise TrackingError(f"{self._waiting.count(10)} rows of {self._path} are lost: {error}") from error
        finally:
            self._close()

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:  # the disk is full: remove the half line
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise

    def _close(self) -> None:
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._open_here.pop(self._real, None)

    def _take_lock(self) -> None:
        """Lock the file until the process ends, in whatever way. Workers do not inherit the lock."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrackingError(
                f"{self._path} is being written by another process: a run can be resumed once that has ended."
            ) from None
        except OSError:
            pass  # a network file system without locks


def mend(descriptor: int) -> None:
    """Repair the last line of the file, which a killed writer may have left incomplete.

    A line that only lacks its newline gets one; any other incomplete line is removed.
    """
    size = os.fstat(descriptor).st_size
    text = os.pread(descriptor, size, 0)
    if not text or text.endswith(b"\n"):
        return
    line = text[text.rfind(b"\n") + 1 :]
    if _row(line) is not None:
        os.write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, size - len(line))


def read_rows(path: Path) -> tuple[list[dict[str, object]], list[int]]:
    """The rows of a file, in order, and the numbers (from 1) of lines that are not rows.

    A last line without a newline is being written, or was when its writer was killed: unless it is complete, it is left
    out, and does not count as damaged. "NaN" and its like are strings, as in the file; `float()` reads them.

    Raises: OSError: the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if (row := _row(last)) is not None:
        rows.append(row)
    return rows, damaged


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
