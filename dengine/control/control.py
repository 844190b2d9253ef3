"""The control plane of several ranks, by which all of them leave together: this rank's end of it.

A thread sleeps until there is a message (channel.py). Without a failure or a stop, no loop waits for a rank, and no
rank sends a request to another. propagation.py handles failures, stop.py stops a run at the same iteration on all
ranks, and watchdog.py does the periodic work: it publishes the position, and finds ranks that are gone or hang.
"""

import atexit
import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch.distributed import DistError, ProcessGroup

from dengine.control.call_log import call_site
from dengine.control.context import ControlContext
from dengine.control.failure import Failure
from dengine.control.heartbeat import Heartbeat
from dengine.control.inquiry import Inquiry
from dengine.control.leaving import LEAVE_S, leave_together, wait_for_readers
from dengine.control.liveness import LivenessProbe, exempt_key
from dengine.control.plane import RAISED_S
from dengine.control.prepared import Prepared
from dengine.control.propagation import Failures
from dengine.control.run import OwnRun, Run, Where
from dengine.control.stall import wait_for_stacks
from dengine.control.stop import SharedRuns
from dengine.control.undisturbed import undisturbed
from dengine.control.watchdog import Watchdog
from dengine.launch.parsing import has_fields, warn_malformed

__all__ = ["Control"]

_LATE_S = 0.3
_GONE_S = 2.0  # the extra time for a report after a failure: a rank that is gone makes none


class Control:
    """This rank's end of the control plane. Cost: two threads that sleep, two connections to the store; three threads
    if rank 0 hosts the store.
    """

    def __init__(self, context: ControlContext, stall_timeout_s: float) -> None:
        self.context = context
        self.group: ProcessGroup | None = context.group
        self.store = context.store
        self.messages = context.messages
        self.prepared = Prepared()
        self._status = context.status
        heartbeat = Heartbeat(context)
        self._probe = LivenessProbe(context, heartbeat)
        inquiry = Inquiry(context, self._probe)
        self._failures = Failures(context, heartbeat, inquiry)
        self._shared_runs = SharedRuns(context, self._failures)
        self._thread = threading.Thread(target=self._read_all, name="dengine-control", daemon=True)
        self._watchdog = Watchdog(context, heartbeat, self._probe, self._failures, inquiry, stall_timeout_s)

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()
        # If the block is never left (in a notebook), the threads must end before the interpreter does.
        atexit.register(_end_at_exit, weakref.ref(self))

    # -- runs, collectives, and time for them ----------------------------------------------------------------------

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        self._failures.check()
        run = self._shared_runs.next() if is_shared else OwnRun(self.context.runs)
        self.context.runs.begin(run, where)
        self.context.connections.wake()
        return run

    def patience_s(self, *, is_leaving: bool) -> float:
        failure = self._status.failure
        if failure is not None and failure.kind != "raised":
            return _GONE_S
        return RAISED_S if failure is not None or is_leaving else math.inf

    def enter_call(self, what: str, site: str) -> None:
        self._failures.check()
        self.context.call_log.enter(what, site)

    def leave_call(self) -> None:
        self.context.call_log.leave()

    def call_site(self) -> str:
        return call_site()

    def tick(self) -> None:
        self.context.activity.num_ticks += 1

    @contextmanager
    def exempt(self) -> Iterator[None]:
        store, key, activity = self.context.store, exempt_key(self.context.here.rank), self.context.activity
        with suppress(DistError):  # the store is gone, so no rank can ask
            store.set(key, "yes")  # for ranks that ask while this rank blocks the interpreter
        activity.num_exempt += 1
        try:
            yield
        finally:
            activity.num_ticks += 1
            activity.num_exempt -= 1
            if not activity.num_exempt:
                with suppress(DistError):
                    store.delete_key(key)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        try:
            while not self._status.has_ended:
                self.read(may_sleep=not self._shared_runs.is_deciding)
            self.messages.reader.add("gone", 1)
        except Exception as error:  # the store is gone, with the process that hosted it
            self._failures.lose_store(error)

    def read(self, *, may_sleep: bool) -> None:
        """Take in the next message, if there is one or this may sleep, and decide what is left to decide."""
        number = self.messages.number
        message = self.messages.next(may_sleep=may_sleep)
        if message is not None:
            self._receive(number, message)
        self._shared_runs.decide_stops()

    def resolve(self) -> None:
        """Resolve a failure, if one was reported and it is time."""
        self._failures.resolve()

    def _receive(self, number: int, message: dict[str, Any]) -> None:
        try:
            self._handle(number, message)
        except DistError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            warn_malformed(message)

    def _handle(self, number: int, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "failed":
                failure = Failure.from_dict(message["failure"])
                if not 0 <= failure.rank < self.context.here.size:
                    raise ValueError(f"rank={failure.rank}")
                self._failures.receive(failure)
            case "call" if has_fields(message, number=int):
                self._probe.answer(message["number"])
            case "left":
                self._status.update(all_left=True, has_ended=True)
            case "end":
                if self._status.failure is not None:
                    self._failures.abort()
                self._status.update(has_ended=True)
            case _:
                if not self._shared_runs.receive(number, message):
                    warn_malformed(message)

    # -- leaving ---------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException, here: FrameType) -> BaseException:
        try:
            return self._failures.failed(error, None, here)
        except BaseException as other:  # a signal's handler raised it just before: report that one
            return self._failures.failed(other, None, here)

    def leave_together(self) -> None:
        leave_together(self.context, self._failures)

    def close(self, *, is_failing: bool) -> None:
        _, interruption = undisturbed(lambda: self._close(is_failing))
        if interruption is not None:
            raise interruption

    def _close(self, is_failing: bool) -> None:
        if is_failing:
            wait_for_stacks(self.context)
        self._end_threads(is_failing=is_failing)
        self.context.connections.close(is_failing=is_failing)
        # This object is in cycles, by its threads; the group and its connections are not to wait for the collector.
        self.group = self.context.group = None

    def _end_threads(self, *, is_failing: bool) -> None:
        """End the threads, unless they have ended already."""
        status, connections = self._status, self.context.connections
        if status.is_closed:
            return
        status.is_closed = True
        connections.wake()
        with suppress(DistError):  # the store is gone
            if is_failing:
                if not status.is_aborted:  # else all others abort by themselves
                    connections.hang_up()
                elif status.is_store_lost:  # at once, though the others may be late
                    time.sleep(_LATE_S)
                if not status.is_store_lost and self.context.store.add("ended", 1) == 1:
                    self.messages.publish(kind="end")
            self._thread.join(timeout=LEAVE_S)  # a thread that is killed with the interpreter can crash the process
            if self.context.endpoint.is_hosted_by_rank_zero and self.context.here.rank == 0:
                wait_for_readers(self.context)
        self._watchdog.stop()


def _end_at_exit(control: "weakref.ref[Control]") -> None:
    if (here := control()) is not None:
        here._end_threads(is_failing=True)
