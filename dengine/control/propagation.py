"""How one rank's failure becomes everybody's, and which one does not.

The rank that raises tells the others first, then raises. Each rank hears of it, and its loops stop before their next
iteration. Whoever is in a collective waits for the failed rank in C++: the connections are shut under it, unless within
a moment all ranks have left the run by an exception: one that all of them raise alike, and may handle, ends nothing but
the run.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from torch.distributed import DistError

from dengine.control.call_log import Ledger, num_joined
from dengine.control.channel import Link, Messages
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
from dengine.control.sockets import abort_group
from dengine.control.status import Standing
from dengine.control.stop import Runs
from dengine.control.undisturbed import undisturbed
from dengine.errors import LaunchError, RemoteRankError, StallError
from dengine.launch.console import say

__all__ = ["Failures"]

_SETTLE_S = 2.0  # how long the other ranks may take to leave the run by an exception of their own
_HEAR_S = 0.5  # how long a failure takes, at most, from the one who tells it to those who hear it
_LOOK_S = 0.02
_INQUIRE_S = 4.0  # how long it takes, at most, to find out who is gone
_TOLD_PER_RUN = 8  # all ranks may fail at once: the first ones name the cause
_MARK = "_dengine_told"  # on an exception that the others know of: the run that it left
_OUTSIDE = -1  # of any run


class Failures:
    """The failures that ranks told of, and what becomes of each: it is forgiven, or it breaks the group.

    Attributes:
        inquire: has somebody find out who is gone: liveness.py's.
        find_late: whom a collective waited for in vain: liveness.py's.
        meet_stall: what is to be done of a stall before anybody hears of it, and leaves: watchdog.py's.
        last_seen_of_rank_zero: where the host of the store was; the store could not tell afterwards.
    """

    def __init__(self, link: Link, messages: Messages, ledger: Ledger, standing: Standing, runs: Runs) -> None:
        self.inquire: Callable[[], None] = lambda: None
        self.find_late: Callable[[], Failure | None] = lambda: None
        self.meet_stall: Callable[[Failure, bool], None] = lambda failure, is_lost: None
        self.last_seen_of_rank_zero: tuple[Level, ...] = ()
        self._link = link
        self._here = link.here
        self._store = link.store
        self._messages = messages
        self._ledger = ledger
        self._standing = standing
        self._runs = runs
        self._heard_at_s = 0.0
        self._later: list[Failure] = []  # heard while another one was not settled yet
        self._hearing = threading.Lock()
        self._left_by_error: set[int] = set()  # runs that this rank has left so
        self._forgiven: set[int] = set()
        self._num_inquiries = 0

    # -- this rank's own -----------------------------------------------------------------------------------------

    def failed(self, error: BaseException, run: int | None, here: FrameType) -> BaseException:
        """What this rank is to raise where `error` leaves a run (or, `run` being None, the process group).

        The others are told of `error`, unless it is only what another rank's failure looks like from here: then it is
        that failure. What the handler of a signal raises meanwhile disturbs none of this, and is what to raise then.
        Cost: two requests to the store; where a connection broke, up to 5 s to find out who is gone.
        """
        raised, interruption = undisturbed(lambda: self._failed(error, run, here))
        if interruption is None or interruption is error:
            return raised
        _mark(interruption, _mark_of(raised))  # it came of what was told: not once more
        if interruption.__cause__ is None:
            interruption.__cause__ = raised
        return interruption

    def _failed(self, error: BaseException, run: int | None, here: FrameType) -> BaseException:
        self._standing.is_leaving = True
        raised = error
        told_of = _mark_of(error)  # the run of which it was told; it may come from one within this one
        is_known = told_of is not None and told_of not in self._forgiven
        is_others = told_of is None and isinstance(error, RemoteRankError | StallError)
        if not is_known and not is_others:
            is_broken = is_of_backend(error)
            cause = self._cause_of() if is_broken else None
            if is_broken and cause is None and not self._standing.is_lost:
                cause = self._late("timed out" in line_of(error).lower())
            if cause is not None:
                raised = cause.as_error()
            elif is_broken and self._standing.is_lost:
                raised = self.without_store(f"nobody can tell why a connection broke: {line_of(error)}")
            else:
                self._tell(error, run, here)
        failed_run = told_of if is_known else run
        if (failure := self._standing.failure) is not None:
            failed_run = failure.run
        _mark(raised, _OUTSIDE if failed_run is None else failed_run)
        if run is not None:
            if run == failed_run:
                self._left_by_error.add(run)
            self._note_out(run)
        return raised

    def _tell(self, error: BaseException, run: int | None, here: FrameType) -> None:
        text = traceback_of(error)
        line = line_of(error)
        where = self._runs.where(frames_of(error, here))
        write_error_file(f"{line} ({where_text(where)})", text, is_cause=True)
        with suppress(DistError):  # the store is gone
            begun = next((each.begun for each in self._runs.under_way if each.number == run), -1)
            is_interrupt = isinstance(error, KeyboardInterrupt)
            self.report(Failure("raised", self._here.rank, line, where, text, run, begun, is_interrupt=is_interrupt))

    def _cause_of(self) -> Failure | None:
        """The failure behind a broken connection. None where all ranks are there: then it is this rank's own; and where
        nobody can be asked.
        """
        standing = self._standing
        if not standing.wait_for(lambda: standing.failure or standing.is_lost, _HEAR_S):
            number = self._num_inquiries
            self.inquire()
            standing.wait_for(lambda: standing.failure or standing.is_lost or self._num_inquiries > number, _INQUIRE_S)
            if standing.failure is None:  # what was found out is on its way, through the store
                standing.wait_for(lambda: standing.failure or standing.is_lost, _HEAR_S)
        failure = standing.failure
        is_mine = failure is not None and failure.rank == self._here.rank and failure.kind == "raised"
        return None if is_mine else failure

    def _late(self, is_timeout: bool) -> Failure | None:
        """The rank that the others waited for until the group's own timeout. One of those who see it end asks."""
        standing = self._standing
        with suppress(DistError):  # the store is gone
            if is_timeout and self._store.add("late", 1) == 1:
                if (failure := self.find_late()) is not None:
                    self.report(failure)
                self._store.set("late_is_known", "yes" if failure is not None else "no")
            if not self._store.check(["late"]):
                return None
            end_s = time.monotonic() + _INQUIRE_S
            # Not by wait(), which keeps the thread that is to answer who is there off the store.
            while not (is_known := self._store.check(["late_is_known"])) and time.monotonic() < end_s:
                time.sleep(_LOOK_S)
            if is_known and self._store.get("late_is_known") == b"yes":
                standing.wait_for(lambda: standing.failure or standing.is_lost, _INQUIRE_S)
        failure = standing.failure
        return None if failure is None or failure.rank == self._here.rank else failure

    def end_inquiry(self) -> None:
        """Nobody is gone, or whoever is has been told of."""
        self._num_inquiries += 1
        self._standing.note()

    def _note_out(self, run: int) -> None:
        """Count this rank among those that left `run` by an exception, and note whether all left it at one place."""
        if self._standing.is_broken or self._standing.is_over or self._standing.is_lost:
            return
        joined = f"{num_joined(self._here.size)} {self._ledger.num_calls}"
        with suppress(DistError):  # the store is gone
            if self._store.compare_set(f"out/{run}/joined", "", joined).decode() != joined:
                self._store.set(f"out/{run}/is_skewed", "yes")
            self._store.add(f"out/{run}", 1)
        self._link.connections.wake()

    # -- everybody's ---------------------------------------------------------------------------------------------

    def report(self, failure: Failure) -> None:
        """Tell all ranks of a failure."""
        if self._store.add(f"failures/{failure.run}", 1) <= _TOLD_PER_RUN:
            self._messages.publish(kind="failed", failure=failure.to_dict())

    def hear(self, failure: Failure, *, is_lost: bool = False) -> None:
        """Of a failure; `is_lost`: with it the store, which nobody is to ask then, as a request to it may take long."""
        with self._hearing:
            if failure.run in self._forgiven:
                return
            if self._standing.failure is not None:
                self._later.append(failure)
                self._standing.note(is_lost=is_lost)
                return
            if failure.kind == "stalled":
                self.meet_stall(failure, is_lost)
            self._heard_at_s = time.monotonic()
            self._standing.note(failure=failure, is_lost=is_lost)
        for run in self._runs.under_way:
            run.interrupt()
        self._link.connections.wake()

    def check(self) -> None:
        """Raise what another rank's failure is raised as here, if there is one.

        Where all ranks may yet turn out to have left a run alike (see `settle`), it waits for that.
        """
        if self._left_by_error:
            self._standing.wait_for(self._is_settled, _SETTLE_S + _HEAR_S)
        failure = self._standing.failure
        if failure is None or failure.run in self._forgiven:
            return
        if not self._has_all_left_alike() and not self._may_still_fail_alike(failure):
            raise failure.as_error()

    def _is_settled(self) -> bool:
        is_forgiven = self._left_by_error <= self._forgiven
        return is_forgiven or self._standing.is_broken or self._standing.all_left

    def _has_all_left_alike(self) -> bool:
        """All ranks came to the end of the block, before anybody looked whether they had left the run alike: so it
        was, as else one of them would have been freed by breaking the group.
        """
        return self._standing.all_left and not self._standing.is_broken

    def _may_still_fail_alike(self, failure: Failure) -> bool:
        """Whether this rank has still to come to where another one failed: it goes on, since it may fail there too, as
        ranks do that check the same thing one after the other. Who waits there is freed by `settle`.
        """
        if self._standing.is_broken or failure.run is None or failure.rank == self._here.rank:
            return False
        return any(run.number == failure.run and run.begun <= failure.begun for run in self._runs.under_way)

    def settle(self) -> None:
        """Forgive a failure, where all ranks have left its run by an exception; break the group, where they have not.

        One rank decides, whichever comes first.
        """
        failure = self._standing.failure
        if failure is None or self._standing.is_broken:
            return
        is_out = failure.run is not None and self._store.add(f"out/{failure.run}", 0) == self._here.size
        if is_out and self._store.check([f"out/{failure.run}/is_skewed"]):
            is_out = False  # one has joined in a collective that another one has not: the next would not fit
        elif failure.run is not None and not is_out and time.monotonic() < self._heard_at_s + _SETTLE_S:
            return
        wanted = "forgiven" if is_out else "broken"
        if self._store.compare_set(f"settled/{failure.run}", "", wanted).decode() == "forgiven":
            self._forgive(failure)
        else:
            self.break_group()

    def _forgive(self, failure: Failure) -> None:
        assert failure.run is not None
        self._ledger.begin_anew(failure.run)
        if failure.rank == self._here.rank:
            remove_error_file()
        with self._hearing:
            self._forgiven.add(failure.run)  # before it is forgotten: who looks in between must not raise it
            self._standing.forget_failure()
            later, self._later = self._later, []
        for each in later:
            self.hear(each)

    def break_group(self) -> None:
        """Free whoever waits in a collective on this rank, for the failure that there is; the others do so as well."""
        failure = self._standing.failure
        assert failure is not None
        if failure.rank != self._here.rank:
            write_error_file(failure.message(), failure.traceback, is_cause=False)
        self._standing.note(is_broken=True)
        for run in self._runs.under_way:  # who went on, to fail alike, goes no further
            run.interrupt()
        self._link.connections.break_off()
        if "nccl" in self._here.backend:
            abort_group()

    # -- the store is gone ---------------------------------------------------------------------------------------

    def lose(self, error: Exception) -> None:
        """The store is gone: nobody can be told or asked any more."""
        standing, meeting = self._standing, self._link.meeting
        if standing.is_closed or standing.is_over or standing.is_lost:
            return
        at = f"{meeting.host}:{meeting.port}"
        if meeting.is_hosted_by_rank_zero and self._here.rank != 0:
            why = f"the store at {at}, which its process hosted, is gone ({error})"
            self.hear(Failure("vanished", 0, why, self.last_seen_of_rank_zero), is_lost=True)
        else:
            say(f"dengine: rank {self._here.rank} lost the store at {at} ({error}): it runs on by itself.\n")
            standing.note(is_lost=True)
        if standing.failure is not None:
            self.break_group()

    def without_store(self, consequence: str, error: Exception | None = None) -> BaseException:
        """What is to be raised where the ranks have to agree and cannot. `error`: how it was noticed, if not before."""
        if error is not None:
            self.lose(error)
        if self._standing.failure is not None:
            return self._standing.failure.as_error()
        meeting = self._link.meeting
        host = "rank 0" if meeting.is_hosted_by_rank_zero else "torchrun's agent on that host"
        return LaunchError(
            f"The store of the ranks at {meeting.host}:{meeting.port} is gone, so {consequence}. It was hosted by "
            f"{host}, which was killed or lost. Nothing more can be saved together: start the job again, and it goes "
            "on from its newest checkpoint."
        )

    def lose_host(self, timeout_s: float, *, may_be_unreached: bool) -> None:
        """Rank 0's process, which hosts the store, does not answer: nobody can be asked who hangs."""
        text = f"Rank 0, which hosts the store, has not answered for {timeout_s:g} s: its process is stopped or hangs"
        text += ", or its host is not reached." if may_be_unreached else "."
        self.hear(Failure("stalled", 0, text, self.last_seen_of_rank_zero, is_frozen=True), is_lost=True)
        self.break_group()


def _mark_of(error: BaseException) -> int | None:
    """Not by getattr(): an exception may answer any name."""
    told_of = error.__dict__.get(_MARK)
    return told_of if isinstance(told_of, int) else None


def _mark(error: BaseException, run: int | None) -> None:
    error.__dict__[_MARK] = run
