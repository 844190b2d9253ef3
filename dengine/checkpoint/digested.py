"""A file that is digested while it is written, and flushed while more of it is written.

Three things at a time: one thread digests, one waits for the disk to have what was written so far, and the caller's own
writes on. One after the other, they cost about twice as much.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from dengine.checkpoint import disk
from dengine.checkpoint.writer import at_work

__all__ = ["DigestedFile"]

# Smaller parts are gathered to that much: each part by itself would cost the threads a turn of the interpreter.
_PART_BYTES = 1 << 20
# Flushed often: a disk with a cache of its own takes its time for a flush, the longer the more there is.
_FLUSH_BYTES = 8 << 20


class DigestedFile:
    """Appends to `descriptor`, with the SHA-256 of all of it. Use it as a context: its threads end with that.

    Args:
        expected_bytes: at least so many will come; room for them is taken at once.

    Raises:
        OSError: here and in each method, where the disk is full or fails.
    """

    def __init__(self, descriptor: int, expected_bytes: int = 0) -> None:
        self.num_bytes = 0  # so far
        self._descriptor = descriptor
        self._num_unflushed = 0
        self._flushing: _Aside | None = None
        self._digest = _Digest()
        # One is filled while the other is digested.
        self._buffers = [_Buffer(), _Buffer()]
        disk.reserve(descriptor, expected_bytes)

    def __enter__(self) -> "DigestedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._digest.end()
        try:
            self._end_flushing()
        except OSError:
            if kind is None:
                raise

    def write(self, data: bytes | memoryview) -> None:
        """Nothing reads `data` any more when it returns, with an error too."""
        view = memoryview(data)
        if len(view) < _PART_BYTES:
            while view:
                view = view[self._buffers[0].take(view) :]
                if self._buffers[0].is_full:
                    self.flush()
            return
        self.flush()
        digested = self._digest.add(view)
        try:
            self._put(view)
        finally:
            digested.wait()

    def flush(self) -> None:
        """Write what was gathered; whether it is on the disk is another question."""
        filled = self._buffers[0]
        if not filled.length:
            return
        self._buffers.reverse()
        self._buffers[0].clear()
        filled.digested = self._digest.add(filled.content)
        self._put(filled.content)

    def digest(self) -> str:
        """Of all that was written so far."""
        self.flush()
        return self._digest.hexdigest()

    def _put(self, view: memoryview) -> None:
        while view:
            count = os.write(self._descriptor, view[:_FLUSH_BYTES])
            view = view[count:]
            self.num_bytes += count
            self._num_unflushed += count
            at_work()  # a disk may take longer than the ranks wait for one that stands still
            if self._num_unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.is_done):
                self._end_flushing()
                self._flushing, self._num_unflushed = _Aside(partial(os.fdatasync, self._descriptor)), 0

    def _end_flushing(self) -> None:
        """Its error would be lost otherwise: a disk reports one only once."""
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()


class _Buffer:
    """Gathers small parts."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(_PART_BYTES))
        self.length = 0
        self.digested = _DONE

    @property
    def content(self) -> memoryview:
        return self._memory[: self.length]

    @property
    def is_full(self) -> bool:
        return self.length == _PART_BYTES

    def take(self, view: memoryview) -> int:
        count = min(len(view), _PART_BYTES - self.length)
        self._memory[self.length : self.length + count] = view[:count]
        self.length += count
        return count

    def clear(self) -> None:
        """Begin anew, once nobody reads it any more."""
        self.digested.wait()
        self.length = 0


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
            if len(view) < _PART_BYTES:
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
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            view, done = job
            self._sha256.update(view)
            done.set()


class _Aside:
    """A call in a thread of its own. No pool: that takes no work while the interpreter ends, and a save may go on."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="dengine-checkpoint-flush", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error = error


_DONE = threading.Event()
_DONE.set()
