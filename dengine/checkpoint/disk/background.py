"""The thread that writes while training goes on."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from dengine.distributed import progress

__all__ = ["Writing", "at_work"]

T = TypeVar("T")

_PATIENCE_S = 1.0


def at_work() -> None:
    """Report that the disk is at work, which is progress of the loop if the loop itself writes, or waits."""
    thread = threading.current_thread()
    if not isinstance(thread, _Thread) or thread.is_awaited:
        progress()


class _Thread(threading.Thread):
    is_awaited = False  # by the loop


class Writing(Generic[T]):
    """Calls `prepare()` at once, and what it gives in a thread of its own, from `go` on. Its result, or its error, is
    kept until somebody asks.

    Two steps, since the thread takes turns of the interpreter from the loop as soon as it runs. It is no daemon: an
    interpreter that ends waits for it, so that what was begun is written. An interrupt may come before `go`: then it
    begins when somebody waits for it, or a second after `prepare`.
    """

    def __init__(self, prepare: Callable[[], Callable[[], T]]) -> None:
        self._call: Callable[[], T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        # Plain locks, taken here and let go once: an interrupt within an Event or a Semaphore leaves it shut for ever.
        self._may_go, self._end = threading.Lock(), threading.Lock()
        self._may_go.acquire()
        self._end.acquire()
        self.is_done = False
        self._thread = _Thread(target=self._run, name="dengine-checkpoint", daemon=False)
        try:
            self._thread.start()  # which costs a turn too: better now than beside the call
            self._call = prepare()
        except BaseException:
            self.go()
            raise

    def go(self) -> None:
        """Begin; this returns at once."""
        with suppress(RuntimeError):  # it has begun already
            self._may_go.release()

    def is_done_within(self, timeout_s: float) -> bool:
        self.go()
        self._thread.is_awaited = True
        return self.is_done or self._end.acquire(timeout=timeout_s)

    def result(self) -> T:
        """Wait for the end, and give the result or raise the error. An interrupt (Ctrl-C) ends the waiting alone."""
        self.go()
        self._thread.is_awaited = True
        # Not join(): interrupted, that takes the thread for ended (CPython before 3.13), and the interpreter would not
        # wait for it any more.
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
            del call  # what it holds is given up before anybody goes on
            self.is_done = True
            self._end.release()
