"""The thread that writes while training goes on."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Writing"]

T = TypeVar("T")


class Writing(Generic[T]):
    """`call()` in a thread of its own, from now on. Its result, or its error, is kept until somebody asks.

    The thread is no daemon: an interpreter that ends waits for it, so that what was begun is written.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dengine-checkpoint", daemon=False)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the end, and give the result or raise the error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
