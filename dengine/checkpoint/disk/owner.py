"""The owner of a folder of copies in memory: one job at a time, for as long as its process lives."""

import fcntl
import os
import socket
import time
from pathlib import Path

from dengine.errors import CheckpointError

__all__ = ["is_owned", "take_over"]

_FILE_NAME = ".owner"
_PATIENCE_S = 5.0  # the processes of a killed start may take a moment to end
_locks: dict[str, int] = {}  # by folder; never closed, since closing any descriptor of the file ends the lock


def is_owned(folder: Path) -> bool:
    """Whether some job has saved with `placement="node"` into `folder`."""
    return (folder / _FILE_NAME).exists()


def take_over(folder: Path) -> None:
    """Make this process the owner of `folder`, until it ends. It is made if only its last part is missing.

    The lock is one of the kernel's that no child process inherits, so that a killed job leaves none.

    Raises:
        CheckpointError: a living process of another job owns it, or the folder above it is missing.
        OSError: it cannot be made or written.
    """
    if not folder.is_dir():
        _make(folder)
    key = os.path.realpath(folder)
    if key in _locks and _is_same_file(_locks[key], folder / _FILE_NAME):
        return
    descriptor = os.open(folder / _FILE_NAME, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        _lock(descriptor, folder)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{_job()}process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _locks[key] = descriptor


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no folder {folder.parent} for {folder.name}: every node needs it. Name one that all nodes have, "
            "such as a folder in /dev/shm."
        ) from None


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the file is still there: a test, or an operator, may have removed the folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path) -> None:
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end_s:
                owner = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
                raise CheckpointError(
                    f"{folder} is in use by another job ({owner}), and each would remove what the other needs. Give "
                    "each job its own folder, named after the job's id."
                ) from None
            time.sleep(0.05)


def _job() -> str:
    names = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
    return next((f"job {value}, " for name in names if (value := os.environ.get(name, "none")) != "none"), "")
