"""Write a file, and compute its SHA-256 at the same time.

Three things happen at once: a thread computes the digest, the disk stores what was written so far, and the caller goes
on writing. One after the other, they would take about twice as long.
"""

import hashlib
import os
import queue
import threading
from typing import Any

import numpy as np

from dengine.checkpoint.disk import space
from dengine.checkpoint.disk.background import at_work

__all__ = ["HashingWriter"]

# Smaller parts are collected to this size: each part by itself would cost the threads a turn of the interpreter.
_PART_BYTES = 1 << 20
# Less than this is hashed without a thread: to start one costs as much.
_THREAD_BYTES = 1 << 17
_REPORT_BYTES = 1 << 17  # less is written too fast to be worth a report of progress
# The disk gets this much at a time: soon, so that it can start; not less, since each time costs a call.
_FLUSH_BYTES = 4 << 20


class HashingWriter:
    """Appends to `descriptor`, and computes the SHA-256 of all of it. `torch.save` can write into it.

    Use it in a `with` block: its thread ends with that.

    Args:
        expected_bytes: at least this many bytes will come; disk space for them is reserved at once.

    Raises:
        OSError: here and in each method, if the disk is full or fails.
    """

    def __init__(self, descriptor: int, expected_bytes: int = 0) -> None:
        self.num_bytes = 0  # so far
        self.error: OSError | None = None  # kept, as torch.save raises another one instead
        self._descriptor = descriptor
        self._num_unflushed = 0
        self._digest = _Digest()
        # One is filled while the other is hashed.
        # Without zeros: a small file does not pay for memory that it never fills.
        self._memory, self._other = (np.empty(_PART_BYTES, np.uint8).data for _ in range(2))
        self._num_gathered = 0
        self._is_other_hashed = _DONE
        space.reserve(descriptor, expected_bytes)

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._digest.end()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write `data`, and give the number of bytes. Nothing reads `data` after this returns or raises."""
        view = memoryview(data).cast("B")
        try:
            if self._num_gathered + len(view) > _PART_BYTES:
                self._write_gathered()
            if len(view) >= _PART_BYTES:
                self._write_large(view)
                return len(view)
        except OSError as error:
            self.error = self.error or error
            raise
        end = self._num_gathered + len(view)
        self._memory[self._num_gathered : end] = view
        self._num_gathered = end
        return len(view)

    def flush(self) -> None:
        """Do nothing, so that the last bytes can still be taken back. `torch.save` calls this."""

    def take_back(self, num_bytes: int) -> bytes:
        """Remove the last bytes, which were not written yet, and give them.

        Raises:
            ValueError: they are written already: they came in several parts, or in a large one.
        """
        start = self._num_gathered - num_bytes
        if start < 0:
            raise ValueError(f"{num_bytes} bytes cannot be taken back: {-start} of them are written.")
        taken, self._num_gathered = bytes(self._memory[start : self._num_gathered]), start
        return taken

    def digest(self) -> str:
        """The digest of all bytes so far."""
        self._write_gathered()
        return self._digest.hexdigest()

    def end_with_digest(self, data: bytes) -> str:
        """Write `data` and then the digest of everything, as text, and give that digest."""
        self.write(data)
        digest = self.digest()
        self.write(digest.encode())
        self._write_gathered()
        return digest

    def _write_gathered(self) -> None:
        """Write the collected bytes, but do not wait until they are on the disk."""
        if not self._num_gathered:
            return
        gathered, self._num_gathered = self._memory[: self._num_gathered], 0
        self._is_other_hashed.wait()
        self._memory, self._other = self._other, self._memory
        self._is_other_hashed = self._digest.add(gathered)
        self._put(gathered)

    def _write_large(self, view: memoryview) -> None:
        is_hashed = self._digest.add(view)
        try:
            self._put(view)
        finally:
            is_hashed.wait()

    def _put(self, view: memoryview) -> None:
        while view:
            count = os.write(self._descriptor, view[:_FLUSH_BYTES])
            view = view[count:]
            self.num_bytes += count
            self._num_unflushed += count
            if count >= _REPORT_BYTES:
                at_work()  # a slow disk may take longer than the ranks wait for a rank that makes no progress
            if self._num_unflushed >= _FLUSH_BYTES:
                space.start_flush(self._descriptor)
                self._num_unflushed = 0


class _Digest:
    """A SHA-256 that a thread computes, if there is enough data."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last = _DONE

    def add(self, view: memoryview) -> threading.Event:
        """Hash `view` after all others, and give an event that is set when that is done."""
        if self._thread is None:
            if len(view) < _THREAD_BYTES:
                self._sha256.update(view)
                return _DONE
            self._thread = threading.Thread(target=self._run, name="dengine-checkpoint-digest", daemon=True)
            self._thread.start()
        self._last = threading.Event()
        self._jobs.put((view, self._last))
        return self._last

    def hexdigest(self) -> str:
        self._last.wait()
        return self._sha256.hexdigest()

    def end(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            if self._thread.is_alive():  # an interrupt may have come while it was started
                self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            view, done = job
            self._sha256.update(view)
            done.set()


_DONE = threading.Event()
_DONE.set()
