"""What a rank does by itself now and then: tell where it is, and find out who is gone or who hangs.

One thread that sleeps on the group's connections: it wakes up where a peer hangs up, and once a period.
"""

import faulthandler
import os
import signal
import tempfile
import threading
import time
from contextlib import suppress

from torch.distributed import DistError

from dengine.control.blocked import Waiting
from dengine.control.failure import Failure, where_text
from dengine.control.heartbeat import Presence
from dengine.control.liveness import RollCall
from dengine.control.plane import Control
from dengine.launch.console import say
from dengine.launch.parsing import complain

__all__ = ["Watch"]

_PERIOD_S = 1.0
_MAX_REPORTS_PER_S = 500  # of all ranks together: what the store can take without noticing it
_CROSSED_S = 5.0
_AGAIN_S = 3.0  # between two looks that must agree
_MAX_CALLED_PER_S = 100
_SETTLING_PERIOD_S = 0.02
_BROKEN_PERIOD_S = 0.25
_START_S = 5.0
_JOIN_S = 2.0
_PAUSE_S = 1.0  # later than that, a sleep was no sleep but a pause of the process
_EXIT_S = 3.0  # after a stall was named: then a rank that still hangs is ended
# How long a rank may take to come out of a collective whose connections are shut. Gloo has some wait for ever, where a
# connection breaks while they are about to send.
_FREED_S = 1.5
_STACKS_S = 3.0  # how long the others wait for the stacks of the one that hangs
_STACKS = "stacks"  # in the store: whether it has shown them


class Watch:
    """The watchdog of this rank.

    Cost: one small message to the store a period, which is a second for up to 500 ranks and grows with their number
    (20 s for 10 000), so that all ranks together send 500 a second.
    """

    def __init__(self, control: Control, stall_timeout_s: float) -> None:
        self._control = control
        self._standing = control.standing
        self._here = control.link.here
        self._stall_timeout_s = stall_timeout_s
        self._period_s = min(max(_PERIOD_S, self._here.size / _MAX_REPORTS_PER_S), max(stall_timeout_s / 4, 0.05))
        self._presence = Presence(control)
        self._roll_call = RollCall(control, self._presence)
        self._ask_at_s = 0.0  # whether all stand still; no sooner than this rank has for long enough
        self._knows_neighbours = False
        self._num_asked = 0
        # How long this rank waits in a collective before it looks whether that can ever end, and when it does so next.
        self._patience_s = min(max(_CROSSED_S, self._here.size / _MAX_CALLED_PER_S), stall_timeout_s / 2)
        self._crossed_after_s = self._patience_s
        self._crossed_call, self._looks = 0, False  # of those who wait in one collective, one looks for all
        self._is_asked_to_inquire = False
        self._broken_at_s: float | None = None
        self._waiting: Waiting | None = None  # since then
        control.failures.inquire = self._inquire
        control.failures.meet_stall = self._meet_stall
        self._presence.tell()
        self._beat_s = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dengine-watch", daemon=True)
        self._guard = threading.Thread(target=self._guard_host, name="dengine-guard", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self._control.link.meeting.is_hosted_by_rank_zero and self._here.rank != 0:
            self._guard.start()

    def stop(self) -> None:
        self._stopped.set()
        self._control.link.connections.wake()
        self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        standing = self._standing
        end_of_start_s = time.monotonic() + _START_S
        while not standing.is_closed:
            # At the start the others are about to tell who they are.
            is_starting = not self._knows_neighbours and time.monotonic() < end_of_start_s
            is_settling = is_starting or (standing.failure is not None and not standing.is_broken)
            period_s = min(self._period_s, _BROKEN_PERIOD_S) if standing.is_broken else self._period_s
            has_hung_up = self._sleep(_SETTLING_PERIOD_S if is_settling else period_s)
            if standing.is_closed:
                return
            self._beat_s = time.monotonic()
            try:
                if standing.is_broken or standing.is_lost or standing.is_over:
                    self._end_what_hangs()
                else:
                    self._look(has_hung_up, is_starting)
            except DistError as error:  # the store is gone
                self._control.failures.lose(error)
            except Exception as error:  # what was read made no sense: that is no rank's failure
                complain(repr(error))

    def _look(self, has_hung_up: bool, is_starting: bool) -> None:
        has_told = self._presence.tell_now_and_then(self._period_s)
        if not self._knows_neighbours and (is_starting or has_told):
            self._knows_neighbours = self._presence.watch_neighbours()
        if has_hung_up or self._is_asked_to_inquire:
            self._is_asked_to_inquire = False
            self._roll_call.find_the_vanished()
            self._control.failures.end_inquiry()
        self._look_for_a_deadlock()
        self._look_for_a_stall()
        self._control.failures.settle()

    def _guard_host(self) -> None:
        """A request to a store whose process is stopped never returns: so another thread looks after the first."""
        waited_s = time.monotonic()
        while not self._stopped.wait(self._period_s):
            now_s = time.monotonic()
            if now_s - waited_s - self._period_s > _PAUSE_S:
                self._beat_s = now_s  # this process was paused itself
            waited_s = now_s
            silent_s = now_s - self._beat_s
            if self._standing.is_broken:
                self._end_what_hangs()
            elif not self._standing.is_lost and silent_s > self._stall_timeout_s + self._period_s:
                is_far = self._presence.may_be_unreached(self._presence.told_by_host)
                self._control.failures.lose_host(self._stall_timeout_s, may_be_unreached=is_far)

    def _sleep(self, timeout_s: float) -> bool:
        started_s = time.monotonic()
        has_hung_up = self._control.link.connections.wait(timeout_s)
        self._forgive_pause(time.monotonic() - started_s - timeout_s)
        return has_hung_up

    def _forgive_pause(self, late_s: float) -> None:
        """A job that was suspended as a whole, or a machine that was, has not stalled meanwhile."""
        if late_s > _PAUSE_S:
            self._presence.progressed_at_s += late_s
            self._ask_at_s += late_s
            self._beat_s += late_s

    def _inquire(self) -> None:
        self._is_asked_to_inquire = True
        self._control.link.connections.wake()

    # -- who hangs -----------------------------------------------------------------------------------------------

    def _look_for_a_deadlock(self) -> None:
        """Where this rank has waited in a collective for a while: whether the others wait elsewhere, for this one.

        Cost: a roll call after 5 s, and each time that it has waited twice as long.
        """
        standing, ledger = self._standing, self._control.ledger
        idle_s = time.monotonic() - self._presence.progressed_at_s
        if not ledger.is_inside or idle_s < self._patience_s:
            self._crossed_after_s = self._patience_s
            return
        if idle_s < self._crossed_after_s or standing.failure is not None or standing.is_lost:
            return
        if self._crossed_call != ledger.num_calls:
            self._crossed_call = ledger.num_calls
            key = f"crossed/{self._control.runs.num_turns}/{ledger.num_calls}"
            self._looks = self._control.link.store.add(key, 1) == 1
        if not self._looks:
            return
        failure, is_likely = self._roll_call.deadlocked()
        if failure is not None:
            self._control.failures.report(failure)
        self._crossed_after_s = idle_s + _AGAIN_S if is_likely else 2 * idle_s

    def _look_for_a_stall(self) -> None:
        now_s = time.monotonic()
        if self._standing.failure is not None or self._standing.is_lost or not self._is_waiting():
            self._ask_at_s = now_s + self._stall_timeout_s
            return
        if now_s < max(self._ask_at_s, self._presence.progressed_at_s + self._stall_timeout_s):
            return
        # All who wait come here at about the same time: one of them asks for all.
        self._ask_at_s = now_s + self._stall_timeout_s
        self._num_asked += 1
        if self._control.link.store.add(f"stall/{self._control.runs.num_turns}/{self._num_asked}", 1) == 1:
            failure, idle_s = self._roll_call.stalled(self._stall_timeout_s, leeway_s=self._period_s)
            if failure is None:
                self._ask_at_s = time.monotonic() + self._stall_timeout_s - idle_s
            else:
                self._control.failures.report(failure)

    def _is_waiting(self) -> bool:
        """Whether it matters to this rank that the others move: in a run, and while it waits for them outside."""
        return bool(self._control.runs.shared()) or self._control.ledger.is_inside

    def _end_what_hangs(self) -> None:
        """After a failure: end a process that cannot leave by itself."""
        failure = self._standing.failure
        if failure is None or not self._standing.is_broken:
            return
        self._presence.note_progress(self._presence.place())
        if self._broken_at_s is None or self._waiting is None:
            self._broken_at_s = time.monotonic()
            self._waiting = Waiting(self._control.runs)
        # Handlers of EXCEPTION_RAISED may save what they can.
        is_leaving, is_in_run = self._standing.is_leaving, bool(self._control.runs.under_way)
        is_stuck = failure.kind == "stalled" and not is_leaving
        if not is_in_run and not is_stuck:
            return  # the script may have caught what it was told, and have other things to do
        is_stuck = is_stuck and (is_in_run or failure.rank == self._here.rank)
        since_s = self._broken_at_s if is_stuck else max(self._broken_at_s, self._presence.progressed_at_s)
        patience_s = _EXIT_S if is_stuck else max(self._stall_timeout_s, _EXIT_S)
        is_left_waiting = self._waiting.seconds() > _FREED_S and not is_leaving
        if is_left_waiting or time.monotonic() > since_s + patience_s:
            self.wait_for_stacks()
            say(f"dengine: rank {self._here.rank} cannot leave by itself, so its process is ended.\n{_stacks()}")
            say(f"dengine: {failure.message()}\n")
            os._exit(1)

    def _meet_stall(self, failure: Failure, is_lost: bool) -> None:
        """Show where this rank is, and end the process that hangs if it cannot do so by itself. Before this rank hears
        of the stall: afterwards it may be gone at any moment.
        """
        say(f"dengine: rank {self._here.rank} is {where_text(self._presence.place())}\n{_stacks()}")
        try:
            if failure.rank == self._here.rank:
                self._control.link.store.set(_STACKS, "shown")
            elif failure.is_frozen:
                self._end_frozen(failure.rank, is_lost)
        except DistError:  # the store is gone: whoever reads from it notices
            pass

    def wait_for_stacks(self) -> None:
        """Before this rank leaves: let the one that hangs show its stacks. A launcher ends it once this one is gone."""
        failure, standing = self._standing.failure, self._standing
        if failure is None or failure.kind != "stalled" or failure.is_frozen or failure.rank == self._here.rank:
            return
        end_s = time.monotonic() + _STACKS_S
        with suppress(DistError):
            while not standing.is_lost and time.monotonic() < end_s:
                if self._control.link.store.check([_STACKS]):
                    return
                time.sleep(_SETTLING_PERIOD_S)

    def _end_frozen(self, rank: int, is_lost: bool) -> None:
        """A stopped process does not end by itself, and not by SIGTERM either. `is_lost`: the store cannot be asked."""
        if not is_lost:
            told = self._presence.told(rank)
        elif rank == 0:
            told = self._presence.told_by_host
        else:
            return  # nobody can be asked any more which process that is
        if self._presence.is_seen_alive(told):
            with suppress(OSError):
                os.kill(told["pid"], signal.SIGKILL)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
