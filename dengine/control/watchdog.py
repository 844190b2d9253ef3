"""The watchdog of a rank: it publishes the heartbeat, and finds ranks that are gone or hang.

Its thread sleeps on the group's connections, and wakes up if a peer closes one, and once a period.
"""

import os
import threading
import time

from torch.distributed import DistError

from dengine.control.blocked import BlockedDetector
from dengine.control.context import ControlContext
from dengine.control.heartbeat import Heartbeat
from dengine.control.inquiry import Inquiry
from dengine.control.liveness import LivenessProbe
from dengine.control.propagation import Failures
from dengine.control.stall import stacks, wait_for_stacks
from dengine.launch.console import say
from dengine.launch.parsing import warn_malformed

__all__ = ["Watchdog"]

_PERIOD_S = 1.0  # between two heartbeats, of up to 500 ranks
_MAX_REPORTS_PER_S = 500  # of all ranks together: a light load for the store
_DEADLOCK_S = 5.0  # the least wait in a collective before a rank looks for a deadlock
_RECHECK_S = 3.0  # between two probes that must agree
_MAX_PROBED_PER_S = 100  # ranks: if there are more, it looks for a deadlock later
_FAST_PERIOD_S = 0.02  # between two looks at the start, and while a failure is being resolved, of up to 200 ranks
_MAX_LOOKS_PER_S = 10_000  # of all ranks together, if there are more
_ABORTED_PERIOD_S = 0.25  # between two looks after the group was aborted
_START_S = 5.0  # the longest time until all ranks of the host have published
_JOIN_S = 2.0  # the longest wait for a thread at the end
_PAUSE_S = 1.0  # a sleep that takes this much longer means that the process was paused
_EXIT_S = 3.0  # after a stall was named: then a rank that still hangs is ended
# The longest time in which a rank must leave a collective whose connections are shut down. In Gloo some wait for ever,
# if a connection breaks while they are about to send.
_FREED_S = 1.5


class Watchdog:
    """Publishes this rank's heartbeat, looks for ranks that are gone or hang, and ends this process if it is stuck.

    Cost: one small message to the store a period, which is a second for up to 500 ranks and grows with their number
    (20 s for 10 000), so that all ranks together send 500 a second.
    """

    def __init__(
        self,
        context: ControlContext,
        heartbeat: Heartbeat,
        probe: LivenessProbe,
        failures: Failures,
        inquiry: Inquiry,
        stall_timeout_s: float,
    ) -> None:
        self._context = context
        self._here = context.here
        self._status = context.status
        self._heartbeat = heartbeat
        self._activity = context.activity
        self._probe = probe
        self._failures = failures
        self._inquiry = inquiry
        self._stall_timeout_s = stall_timeout_s
        self._period_s = min(max(_PERIOD_S, self._here.size / _MAX_REPORTS_PER_S), max(stall_timeout_s / 4, 0.05))
        self._fast_period_s = max(_FAST_PERIOD_S, self._here.size / _MAX_LOOKS_PER_S)
        self._probe_at_s = 0.0  # the time of the next probe
        self._knows_host_ranks = False
        self._num_probes = 0
        # How long this rank waits in a collective before it looks for a deadlock, and when it looks next.
        self._patience_s = min(max(_DEADLOCK_S, self._here.size / _MAX_PROBED_PER_S), stall_timeout_s / 2)
        self._deadlock_check_s = self._patience_s
        self._deadlock_call, self._is_prober = 0, False  # of the ranks in one collective, one probes for all
        self._aborted_at_s: float | None = None
        self._blocked: BlockedDetector | None = None  # since then
        self._heartbeat.publish()
        self._awake_at_s = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dengine-watchdog", daemon=True)
        self._host_watchdog = threading.Thread(target=self._watch_host, name="dengine-host-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self._context.endpoint.is_hosted_by_rank_zero and self._here.rank != 0:
            self._host_watchdog.start()

    def stop(self) -> None:
        self._stopped.set()
        self._context.connections.wake()
        for thread in (self._thread, self._host_watchdog):
            # One that outlives the block may be the last to hold the group. To free that at the end of the interpreter
            # from a thread aborts the process.
            if thread.is_alive():
                thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        status = self._status
        end_of_start_s = time.monotonic() + _START_S
        while not status.is_closed:
            # At the start the others are about to publish their identity.
            is_starting = not self._knows_host_ranks and time.monotonic() < end_of_start_s
            is_urgent = is_starting or (status.failure is not None and not status.is_aborted)
            period_s = min(self._period_s, _ABORTED_PERIOD_S) if status.is_aborted else self._period_s
            has_hung_up = self._sleep(self._fast_period_s if is_urgent else period_s)
            if status.is_closed:
                return
            self._awake_at_s = time.monotonic()
            try:
                if status.is_aborted or status.is_store_lost or status.has_ended:
                    self._kill_if_stuck()
                else:
                    self._look(has_hung_up, is_starting)
            except DistError as error:  # the store is gone
                self._failures.lose_store(error)
            except Exception as error:  # malformed content in the store is not a failure of a rank
                warn_malformed(repr(error))

    def _look(self, has_hung_up: bool, is_starting: bool) -> None:
        was_published = self._heartbeat.publish_when_due(self._period_s)
        if not self._knows_host_ranks and (is_starting or was_published):
            self._knows_host_ranks = self._heartbeat.watch_host_processes()
        if self._inquiry.begin() or has_hung_up:
            if (failure := self._probe.find_vanished()) is not None:
                self._context.report(failure)
            self._inquiry.end()
        self._look_for_a_deadlock()
        self._look_for_a_stall()
        self._failures.resolve()

    def _watch_host(self) -> None:
        """Run the host watchdog: notice if the first thread gets no answer, because the store's process is stopped."""
        waited_s = time.monotonic()
        while not self._stopped.wait(self._period_s):
            now_s = time.monotonic()
            if now_s - waited_s - self._period_s > _PAUSE_S:
                self._awake_at_s = now_s  # this process was paused itself
            waited_s = now_s
            silent_s = now_s - self._awake_at_s
            if self._status.is_aborted:
                self._kill_if_stuck()
            elif not self._status.is_store_lost and silent_s > self._stall_timeout_s + self._period_s:
                is_far = self._heartbeat.may_be_unreachable(self._heartbeat.latest_of_host)
                self._failures.lose_host(self._stall_timeout_s, may_be_unreachable=is_far)

    def _sleep(self, timeout_s: float) -> bool:
        started_s = time.monotonic()
        has_hung_up = self._context.connections.wait(timeout_s)
        self._discount_pause(time.monotonic() - started_s - timeout_s)
        return has_hung_up

    def _discount_pause(self, late_s: float) -> None:
        """Leave out the time for which the whole job, or its machine, was suspended."""
        if late_s > _PAUSE_S:
            self._activity.progressed_at_s += late_s
            self._probe_at_s += late_s
            self._awake_at_s += late_s

    # -- who hangs -----------------------------------------------------------------------------------------------

    def _look_for_a_deadlock(self) -> None:
        """Probe for a deadlock, if this rank has waited in a collective for a while.

        Cost: a liveness probe after 5 s, and each time the wait has doubled.
        """
        status, call_log = self._status, self._activity.call_log
        idle_s = time.monotonic() - self._activity.progressed_at_s
        if not call_log.is_inside or idle_s < self._patience_s:
            self._deadlock_check_s = self._patience_s
            return
        if idle_s < self._deadlock_check_s or status.failure is not None or status.is_store_lost:
            return
        if self._deadlock_call != call_log.num_calls:
            self._deadlock_call = call_log.num_calls
            key = f"crossed/{self._activity.runs.num_run_boundaries}/{call_log.num_calls}"
            self._is_prober = self._context.store.add(key, 1) == 1
        if not self._is_prober:
            return
        failure, is_likely = self._probe.find_deadlock()
        if failure is not None:
            self._context.report(failure)
        self._deadlock_check_s = idle_s + _RECHECK_S if is_likely else 2 * idle_s

    def _look_for_a_stall(self) -> None:
        now_s = time.monotonic()
        if self._status.failure is not None or self._status.is_store_lost or not self._activity.is_awaiting_others():
            self._probe_at_s = now_s + self._stall_timeout_s
            return
        if now_s < max(self._probe_at_s, self._activity.progressed_at_s + self._stall_timeout_s):
            return
        # All ranks that wait come here at about the same time: one of them probes for all.
        self._probe_at_s = now_s + self._stall_timeout_s
        self._num_probes += 1
        if self._context.store.add(f"stall/{self._activity.runs.num_run_boundaries}/{self._num_probes}", 1) == 1:
            failure, idle_s = self._probe.find_stalled(self._stall_timeout_s, leeway_s=self._period_s)
            if failure is None:
                self._probe_at_s = time.monotonic() + self._stall_timeout_s - idle_s
            else:
                self._context.report(failure)

    def _kill_if_stuck(self) -> None:
        """End this process if it cannot leave by itself after a failure."""
        failure = self._status.failure
        if failure is None or not self._status.is_aborted:
            return
        self._activity.note_progress(self._activity.position())
        if self._aborted_at_s is None or self._blocked is None:
            self._aborted_at_s = time.monotonic()
            self._blocked = BlockedDetector(self._activity.runs)
        blocked_s = self._blocked.blocked_s()
        if blocked_s > 0:  # in what was connected since the group was aborted, or is not connected yet
            self._context.connections.abort()
            self._context.connections.stand_in(self._here.size)
        # Handlers of EXCEPTION_RAISED may save what they can.
        is_leaving, is_in_run = self._status.is_leaving, bool(self._activity.runs.under_way)
        is_stuck = failure.kind == "stalled" and not is_leaving
        if not is_in_run and not is_stuck:
            return  # the script may have caught the error, and have other things to do
        is_stuck = is_stuck and (is_in_run or failure.rank == self._here.rank)
        since_s = self._aborted_at_s if is_stuck else max(self._aborted_at_s, self._activity.progressed_at_s)
        patience_s = _EXIT_S if is_stuck else max(self._stall_timeout_s, _EXIT_S)
        is_left_blocked = blocked_s > _FREED_S and not is_leaving
        if is_left_blocked or time.monotonic() > since_s + patience_s:
            wait_for_stacks(self._context)
            say(f"dengine: rank {self._here.rank} cannot leave by itself, so its process is ended.\n{stacks()}")
            say(f"dengine: {failure.message()}\n")
            os._exit(1)
