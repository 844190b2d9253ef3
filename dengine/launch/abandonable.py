"""Calls that can be given up but not ended: such a call goes on in a thread that nobody waits for."""

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["unless_given_up"]

T = TypeVar("T")


def unless_given_up(
    action: Callable[[], T],
    wait: Callable[[threading.Thread], object],
    given_up: Exception,
    *,
    at_end: Callable[[], object] | None = None,
) -> T:
    """Run `action` in a thread, and give its result if there is one when `wait(thread)` returns.

    `at_end` is called in the thread after `action`.

    Raises: `given_up`, if there is no result yet; what `action` raises.
    """
    outcome: list[T | BaseException] = []

    def act() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            outcome.append(error)
        if at_end is not None:
            at_end()

    thread = threading.Thread(target=act, name="dengine-connect", daemon=True)
    thread.start()
    wait(thread)
    if not outcome:
        raise given_up
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
