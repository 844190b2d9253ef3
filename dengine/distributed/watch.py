"""What a rank does by itself now and then: tell where it is, and find out who is gone or who hangs.

One thread that sleeps on the group's connections: it wakes up where a peer hangs up, and once a period.
"""

import faulthandler
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dengine.distributed.control import Control, say
from dengine.distributed.failure import Failure, Level, where_text
from dengine.distributed.ledger import num_joined

__all__ = ["Watch"]

_PERIOD_S = 1.0
_MAX_REPORTS_PER_S = 500  # of all ranks together: what the store can take without noticing it
_SETTLING_PERIOD_S = 0.02
_ANSWER_S = 2.0  # a living rank's thread answers within milliseconds; this is for a machine under load
_PAUSE_S = 1.0  # later than that, a sleep was no sleep but a pause of the process
_EXIT_S = 3.0  # after a stall was named: then a rank that still hangs is ended
_NUM_SHOWN = 64


class Watch:
    """The watchdog of this rank.

    Cost: one small message to the store a period, which is a second for up to 500 ranks and grows with their number
    (20 s for 10 000), so that all ranks together send 500 a second. The loop pays nothing: its place is read from the
    integers that it keeps anyway.
    """

    def __init__(self, control: Control, stall_timeout_s: float) -> None:
        self._control = control
        self._here = control.here
        self._store = control.store
        self._stall_timeout_s = stall_timeout_s
        self._period_s = min(max(_PERIOD_S, self._here.size / _MAX_REPORTS_PER_S), max(stall_timeout_s / 4, 0.05))
        self._identity = _identity()
        self._progress: Any = None
        self._progressed_at_s = time.monotonic()
        self._ask_at_s = math.inf
        self._num_asked = 0
        self._is_asked_to_inquire = False
        self._broken_at_s: float | None = None
        self._told_by_host: dict[str, Any] = {}
        self._unwatched = set(range(control.here.size))
        control.answer = self._answer
        control.inquire = self._inquire
        self._tell_place()
        self._beat_s = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dengine-watch", daemon=True)
        self._guard = threading.Thread(target=self._guard_host, name="dengine-guard", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if self._control.meeting.is_hosted_by_rank_zero and self._here.rank != 0:
            self._guard.start()

    def stop(self) -> None:
        self._stopped.set()
        self._control.connections.wake()
        self._thread.join(timeout=_ANSWER_S)

    def _run(self) -> None:
        control = self._control
        told_at_s, told_turn = 0.0, 0
        while not control.is_closed:
            is_settling = control.failure is not None and not control.is_broken
            has_hung_up = self._sleep(_SETTLING_PERIOD_S if is_settling else self._period_s)
            if control.is_closed:
                return
            self._beat_s = time.monotonic()
            try:
                if control.is_broken or control.is_lost or control.is_over:
                    self._end_what_hangs()
                    continue
                if time.monotonic() >= told_at_s + self._period_s or control.num_turns != told_turn:
                    told_at_s, told_turn = time.monotonic(), control.num_turns
                    self._tell_place()
                if has_hung_up or self._is_asked_to_inquire:
                    self._is_asked_to_inquire = False
                    self._find_the_vanished()
                    control.end_inquiry()
                self._look_for_a_stall()
                control.settle()
            except Exception as error:  # the store is gone
                control.lose(error)

    def _sleep(self, timeout_s: float) -> bool:
        started_s = time.monotonic()
        has_hung_up = self._control.connections.wait(timeout_s)
        self._forgive_pause(time.monotonic() - started_s - timeout_s)
        return has_hung_up

    def _forgive_pause(self, late_s: float) -> None:
        """A job that was suspended as a whole, or a machine that was, has not stalled meanwhile."""
        if late_s > _PAUSE_S:
            self._progressed_at_s += late_s
            self._ask_at_s += late_s
            self._beat_s += late_s

    def _guard_host(self) -> None:
        """A request to a store whose process is stopped never returns: so another thread looks after the first."""
        waited_s = time.monotonic()
        while not self._stopped.wait(self._period_s):
            now_s = time.monotonic()
            if now_s - waited_s - self._period_s > _PAUSE_S:
                self._beat_s = now_s  # this process was paused itself
            waited_s = now_s
            silent_s = now_s - self._beat_s
            if self._control.is_broken:
                self._end_what_hangs()
            elif not self._control.is_lost and silent_s > self._stall_timeout_s + self._period_s:
                self._control.lose_host(self._stall_timeout_s)

    # -- where this rank is ----------------------------------------------------------------------------------------

    def _place(self) -> tuple[Level, ...]:
        try:
            return self._place_by_stack()
        except Exception:  # frames of another thread, which goes on: what it tells is not worth a failure
            return ()

    def _place_by_stack(self) -> tuple[Level, ...]:
        frame = sys._current_frames().get(self._control.thread_id)
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return self._control.where(frames[::-1])

    def _tell_place(self) -> None:
        place = self._place()
        ledger = self._control.ledger
        told = {
            "where": [asdict(level) for level in place],
            "collective": ledger.current,
            "is_inside": ledger.is_inside,
            "time_s": time.time(),
            **self._identity,
        }
        self._store.set(f"at/{self._here.rank}", json.dumps(told))
        if self._control.meeting.is_hosted_by_rank_zero and self._here.rank != 0:
            self._told_by_host = self._told_place(0)
            self._control.last_seen_of_rank_zero = _levels(self._told_by_host)
        self._note_progress(place)
        self._watch_neighbours()

    def _watch_neighbours(self) -> None:
        """Have the end of each process of this host noticed, once it has told which one it is."""
        for rank in self._unwatched & set(self._near()):
            told = self._told_place(rank)
            if told:
                self._unwatched.discard(rank)
                if self._is_here(told) and _is_alive(told):
                    self._control.connections.watch_process(told["pid"])

    def _near(self) -> list[int]:
        """The ranks that are most likely on this host."""
        first = self._here.rank - self._here.local_rank
        return [rank for rank in range(first, first + self._here.local_size) if rank != self._here.rank]

    def _note_progress(self, place: tuple[Level, ...]) -> None:
        control = self._control
        ledger = control.ledger
        progress = (
            control.num_turns,
            tuple(run.begun for run in control.runs),
            (ledger.num_calls, ledger.is_inside),
            control.num_ticks,
            place,
        )
        if progress != self._progress:
            self._progress = progress
            self._progressed_at_s = time.monotonic()
            self._ask_at_s = self._progressed_at_s + self._stall_timeout_s

    def _told_place(self, rank: int) -> dict[str, Any]:
        """What `rank` told last; empty where it never did."""
        key = f"at/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else {}

    # -- asking all ranks --------------------------------------------------------------------------------------------

    def _answer(self, message: dict[str, Any]) -> None:
        """By the thread that reads: somebody wants to know who is there."""
        place = self._place()
        self._note_progress(place)
        shared = self._control.shared_runs()
        answer = {
            "where": [asdict(level) for level in place],
            "collective": self._control.ledger.current if self._control.ledger.is_inside else "",
            "idle_s": time.monotonic() - self._progressed_at_s,
            # Who is behind: fewer of DDP's collectives joined, fewer runs begun or ended, less of the run begun, fewer
            # of this package's collectives joined.
            "progress": [
                num_joined(self._here.size, but=self._control.group),
                self._control.num_turns,
                shared[-1].begun if shared else 0,
                self._control.ledger.num_calls,
            ],
        }
        number = message["number"]
        self._store.set(f"here/{number}/{self._here.rank}", json.dumps(answer))
        self._store.add(f"here/{number}", 1)

    def _call(self) -> dict[int, dict[str, Any]]:
        """The answers of all ranks, by rank; whose thread does not answer is missing."""
        number = self._store.add("calls", 1)
        self._control.publish(kind="call", number=number)
        end = time.monotonic() + _ANSWER_S
        while self._store.add(f"here/{number}", 0) < self._here.size and time.monotonic() < end:
            time.sleep(_SETTLING_PERIOD_S)
        answers = {}
        for rank in range(self._here.size):
            key = f"here/{number}/{rank}"
            if self._store.check([key]):
                answers[rank] = json.loads(self._store.get(key))
        return answers

    # -- who is gone -------------------------------------------------------------------------------------------------

    def _inquire(self) -> None:
        self._is_asked_to_inquire = True
        self._control.connections.wake()

    def _find_the_vanished(self) -> None:
        """A connection was closed: name who is gone, unless it has said why, or all have left."""
        control = self._control
        gone = self._dead_on_this_host()
        # One that told why it goes did so before it went; what it told may still be on its way.
        time.sleep(_SETTLING_PERIOD_S)
        if control.failure is not None or control.is_over or control.has_all_left():
            return
        if not gone:
            present = self._call()
            gone = [rank for rank in range(self._here.size) if rank not in present and self._may_be_gone(rank)]
        if gone and control.failure is None and not control.has_all_left():
            control.report(self._vanished(gone))

    def _dead_on_this_host(self) -> list[int]:
        return [rank for rank in self._near() if self._is_here(told := self._told_place(rank)) and not _is_alive(told)]

    def _may_be_gone(self, rank: int) -> bool:
        """Whether a rank that does not answer may have ended: one of this host that lives is only slow."""
        told = self._told_place(rank)
        return rank != self._here.rank and not (self._is_here(told) and _is_alive(told))

    def _is_here(self, told: dict[str, Any]) -> bool:
        return bool(told) and told["host"] == self._identity["host"]

    def _vanished(self, gone: list[int]) -> Failure:
        told = self._told_place(gone[0])
        error = "its process ended without an exception (killed, out of memory, or os._exit)"
        if told:
            error += f"; what it told last was {max(time.time() - told['time_s'], 0):.1f} s before"
        if len(gone) > 1:
            error += f"; gone are ranks {', '.join(map(str, gone[:_NUM_SHOWN]))}"
        failure = Failure("vanished", gone[0], error, _levels(told))
        # At once, and not only by the exception: a launcher may end this process right now.
        say(f"dengine: {failure.message()}\n")
        return failure

    # -- who hangs ---------------------------------------------------------------------------------------------------

    def _look_for_a_stall(self) -> None:
        control = self._control
        if control.failure is not None or control.is_lost or not control.shared_runs():
            self._ask_at_s = time.monotonic() + self._stall_timeout_s
            return
        if time.monotonic() < self._ask_at_s:
            return
        # All who wait come here at about the same time: one of them asks for all.
        self._ask_at_s = time.monotonic() + self._stall_timeout_s
        self._num_asked += 1
        if self._store.add(f"stall/{control.num_turns}/{self._num_asked}", 1) == 1:
            self._judge(self._call())

    def _judge(self, answers: dict[int, dict[str, Any]]) -> None:
        missing = [rank for rank in range(self._here.size) if rank not in answers]
        # One that does not answer, but told its place not long ago, holds the interpreter for a while.
        silent_s = [time.time() - self._told_place(rank).get("time_s", 0.0) for rank in missing]
        idle_s = min([answer["idle_s"] for answer in answers.values()] + silent_s)
        if idle_s < self._stall_timeout_s - self._period_s:
            self._ask_at_s = time.monotonic() + self._stall_timeout_s - idle_s
            return
        rank = missing[0] if missing else min(answers, key=lambda each: answers[each]["progress"])
        where = _levels(self._told_place(rank) if missing else answers[rank])
        error = (
            f"Rank {rank} has made no progress for {self._stall_timeout_s:g} s, and the others wait for it."
            + (" Its process is stopped, or holds the interpreter: it does not answer." if missing else "")
            + "".join(f"\n  rank {each}: {_shown(answers[each])}" for each in sorted(answers)[:_NUM_SHOWN])
            + "\n  If a step or a handler may take so long, raise stall_timeout= of process_group(), or call "
            "distributed.progress() in it."
        )
        self._control.report(Failure("stalled", rank, error, where, is_frozen=bool(missing)))

    def _end_what_hangs(self) -> None:
        """After a failure: show the stacks of a stall, and end a process that cannot leave by itself."""
        control = self._control
        failure = control.failure
        if failure is None or not control.is_broken:
            return
        self._note_progress(self._place())
        now_s = time.monotonic()
        if self._broken_at_s is None:
            self._broken_at_s = now_s
            if failure.kind == "stalled":
                say(f"dengine: rank {self._here.rank} is {where_text(self._place())}\n{_stacks()}")
                if failure.is_frozen:
                    self._end_frozen(failure.rank)
        # Handlers of EXCEPTION_RAISED may save what they can.
        is_stuck = failure.kind == "stalled" and not control.is_leaving
        since_s = self._broken_at_s if is_stuck else max(self._broken_at_s, self._progressed_at_s)
        if control.runs and now_s > since_s + (_EXIT_S if is_stuck else max(self._stall_timeout_s, _EXIT_S)):
            say(f"dengine: rank {self._here.rank} cannot leave by itself, so its process is ended.\n{_stacks()}")
            say(f"dengine: {failure.message()}\n")
            os._exit(1)

    def _end_frozen(self, rank: int) -> None:
        """A stopped process does not end by itself, and not by SIGTERM either."""
        told = self._told_by_host if self._control.is_lost else self._told_place(rank)
        if self._is_here(told) and rank != self._here.rank and _is_alive(told):
            with suppress(OSError):
                os.kill(told["pid"], signal.SIGKILL)


def _levels(told: dict[str, Any]) -> tuple[Level, ...]:
    return tuple(Level(**level) for level in told.get("where", ()))


def _shown(answer: dict[str, Any]) -> str:
    inside = f", in {answer['collective']}" if answer["collective"] else ""
    return f"{where_text(_levels(answer))}{inside}, for {answer['idle_s']:.0f} s"


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _identity() -> dict[str, Any]:
    """This process, so that a process of the same host can find out whether it lives. Linux only."""
    host = ""
    with suppress(OSError):
        # The namespace too: two containers of one host see each other's numbers as other processes.
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return {"host": host, "pid": os.getpid(), "start": _start_of(os.getpid())}


def _is_alive(told: dict[str, Any]) -> bool:
    return not told["host"] or (told["start"] != "" and _start_of(told["pid"]) == told["start"])


def _start_of(pid: int) -> str:
    """When a living process began, in the kernel's ticks; "" where there is none. A number may be used again."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            return fields[18]
    return ""
