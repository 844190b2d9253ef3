"""Propagate one rank's failure to all ranks, unless all of them raise the same.

The rank that raises reports first, then raises. Each rank receives the report, and its loops stop before their next
iteration. A rank that waits in a collective waits for the failed rank in C++, so its connections are shut down, unless
all ranks leave the run by an exception within a moment. An exception that all ranks raise, and may handle, ends only
the run.
"""

import threading
import time
from contextlib import suppress
from dataclasses import replace
from types import FrameType

from torch.distributed import DistError

from dengine.control.call_log import num_joined
from dengine.control.context import ControlContext
from dengine.control.failure import (
    Failure,
    Level,
    frames_of,
    is_of_backend,
    line_of,
    remove_error_file,
    traceback_of,
    where_text,
    write_error_file,
)
from dengine.control.heartbeat import Heartbeat, levels_of
from dengine.control.inquiry import DELIVERY_S, Inquiry
from dengine.control.sockets import abort_group
from dengine.control.stall import show_stall
from dengine.control.undisturbed import undisturbed
from dengine.errors import LaunchError, RemoteRankError, StallError
from dengine.launch.console import say

__all__ = ["Failures"]

_RESOLVE_S = 2.0  # the time in which the other ranks may leave the run by their own exception
_MARK = "_dengine_reported"  # attribute of an exception that was reported: the run that it left
_OUTSIDE = -1  # instead of the number of a run: outside of any run


class Failures:
    """The failures that ranks have reported. Each is resolved: the ranks recover from it, or the group is aborted."""

    def __init__(self, context: ControlContext, heartbeat: Heartbeat, inquiry: Inquiry) -> None:
        self._context = context
        self._here = context.here
        self._store = context.store
        self._status = context.status
        self._runs = context.runs
        self._heartbeat = heartbeat
        self._inquiry = inquiry
        self._received_at_s = 0.0
        self._queued: list[Failure] = []  # received while another one was not resolved yet
        self._receive_lock = threading.Lock()
        self._left_by_error: set[int] = set()  # runs that this rank has left by an exception
        self._recovered: set[int] = set()
        self._summed_up: int | None = None  # for torchrun: the run that this rank's last failure left

    # -- this rank's own -----------------------------------------------------------------------------------------

    def failed(self, error: BaseException, run: int | None, here: FrameType) -> BaseException:
        """Report `error`, which leaves a run (or, if `run` is None, the process group); gives what to raise for it.

        If `error` is only a consequence of another rank's failure, nothing is reported, and that failure is given. If
        the handler of a signal raises meanwhile, all this is finished first, and that error is given.
        Cost: two requests to the store; after a broken connection, up to 5 s to find out who is gone.
        """
        raised, interruption = undisturbed(lambda: self._failed(error, run, here))
        if interruption is None or interruption is error:
            return raised
        _mark(interruption, _mark_of(raised))  # it was raised on the way out, so it is not reported again
        if interruption.__cause__ is None:
            interruption.__cause__ = raised
        return interruption

    def _failed(self, error: BaseException, run: int | None, here: FrameType) -> BaseException:
        self._status.is_leaving = True
        raised = error
        reported_run = _mark_of(error)  # it may come from a run within this one
        is_known = reported_run is not None and reported_run not in self._recovered
        is_others = reported_run is None and isinstance(error, RemoteRankError | StallError)
        if not is_known and not is_others:
            is_connection_error = is_of_backend(error)
            cause = self._inquiry.cause_of(error) if is_connection_error else None
            if cause is not None:
                raised = cause.as_error()
            elif is_connection_error and self._status.is_store_lost:
                raised = self.without_store(f"nobody can tell why a connection broke: {line_of(error)}")
            else:
                self._report_own(error, run, here)
        failed_run = reported_run if is_known else run
        if (failure := self._status.failure) is not None:
            failed_run = failure.run
        _mark(raised, _OUTSIDE if failed_run is None else failed_run)
        if run is not None:
            if run == failed_run:
                self._left_by_error.add(run)
            self._count_out(run)
        return raised

    def _report_own(self, error: BaseException, run: int | None, here: FrameType) -> None:
        text = traceback_of(error)
        line = line_of(error)
        where = self._runs.where(frames_of(error, here))
        self._summed_up = run
        write_error_file(f"{line} ({where_text(where)})", text, is_cause=True)
        with suppress(DistError):  # the store is gone
            started = next((each.started for each in self._runs.under_way if each.number == run), -1)
            is_interrupt = isinstance(error, KeyboardInterrupt)
            self._context.report(
                Failure("raised", self._here.rank, line, where, text, run, started, is_interrupt=is_interrupt)
            )

    def _count_out(self, run: int) -> None:
        """Count this rank among those that left `run` by an exception, and note if they left at different calls."""
        if self._status.is_aborted or self._status.has_ended or self._status.is_store_lost:
            return
        joined = f"{num_joined(self._here.size)} {self._context.call_log.num_calls}"
        with suppress(DistError):  # the store is gone
            if self._store.compare_set(f"out/{run}/joined", "", joined).decode() != joined:
                self._store.set(f"out/{run}/is_skewed", "yes")
            self._store.add(f"out/{run}", 1)
        self._context.connections.wake()

    # -- everybody's ---------------------------------------------------------------------------------------------

    def receive(self, failure: Failure, *, is_store_lost: bool = False) -> None:
        """Receive a failure that another rank reported.

        `is_store_lost`: the store is gone, too. Then no request is made, as it may take long.
        """
        failure = replace(failure, place=self._here.place_of(failure.rank))
        with self._receive_lock:
            if failure.run in self._recovered:
                return
            if self._status.failure is not None:
                self._queued.append(failure)
                self._status.update(is_store_lost=is_store_lost)
                return
            if failure.kind == "stalled":
                show_stall(failure, self._context, self._heartbeat, is_store_lost=is_store_lost)
            self._received_at_s = time.monotonic()
            self._status.update(failure=failure, is_store_lost=is_store_lost)
        self._runs.interrupt()
        self._context.connections.wake()

    def check(self) -> None:
        """Raise another rank's failure here, if there is one.

        Waits while all ranks may still leave the run by the same exception (see `resolve`).
        """
        if self._left_by_error:
            self._status.wait_for(self._is_resolved, _RESOLVE_S + DELIVERY_S)
        failure = self._status.failure
        if failure is None or failure.run in self._recovered:
            return
        if not self._has_all_left_alike() and not self._may_still_fail_alike(failure):
            raise failure.as_error()

    def _is_resolved(self) -> bool:
        is_recovered = self._left_by_error <= self._recovered
        return is_recovered or self._status.is_aborted or self._status.all_left

    def _has_all_left_alike(self) -> bool:
        """Whether all ranks came to the end of the block before the failure was resolved.

        Then they all left the run by an exception: otherwise the group would have been aborted to free one of them.
        """
        return self._status.all_left and not self._status.is_aborted

    def _may_still_fail_alike(self, failure: Failure) -> bool:
        """Whether this rank has not yet reached the position at which another one failed.

        Then it goes on: it may fail there, too, if ranks check the same thing. If it waits there, `resolve` frees it.
        """
        if self._status.is_aborted or failure.run is None or failure.rank == self._here.rank:
            return False
        return any(run.number == failure.run and run.started <= failure.started for run in self._runs.under_way)

    def resolve(self) -> None:
        """Recover from a failure if all ranks have left its run by an exception; else abort the group.

        The first rank to come here decides for all.
        """
        failure = self._status.failure
        if failure is None or self._status.is_aborted:
            return
        is_out = failure.run is not None and self._store.add(f"out/{failure.run}", 0) == self._here.size
        if is_out and self._store.check([f"out/{failure.run}/is_skewed"]):
            is_out = False  # one rank has joined a collective that another has not: the next ones would not match
        elif failure.run is not None and not is_out and time.monotonic() < self._received_at_s + _RESOLVE_S:
            return
        verdict = "recovered" if is_out else "aborted"
        if self._store.compare_set(f"resolved/{failure.run}", "", verdict).decode() == "recovered":
            self._recover(failure)
        else:
            self.abort()

    def _recover(self, failure: Failure) -> None:
        assert failure.run is not None
        self._context.call_log.restart(failure.run)
        if self._summed_up == failure.run:
            remove_error_file()
        with self._receive_lock:
            self._recovered.add(failure.run)  # before it is cleared, so that no check in between raises it
            self._status.clear_failure()
            queued, self._queued = self._queued, []
        for each in queued:
            self.receive(each)

    def abort(self) -> None:
        """Abort the collectives of this rank, so that no thread waits in one. All ranks do this together."""
        failure = self._status.failure
        assert failure is not None
        is_cause = failure.rank == self._here.rank
        if not is_cause or failure.kind == "stalled":  # its own error is there already
            write_error_file(failure.message(), failure.traceback, is_cause=is_cause)
        self._status.update(is_aborted=True)
        self._runs.interrupt()  # a run that went on, to fail in the same way, stops here
        self._context.connections.abort()
        if "nccl" in self._here.backend:
            abort_group()

    # -- the store is gone ---------------------------------------------------------------------------------------

    def lose_store(self, error: Exception) -> None:
        """Note that the store is gone: no rank can report or be asked any more."""
        status, endpoint = self._status, self._context.endpoint
        if status.is_closed or status.has_ended or status.is_store_lost:
            return
        at = f"{endpoint.host}:{endpoint.port}"
        if endpoint.is_hosted_by_rank_zero and self._here.rank != 0:
            why = f"the store at {at}, which its process hosted, is gone ({error})"
            self.receive(Failure("vanished", 0, why, self._last_seen_of_host()), is_store_lost=True)
        else:
            say(f"dengine: rank {self._here.rank} lost the store at {at} ({error}): it runs on by itself.\n")
            status.update(is_store_lost=True)
        if status.failure is not None:
            self.abort()

    def without_store(self, consequence: str, error: Exception | None = None) -> BaseException:
        """The exception if ranks must agree and the store is gone. `error`: the one that showed it, if only now."""
        if error is not None:
            self.lose_store(error)
        if self._status.failure is not None:
            return self._status.failure.as_error()
        endpoint = self._context.endpoint
        host = "rank 0" if endpoint.is_hosted_by_rank_zero else "torchrun's agent on that host"
        return LaunchError(
            f"The store of the ranks at {endpoint.host}:{endpoint.port} is gone, so {consequence}. It was hosted by "
            f"{host}, which was killed or lost. Nothing more can be saved together: start the job again, and it goes "
            "on from its newest checkpoint."
        )

    def lose_host(self, timeout_s: float, *, may_be_unreachable: bool) -> None:
        """Blame rank 0, whose process hosts the store and does not answer: no other rank can be asked."""
        text = f"Rank 0, which hosts the store, has not answered for {timeout_s:g} s: its process is stopped or hangs"
        text += ", or its host is not reached." if may_be_unreachable else "."
        self.receive(Failure("stalled", 0, text, self._last_seen_of_host(), is_frozen=True), is_store_lost=True)
        self.abort()

    def _last_seen_of_host(self) -> tuple[Level, ...]:
        """The last known position of rank 0, which hosts the store, as the store cannot be read any more."""
        return levels_of(self._heartbeat.latest_of_host)


def _mark_of(error: BaseException) -> int | None:
    """The run that `error` was reported for; None if it was not. Without getattr(), which a class may override."""
    reported_run = error.__dict__.get(_MARK)
    return reported_run if isinstance(reported_run, int) else None


def _mark(error: BaseException, run: int | None) -> None:
    error.__dict__[_MARK] = run
