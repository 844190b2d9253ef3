"""Run a function to its end, even if handlers of signals raise meanwhile."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["undisturbed"]

T = TypeVar("T")

_POLL_S = 1.0  # a lock is released at once; this only limits the cost of a lost wake-up
_START_S = 1.0  # for a thread to show that it has started, if its start was interrupted


def undisturbed(action: Callable[[], T]) -> tuple[T, BaseException | None]:
    """The result of `action`, and the exception that a signal's handler raised meanwhile (None if there was none).

    Raises: what `action` raises.

    Python runs handlers in the main thread only, between any two of its steps, and they may raise: Ctrl-C does, and
    torch's DataLoader for a worker that was killed. So `action` runs in another thread, and the main one waits.

    Cost: a thread; in any other thread than the main one, nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return action(), None
    work = _Work(action)
    interruption: BaseException | None = None
    try:
        threading.Thread(target=work.do, name="dengine-undisturbed", daemon=True).start()
    except BaseException as error:
        if not work.has_started_within(_START_S):  # no thread can be started: at the end of the interpreter, for one
            work.do()
        interruption = error if not isinstance(error, RuntimeError) or work.is_in_thread else None
    while not work.is_done:
        try:
            work.end.acquire(timeout=_POLL_S)
        except BaseException as error:
            interruption = interruption or error
    return work.take(), interruption


class _Work(Generic[T]):
    """An action that is run once, by the first thread that comes."""

    def __init__(self, action: Callable[[], T]) -> None:
        self.is_done = False
        self.is_in_thread = False
        self.end = threading.Lock()  # a plain lock: an interrupt within an Event or a join() may leave it locked
        self.end.acquire()
        self._action: Callable[[], T] | None = action
        self._result: T | None = None
        self._error: BaseException | None = None
        self._claim, self._started = threading.Lock(), threading.Lock()
        self._started.acquire()

    def has_started_within(self, timeout_s: float) -> bool:
        return self._started.acquire(timeout=timeout_s)

    def do(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        self.is_in_thread = threading.current_thread() is not threading.main_thread()
        self._started.release()
        assert self._action is not None
        try:
            self._result = self._action()
        except BaseException as error:
            self._error = error
        self._action = None
        self.is_done = True
        self.end.release()

    def take(self) -> T:
        """The result. Raises: what the action raises.

        Afterwards nothing is held here: the thread, which may end later, must not be the one that frees a process
        group, as that aborts a process whose interpreter is at its end.
        """
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
