"""Find out why a connection broke, or a collective timed out: whether another rank has failed."""

import time
from contextlib import suppress

from torch.distributed import DistError

from dengine.control.context import ControlContext
from dengine.control.failure import Failure, line_of
from dengine.control.liveness import LivenessProbe

__all__ = ["DELIVERY_S", "Inquiry"]

DELIVERY_S = 0.5  # the longest time of a report from one rank to the others
_POLL_S = 0.02
_INQUIRE_S = 4.0  # the longest time to find out which rank is gone


class Inquiry:
    """An inquiry: the loop asks and waits, and the watchdog finds out which rank is gone, as it may wait for the
    store.
    """

    def __init__(self, context: ControlContext, probe: LivenessProbe) -> None:
        self._context = context
        self._status = context.status
        self._probe = probe
        self._is_wanted = False
        self._num_ended = 0

    def cause_of(self, error: BaseException) -> Failure | None:
        """The failure of another rank that led to `error` in a collective of torch.

        None if all ranks are alive, so that the failure is this rank's own, or if no rank can be asked.
        """
        cause = self._vanished_rank()
        if cause is None and not self._status.is_store_lost:
            cause = self._late_rank("timed out" in line_of(error).lower())
        return cause

    def begin(self) -> bool:
        """Whether the loop has asked which rank is gone. For the watchdog, which finds out and calls `end`."""
        is_wanted, self._is_wanted = self._is_wanted, False
        return is_wanted

    def end(self) -> None:
        """Wake up the loop that waits for the answer: no rank is gone, or its failure was reported."""
        self._num_ended += 1
        self._status.update()

    def _vanished_rank(self) -> Failure | None:
        """The failure of the rank that broke the connection."""
        status = self._status
        if not self._is_known_within(DELIVERY_S):
            number = self._num_ended
            self._is_wanted = True
            self._context.connections.wake()
            status.wait_for(lambda: status.failure or status.is_store_lost or self._num_ended > number, _INQUIRE_S)
            if status.failure is None:  # the report is still on its way through the store
                self._is_known_within(DELIVERY_S)
        failure = status.failure
        is_mine = failure is not None and failure.rank == self._context.here.rank and failure.kind == "raised"
        return None if is_mine else failure

    def _late_rank(self, is_timeout: bool) -> Failure | None:
        """The failure of the rank for which others waited until the group's timeout. The first rank to time out
        asks.
        """
        store = self._context.store
        with suppress(DistError):  # the store is gone
            if is_timeout and store.add("late", 1) == 1:
                if (failure := self._probe.find_late()) is not None:
                    self._context.report(failure)
                store.set("late_is_known", "yes" if failure is not None else "no")
            if not store.check(["late"]):
                return None
            end_s = time.monotonic() + _INQUIRE_S
            # Not by wait(), during which the thread that answers probes could not use the store.
            while not (is_known := store.check(["late_is_known"])) and time.monotonic() < end_s:
                time.sleep(_POLL_S)
            if is_known and store.get("late_is_known") == b"yes":
                self._is_known_within(_INQUIRE_S)
        failure = self._status.failure
        return None if failure is None or failure.rank == self._context.here.rank else failure

    def _is_known_within(self, timeout_s: float) -> bool:
        """Wait for a failure, or for the loss of the store."""
        status = self._status
        return status.wait_for(lambda: status.failure or status.is_store_lost, timeout_s)
