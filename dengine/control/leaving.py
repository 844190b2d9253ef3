"""The end of the block: all ranks leave it together, through the store.

Not by a collective of the group: a rank that left its loop early would join one that the others are still in.
"""

import time

from torch.distributed import DistError

from dengine.control.call_log import CallLog
from dengine.control.channel import POLL_S, ControlContext, Messages
from dengine.control.deadlock import END_OF_GROUP
from dengine.control.propagation import Failures
from dengine.control.status import ALL_LEFT, GroupStatus

__all__ = ["LEAVE_S", "Leaving"]

LEAVE_S = 2.0  # how long the end waits for a thread, or for the others to read their messages


class Leaving:
    """This rank's part in leaving the block."""

    def __init__(
        self,
        context: ControlContext,
        *,
        messages: Messages,
        status: GroupStatus,
        call_log: CallLog,
        failures: Failures,
    ) -> None:
        self._here = context.here
        self._store = context.store
        self._messages = messages
        self._status = status
        self._call_log = call_log
        self._failures = failures

    def leave_together(self) -> None:
        """Wait until all ranks are here.

        Collective. Raises: RemoteRankError, StallError: a rank fails meanwhile. LaunchError: the store is gone.
        """
        try:
            if self._store.add("left", 1) == self._here.size:
                self._store.set(ALL_LEFT, "yes")  # before any rank reads the message, and closes
                self._messages.publish(kind="left")
        except DistError as error:
            raise self._failures.without_store("they cannot leave together", error) from None
        self._call_log.wait(END_OF_GROUP)
        try:
            self._wait_until_all_left()
        finally:
            self._call_log.leave()

    def _wait_until_all_left(self) -> None:
        status = self._status
        while not status.all_left:
            self._failures.check()
            if status.is_store_lost:
                raise self._failures.without_store("they cannot leave together")
            if status.has_ended and not status.all_left:
                raise RuntimeError("The ranks could not leave together: another one has left by an error.")
            status.wait_for(lambda: status.all_left or status.failure is not None or status.has_ended, 1.0)
            if not status.all_left and not status.is_store_lost:
                self._look_into_store()

    def _look_into_store(self) -> None:
        """The last rank to come may have been killed just before it published that all have."""
        mine = str(self._here.rank)
        try:
            if self._status.has_all_left(self._store):
                if self._store.compare_set("who_says_left", "", mine).decode() == mine:
                    self._messages.publish(kind="left")
                self._status.update(all_left=True)
        except DistError as error:
            raise self._failures.without_store("they cannot leave together", error) from None

    def wait_for_readers(self) -> None:
        """Give the others time to read all messages: this process takes the store with it."""
        end_s = time.monotonic() + LEAVE_S
        failure = self._status.failure
        is_one_lost = failure is not None and (failure.kind == "vanished" or failure.is_frozen)
        while self._store.add("gone", 0) < self._here.size - is_one_lost and time.monotonic() < end_s:
            time.sleep(POLL_S)
