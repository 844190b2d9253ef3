"""A file whose SHA-256 is computed while it is written, and that reaches the disk while more of it is written.

Three things at a time: a thread computes the digest, the disk takes what was written so far, and the caller writes on.
One after the other, they cost about twice as much.
"""

import hashlib
import os
import queue
import threading
from typing import Any

import numpy as np

from dengine.checkpoint.disk import room
from dengine.checkpoint.disk.background import at_work

__all__ = ["HashingWriter"]

# Smaller parts are gathered to that much: each part by itself would cost the threads a turn of the interpreter.
_PART_BYTES = 1 << 20
# So little is hashed without a thread: to start one costs as much.
_THREAD_BYTES = 1 << 17
_REPORT_BYTES = 1 << 17  # less is written too fast to be worth a report of progress
# The disk is given that much at a time: early, for it to begin; not less, since each time costs a call.
_FLUSH_BYTES = 4 << 20


class HashingWriter:
    """Appends to `descriptor`, with the SHA-256 of all of it. Use it as a context: its thread ends with that.
    `torch.save` writes into it, too.

    Args:
        expected_bytes: at least so many will come; room for them is taken at once.

    Raises:
        OSError: here and in each method, if the disk is full or fails.
    """

    def __init__(self, descriptor: int, expected_bytes: int = 0) -> None:
        self.num_bytes = 0  # so far
        self.error: OSError | None = None  # torch.save raises one of its own instead
        self._descriptor = descriptor
        self._num_unflushed = 0
        self._digest = _Digest()
        # One is filled while the other is hashed.
        # Without zeros: a small file does not pay for memory that it never fills.
        self._memory, self._other = (np.empty(_PART_BYTES, np.uint8).data for _ in range(2))
        self._num_gathered = 0
        self._is_other_hashed = _DONE
        room.reserve(descriptor, expected_bytes)

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._digest.end()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """The number of bytes. Nothing reads `data` any more when it returns, with an error too."""
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
        """Nothing: the last bytes can still be taken back. `torch.save` asks for the method."""

    def take_back(self, num_bytes: int) -> bytes:
        """The last bytes, which are not written then.

        Raises:
            ValueError: they are written already: so many came not in one part, or in a large one.
        """
        start = self._num_gathered - num_bytes
        if start < 0:
            raise ValueError(f"{num_bytes} bytes cannot be taken back: {-start} of them are written.")
        taken, self._num_gathered = bytes(self._memory[start : self._num_gathered]), start
        return taken

    def digest(self) -> str:
        """Of all that was written so far."""
        self._write_gathered()
        return self._digest.hexdigest()

    def end_with_digest(self, data: bytes) -> str:
        """Write `data`, and after it the digest of all before the digest, as text, which is also given."""
        self.write(data)
        digest = self.digest()
        self.write(digest.encode())
        self._write_gathered()
        return digest

    def _write_gathered(self) -> None:
        """Write what was gathered; whether it is on the disk is another question."""
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
                at_work()  # a disk may take longer than the ranks wait for one that stands still
            if self._num_unflushed >= _FLUSH_BYTES:
                room.start_flush(self._descriptor)
                self._num_unflushed = 0


class _Digest:
    """A SHA-256 that a thread computes, once there is enough of it."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last = _DONE

    def add(self, view: memoryview) -> threading.Event:
        """Digest `view` after all others; the event says when it is done."""
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
