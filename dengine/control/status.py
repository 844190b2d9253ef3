"""How things stand between the ranks, as this one knows it: written by several threads, waited for by others."""

import threading
from collections.abc import Callable

from dengine.control.failure import Failure

__all__ = ["Standing"]


class Standing:
    """What this rank has heard, and where it is itself on the way out. Who waits wakes up at every change of `note`.

    Attributes:
        failure: the first failure that any rank told of, until it is forgiven; all ranks name the same one.
        is_broken: the connections are shut: nobody waits in a collective any more, and none can be joined.
        is_lost: the store cannot be reached any more.
        all_left: all ranks have come to the end of the block.
        is_over: nobody says anything any more.
        is_closed: this rank has left the block.
        is_leaving: this rank's run is on its way out, by an error.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        """`look` wakes those up that wait in another way: loops whose run is being decided about."""
        self.failure: Failure | None = None
        self.is_broken = False
        self.is_lost = False
        self.all_left = False
        self.is_over = False
        self.is_closed = False
        self.is_leaving = False
        self._look = look
        self._changed = threading.Condition()

    def note(
        self,
        *,
        failure: Failure | None = None,
        is_broken: bool = False,
        is_lost: bool = False,
        all_left: bool = False,
        is_over: bool = False,
    ) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self.is_broken |= is_broken
            self.is_lost |= is_lost
            self.all_left |= all_left
            self.is_over |= is_over
            self._changed.notify_all()
        self._look()

    def forget_failure(self) -> None:
        with self._changed:
            self.failure = None
            self.is_leaving = False
            self._changed.notify_all()

    def wait_for(self, is_so: Callable[[], object], timeout_s: float) -> bool:
        """Wait until `is_so()`, asked again at every change; whether it is, after `timeout_s` at the latest."""
        with self._changed:
            return bool(self._changed.wait_for(is_so, timeout_s))
