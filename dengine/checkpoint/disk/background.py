"""A thread that writes while training goes on."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from dengine.distributed import progress

__all__ = ["Writing", "at_work"]

T = TypeVar("T")

_PATIENCE_S = 1.0


def at_work() -> None:
    """Report that the disk is at work. That is progress of the loop if the loop itself writes, or waits."""
    thread = threading.current_thread()
    if not isinstance(thread, _Thread) or thread.is_awaited:
        progress()


class _Thread(threading.Thread):
    is_awaited = False  # whether the loop waits for it


class Writing(Generic[T]):
    """Calls `prepare()` at once, and after `go` the function that it gave, in a thread. Keeps the result or the error.

    There are two steps, since the thread competes with the loop for the interpreter as soon as it runs. It is no
    daemon: an interpreter that ends waits for it, so that the write is finished. If an interrupt comes before `go`,
    the thread starts when its result is waited for, or a second after `prepare`.
    """

    def __init__(self, prepare: Callable[[], Callable[[], T]]) -> None:
        self._call: Callable[[], T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        # Plain locks, taken here and released once: an interrupt within an Event or a Semaphore leaves it locked for
        # ever.
        self._may_go, self._end = threading.Lock(), threading.Lock()
        self._may_go.acquire()
        self._end.acquire()
        self.is_done = False
        self._thread = _Thread(target=self._run, name="dengine-checkpoint", daemon=False)
        try:
            self._thread.start()  # to start it costs time, too: better now than during the call
            self._call = prepare()
        except BaseException:
            self.go()
            raise

    def go(self) -> None:
        """Start the call, and return at once."""
        with suppress(RuntimeError):  # it has started already
            self._may_go.release()

    def is_done_within(self, timeout_s: float) -> bool:
        self.go()
        self._thread.is_awaited = True
        return self.is_done or self._end.acquire(timeout=timeout_s)

    def result(self) -> T:
        """Wait for the end, and give the result or raise the error. An interrupt (Ctrl-C) ends only the waiting."""
        self.go()
        self._thread.is_awaited = True
        # Not join(): after an interrupt that takes the thread for ended (CPython before 3.13), and the interpreter
        # would no longer wait for it.
        while not self.is_done:
            self._end.acquire(timeout=_PATIENCE_S)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        while not self._may_go.acquire(timeout=_PATIENCE_S):
            if self._call is not None or not threading.main_thread().is_alive():
                break
        call, self._call = self._call, None
        try:
            if call is not None:
                self._result = call()
        except BaseException as error:
            self._error = error
        finally:
            del call  # its objects are released before the waiting loop goes on
            self.is_done = True
            self._end.release()
