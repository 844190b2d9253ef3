"""The control plane: this rank's end of what lets all ranks leave together.

A thread sleeps until there is a message (channel.py); no loop waits for a rank, and no rank asks another one for
anything while all goes well. What becomes of a failure is in propagation.py, how a run stops at one iteration on all
ranks in stop.py, and what a rank does by itself now and then (publish its position, look whether somebody is gone or
hangs) in watchdog.py.
"""

import atexit
import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import DistError, ProcessGroup

from dengine import torch_internals
from dengine.control.activity import Activity
from dengine.control.call_log import CallLog, call_site
from dengine.control.channel import ControlContext, Messages
from dengine.control.failure import Failure, line_of, traceback_of, write_error_file
from dengine.control.heartbeat import Heartbeat
from dengine.control.leaving import LEAVE_S, Leaving
from dengine.control.liveness import LivenessProbe, exempt_key
from dengine.control.prepared import Prepared
from dengine.control.propagation import Failures
from dengine.control.run import OwnRun, Run, Runs, Where
from dengine.control.stall import wait_for_stacks
from dengine.control.status import GroupStatus
from dengine.control.stop import SharedRuns
from dengine.control.undisturbed import undisturbed
from dengine.control.watchdog import Watchdog
from dengine.launch.parsing import has_fields, warn_malformed
from dengine.launch.world import entered_plane
from dengine.torch_internals import HashStore

__all__ = ["Control", "NullPlane", "Plane", "plane"]

_LATE_S = 0.3
# How much longer a report may take after a failure: a rank that is gone makes none; one that raised is alive, and its
# thread may still be at work.
_GONE_S = 2.0
_RAISED_S = 30.0
_UNWATCHED_S = 1800.0  # if nobody reports failures: as long as a collective of torch waits


class Plane(Protocol):
    """What this package asks of the control plane.

    It is `Control`, or `NullPlane` if there are no other ranks, or no store by which to reach them.
    """

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of this package's own collectives, for tensors on the CPU. None: the default group."""

    @property
    def store(self) -> Any:
        """A store that the ranks share."""

    @property
    def prepared(self) -> Prepared: ...

    def patience_s(self, *, is_leaving: bool) -> float:
        """How many more seconds another rank's report may take. `is_leaving`: this rank leaves its run by an error."""

    def start(self) -> None:
        """Start the threads. Their end is `close`."""

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        """Begin the next run of an engine: one that all ranks run or (not `is_shared`) this rank's own. No
        communication. `where` gives the positions of the engines that run in some frames, for reports.

        Raises: RemoteRankError, StallError: a rank has failed before.
        """

    def enter_call(self, what: str, site: str) -> None:
        """Note that this rank calls the collective `what`; a `site` that is not empty must be the same on all ranks.

        Raises: ConsistencyError: another rank has called something else. RemoteRankError, StallError: one has failed.
        """

    def leave_call(self) -> None: ...

    def call_site(self) -> str:
        """The line of the user's code that calls, if the ranks compare it; else ""."""

    def tick(self) -> None:
        """Note that this rank is at work."""

    def exempt(self) -> AbstractContextManager[None]:
        """Inside the `with` block this rank may take as long as it likes, and does not count as hanging."""

    def failed(self, error: BaseException, here: FrameType) -> BaseException:
        """Report `error`, which leaves the block; gives what to raise for it. `here`: where it is being handled."""

    def leave_together(self) -> None:
        """Wait until all ranks have come to the end of the block.

        Collective. Raises: RemoteRankError, StallError: a rank fails meanwhile. LaunchError: the store is gone.
        """

    def close(self, *, is_failing: bool) -> None:
        """End the threads; if this rank fails, free those who wait for it. Cost: 2.3 s at most, on rank 0 4.3 s."""


class NullPlane:
    """In a world of one, and in a group of somebody else whose ranks reach no store together: nobody is told anything.

    It keeps nothing, so that one is as good as another.
    """

    group = None

    @property
    def store(self) -> Any:
        return torch_internals.default_store() if dist.is_available() and dist.is_initialized() else HashStore()

    @property
    def prepared(self) -> Prepared:
        return Prepared()  # nobody to compare with

    def patience_s(self, *, is_leaving: bool) -> float:
        return _RAISED_S if is_leaving else _UNWATCHED_S

    def start(self) -> None:
        pass

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        return OwnRun(Runs())

    def enter_call(self, what: str, site: str) -> None:
        pass

    def leave_call(self) -> None:
        pass

    def call_site(self) -> str:
        return ""

    def tick(self) -> None:
        pass

    def exempt(self) -> AbstractContextManager[None]:
        return nullcontext()

    def failed(self, error: BaseException, here: FrameType) -> BaseException:
        write_error_file(line_of(error), traceback_of(error), is_cause=True)
        return error

    def leave_together(self) -> None:
        pass

    def close(self, *, is_failing: bool) -> None:
        pass


_OUTSIDE = NullPlane()


def plane() -> Plane:
    """The control plane of the world that is open. Never communicates."""
    return entered_plane() or _OUTSIDE


class Control:
    """This rank's end of the control plane. Cost: two threads that sleep, two connections to the store; three threads
    if rank 0 hosts the store.
    """

    def __init__(self, context: ControlContext, stall_timeout_s: float) -> None:
        self.context = context
        self.group: ProcessGroup | None = context.group
        self.store = context.store
        self.prepared = Prepared()
        self.messages = messages = Messages(context)
        self._runs = Runs()
        self._status = status = GroupStatus(self._runs.wake)
        self._call_log = CallLog(context.here, context.store)
        self._activity = Activity(self._runs, self._call_log)
        heartbeat = Heartbeat(context, self._activity)
        self._probe = probe = LivenessProbe(context, messages=messages, status=status, heartbeat=heartbeat)
        self._failures = failures = Failures(
            context, messages=messages, status=status, heartbeat=heartbeat, probe=probe
        )
        self._shared_runs = SharedRuns(context, messages=messages, status=status, failures=failures, runs=self._runs)
        self._leaving = Leaving(context, messages=messages, status=status, call_log=self._call_log, failures=failures)
        self._thread = threading.Thread(target=self._read_all, name="dengine-control", daemon=True)
        self._watchdog = Watchdog(
            context,
            status=status,
            heartbeat=heartbeat,
            probe=probe,
            failures=failures,
            stall_timeout_s=stall_timeout_s,
        )

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()
        # If the block is never left (in a notebook), the threads must be gone before the interpreter is.
        atexit.register(_end_at_exit, weakref.ref(self))

    # -- runs, collectives, and time for them ----------------------------------------------------------------------

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        self._failures.check()
        run = self._shared_runs.next() if is_shared else OwnRun(self._runs)
        self._runs.begin(run, where)
        self.context.connections.wake()
        return run

    def patience_s(self, *, is_leaving: bool) -> float:
        failure = self._status.failure
        if failure is not None and failure.kind != "raised":
            return _GONE_S
        return _RAISED_S if failure is not None or is_leaving else math.inf

    def enter_call(self, what: str, site: str) -> None:
        self._failures.check()
        self._call_log.enter(what, site)

    def leave_call(self) -> None:
        self._call_log.leave()

    def call_site(self) -> str:
        return call_site()

    def tick(self) -> None:
        self._activity.num_ticks += 1

    @contextmanager
    def exempt(self) -> Iterator[None]:
        store, key, activity = self.context.store, exempt_key(self.context.here.rank), self._activity
        with suppress(DistError):  # the store is gone, and nobody can ask
            store.set(key, "yes")  # for those who ask while this rank holds the interpreter
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
                number = self.messages.number
                message = self.messages.next(may_sleep=not self._shared_runs.is_deciding)
                if message is not None:
                    self._receive(number, message)
                self._shared_runs.decide_stops()
            self.messages.reader.add("gone", 1)
        except Exception as error:  # the store is gone, with the process that hosted it
            self._failures.lose_store(error)

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
        except BaseException as other:  # a signal's handler raised it just before: that is reported
            return self._failures.failed(other, None, here)

    def leave_together(self) -> None:
        self._leaving.leave_together()

    def close(self, *, is_failing: bool) -> None:
        _, interruption = undisturbed(lambda: self._close(is_failing))
        if interruption is not None:
            raise interruption

    def _close(self, is_failing: bool) -> None:
        if is_failing:
            wait_for_stacks(self._status, self.context.here.rank, self.context.store)
        self._end_threads(is_failing=is_failing)
        self.context.connections.close(is_failing=is_failing)

    def _end_threads(self, *, is_failing: bool) -> None:
        """End the threads, unless that is done."""
        status, connections = self._status, self.context.connections
        if status.is_closed:
            return
        status.is_closed = True
        connections.wake()
        with suppress(DistError):  # the store is gone
            if is_failing:
                if not status.is_aborted:  # else all others abort by themselves
                    connections.hang_up()
                elif status.is_store_lost:  # at once, and they may be late
                    time.sleep(_LATE_S)
                if not status.is_store_lost and self.context.store.add("ended", 1) == 1:
                    self.messages.publish(kind="end")
            self._thread.join(timeout=LEAVE_S)  # a thread that is killed with the interpreter can crash the process
            if self.context.endpoint.is_hosted_by_rank_zero and self.context.here.rank == 0:
                self._leaving.wait_for_readers()
        self._watchdog.stop()


def _end_at_exit(control: "weakref.ref[Control]") -> None:
    if (here := control()) is not None:
        here._end_threads(is_failing=True)
