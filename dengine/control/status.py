"""The status of the group, as this rank knows it. Several threads write it, and others wait for a change."""

import threading
from collections.abc import Callable

from torch.distributed import Store

from dengine.control.failure import Failure

__all__ = ["ALL_LEFT", "GroupStatus"]

ALL_LEFT = "all_left"  # key in the store: all ranks have come to the end of the block


class GroupStatus:
    """The status of the group and of this rank's own exit. `update` wakes up all threads that wait.

    Attributes:
        failure: the first failure that any rank reported, until all recover from it; the same one on all ranks.
        is_aborted: the connections are shut down, so no thread waits in a collective, and none can be joined.
        is_store_lost: the store cannot be reached any more.
        all_left: all ranks have come to the end of the block.
        has_ended: no more messages will come.
        is_closed: this rank has left the block.
        is_leaving: this rank leaves its run by an error.
    """

    def __init__(self, wake_loops: Callable[[], None]) -> None:
        """`wake_loops` wakes up the loops that wait for a decision about their run."""
        self.failure: Failure | None = None
        self.is_aborted = False
        self.is_store_lost = False
        self.all_left = False
        self.has_ended = False
        self.is_closed = False
        self.is_leaving = False
        self._wake_loops = wake_loops
        self._changed = threading.Condition()

    def update(
        self,
        *,
        failure: Failure | None = None,
        is_aborted: bool = False,
        is_store_lost: bool = False,
        all_left: bool = False,
        has_ended: bool = False,
    ) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self.is_aborted |= is_aborted
            self.is_store_lost |= is_store_lost
            self.all_left |= all_left
            self.has_ended |= has_ended
            self._changed.notify_all()
        self._wake_loops()

    def has_all_left(self, store: Store) -> bool:
        """Whether all ranks have come to the end of the block, by this rank's messages or by the store."""
        return self.all_left or bool(store.check([ALL_LEFT]))

    def clear_failure(self) -> None:
        with self._changed:
            self.failure = None
            self.is_leaving = False
            self._changed.notify_all()

    def wait_for(self, predicate: Callable[[], object], timeout_s: float) -> bool:
        """Wait until `predicate()` is true, for `timeout_s` at most; checks at every change. Gives whether it is
        true.
        """
        with self._changed:
            return bool(self._changed.wait_for(predicate, timeout_s))
