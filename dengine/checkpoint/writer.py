"""The thread that writes while training goes on."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dengine.distributed import progress

__all__ = ["Writing", "at_work"]

T = TypeVar("T")


def at_work() -> None:
    """Tell that the disk goes on, which is progress of the loop where it is the loop that writes, or that waits."""
    thread = threading.current_thread()
    if not isinstance(thread, _Thread) or thread.is_awaited:
        progress()


class _Thread(threading.Thread):
    is_awaited = False  # by the loop


class Writing(Generic[T]):
    """Calls `prepare()` at once, and what it gives in a thread of its own, from `go` on. Its result, or its error, is
    kept until somebody asks.

    Two steps, since the thread takes turns of the interpreter from the loop as soon as it runs. It is no daemon: an
    interpreter that ends waits for it, so that what was begun is written; so call `go` in any case.
    """

    def __init__(self, prepare: Callable[[], Callable[[], T]]) -> None:
        self._call: Callable[[], T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        self._may_go = threading.Semaphore(0)
        self._is_over = threading.Event()
        self._thread = _Thread(target=self._run, name="dengine-checkpoint", daemon=False)
        # To start it costs a turn too: better now than beside the call.
        self._thread.start()
        try:
            self._call = prepare()
        except BaseException:
            self.go()
            raise

    def go(self) -> None:
        """Begin; this returns at once."""
        self._may_go.release()

    @property
    def is_done(self) -> bool:
        return self._is_over.is_set()

    def is_done_within(self, timeout_s: float) -> bool:
        self._thread.is_awaited = True
        return self._is_over.wait(timeout_s)

    def result(self) -> T:
        """Wait for the end, and give the result or raise the error. An interrupt (Ctrl-C) ends the waiting alone."""
        self._thread.is_awaited = True
        # Not join(): interrupted, that takes the thread for ended (CPython before 3.13), and the interpreter would not
        # wait for it any more.
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        self._may_go.acquire()
        call, self._call = self._call, None
        try:
            if call is not None:
                self._result = call()
        except BaseException as error:
            self._error = error
        finally:
            del call  # what it holds is given up before anybody goes on
            self._is_over.set()
