"""The liveness probe: ask all ranks for their positions, to find ranks that are gone, or that the others wait for."""

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from dengine.control.call_log import num_joined, user_line
from dengine.control.context import ControlContext
from dengine.control.deadlock import cause, is_certain, waits_in
from dengine.control.exchange import StoreExchange, after
from dengine.control.failure import Failure, where_text
from dengine.control.heartbeat import Heartbeat, levels_of
from dengine.launch.console import say
from dengine.launch.parsing import parse_object

__all__ = ["LivenessProbe", "exempt_key"]

_ANSWER_S = 2.0  # a living rank's thread answers within milliseconds, unless its machine is under load
_POLL_S = 0.02
_IDLE_S = 2.0  # a rank with progress in this time is at work; that may be noticed a second late
_NUM_SHOWN = 64
_UNREADABLE: dict[str, Any] = {
    "where": [],
    "collective": "",
    "waits_in": "",
    "site": "",
    "joined": 0,
    "calls": 0,
    "cpu_s": 0.0,
    "time_s": 0.0,
    "idle_s": 0.0,
    "progress": [],
}


class LivenessProbe:
    """Asks all ranks for their positions. Cost: two requests to the store a rank, and one for each rank on the
    asker.
    """

    def __init__(self, context: ControlContext, heartbeat: Heartbeat) -> None:
        self._context = context
        self._here = context.here
        self._store = context.store
        self._exchange = StoreExchange(context.store, context.here.rank, poll_s=_POLL_S)
        self._messages = context.messages
        self._status = context.status
        self._heartbeat = heartbeat
        self._activity = context.activity
        self._suspected: dict[int, dict[str, Any]] = {}  # the last answers, if they looked like a deadlock

    def find_vanished(self) -> Failure | None:
        """The failure of the rank that closed a connection. None if it has reported why, or if all have left."""
        status, latest = self._status, self._heartbeat.latest
        gone = [rank for rank in self._heartbeat.ranks_on_host() if self._heartbeat.is_known_dead(latest(rank))]
        # A rank reports why it leaves before it closes; its report may still be on its way.
        time.sleep(_POLL_S)
        if status.failure is not None or status.has_ended or status.has_all_left(self._store):
            return None
        if not gone:
            answers = self._ask_all()
            # A rank on this host whose process is alive is only slow.
            missing = [rank for rank in range(self._here.size) if rank not in answers and rank != self._here.rank]
            gone = [rank for rank in missing if not self._heartbeat.is_known_alive(latest(rank))]
        if not gone or status.failure is not None or status.has_all_left(self._store):
            return None
        failure = self._vanished(gone)
        # Printed at once, and not only by the exception: a launcher may end this process right now.
        say(f"dengine: {failure.message()}\n")
        return failure

    def find_stalled(self, timeout_s: float, *, leeway_s: float) -> tuple[Failure | None, float]:
        """The failure of the rank for which all others wait, if none has made progress for `timeout_s`; and that time.

        `leeway_s`: the delay with which a rank may notice that it makes no progress.
        """
        answers = self._ask_all()
        missing = [rank for rank in range(self._here.size) if rank not in answers]
        # A rank that does not answer, but published not long ago, only blocks the interpreter for a while.
        silent_s = [time.time() - self._heartbeat.latest(rank).get("time_s", 0.0) for rank in missing]
        if any(self._store.check([exempt_key(rank)]) for rank in missing):
            return None, 0.0
        idle_s = min([answer["idle_s"] for answer in answers.values()] + silent_s)
        if idle_s < timeout_s - leeway_s:
            return None, idle_s
        return self._stall_failure(answers, missing, timeout_s, "stall_timeout="), idle_s

    def find_late(self) -> Failure | None:
        """The failure of the rank for which a collective waited until the group's timeout; None if no one rank is."""
        answers = self._ask_all()
        missing = [rank for rank in range(self._here.size) if rank not in answers]
        if any(self._store.check([exempt_key(rank)]) for rank in missing):
            return None
        if missing:
            silent_s = time.time() - self._heartbeat.latest(missing[0]).get("time_s", 0.0)
            return self._stall_failure(answers, missing, round(silent_s), "timeout=")
        first, second = sorted(answers, key=lambda each: answers[each]["progress"])[:2]
        is_late = answers[first]["progress"][:-1] < answers[second]["progress"][:-1]
        idle_s = answers[first]["idle_s"]
        if not is_late or first == self._here.rank or idle_s < _IDLE_S:
            return None
        return self._stall_failure(answers, [], round(idle_s), "timeout=")

    def answer(self, number: int) -> None:
        """Answer probe `number`. Called by the thread that reads messages."""
        activity = self._activity
        position, call_log = activity.position(), activity.call_log
        activity.note_progress(position)
        shared = activity.runs.shared()
        answer = {
            "where": [asdict(level) for level in position],
            "collective": call_log.current if call_log.is_inside else "",
            **self._wait_details(),
            "idle_s": 0.0 if activity.num_exempt else time.monotonic() - activity.progressed_at_s,
            # The smallest has the least progress: fewer of torch's collectives joined, fewer runs started or ended,
            # less of the run started, fewer of this package's collectives called, and last: it waits in none.
            "progress": [
                num_joined(self._here.size, but=self._context.group),
                activity.runs.num_run_boundaries,
                shared[-1].started if shared else 0,
                call_log.num_calls,
                int(call_log.is_inside),
            ],
        }
        self._exchange.post(f"here/{number}", json.dumps(answer))

    def _wait_details(self) -> dict[str, Any]:
        """The part of the answer that deadlock.py needs."""
        frame = sys._current_frames().get(self._activity.runs.thread_id)
        return {
            "waits_in": waits_in(frame),
            "is_ahead": "nccl" in self._here.backend,  # the process goes on while the device waits
            "site": "" if frame is None else user_line(frame),
            "joined": num_joined(self._here.size, but=self._context.group),
            "calls": self._activity.call_log.num_calls,
            "cpu_s": time.process_time(),
            "time_s": time.monotonic(),
        }

    def find_deadlock(self) -> tuple[Failure | None, bool]:
        """The failure if all ranks wait and none can go on; and whether that is likely, so that a second probe is
        useful.

        A rank that waits in a collective calls this.
        """
        before, answers = self._suspected, self._ask_all()
        found = _deadlock_failure(answers) if len(answers) == self._here.size else None
        self._suspected = {} if found is None else answers
        return found if is_certain(before, answers) else None, found is not None

    def _ask_all(self) -> dict[int, dict[str, Any]]:
        """The answers by rank; a rank whose thread does not answer is missing."""
        number = self._store.add("calls", 1)
        self._messages.publish(kind="call", number=number)
        ranks = range(self._here.size)
        texts = self._exchange.collect(f"here/{number}", ranks, after(_ANSWER_S), is_read_once=True)
        parsed = {rank: parse_object(text) for rank, text in texts.items()}
        # A malformed answer is an answer, too: that rank is not silent.
        return {
            rank: dict(_UNREADABLE) if each is None or not _is_complete(each) else each for rank, each in parsed.items()
        }

    def _vanished(self, gone: list[int]) -> Failure:
        beat = self._heartbeat.latest(gone[0])
        error = (
            "its process ended without an exception (killed, out of memory, os._exit, or by C++ code that failed, and "
            "printed why)"
        )
        if beat:
            error += f"; its last report was {max(time.time() - beat['time_s'], 0):.1f} s before"
        if len(gone) > 1:
            error += f"; gone are ranks {', '.join(map(str, gone[:_NUM_SHOWN]))}"
        return Failure("vanished", gone[0], error, levels_of(beat), place=self._here.place_of(gone[0]))

    def _stall_failure(
        self, answers: dict[int, dict[str, Any]], missing: list[int], timeout_s: float, limit: str
    ) -> Failure:
        rank = missing[0] if missing else min(answers, key=lambda each: answers[each]["progress"])
        beat = self._heartbeat.latest(rank) if missing else answers[rank]
        if not missing and (crossed := _deadlock_failure(answers)) is not None:
            return crossed
        unreachable = ", or its host is not reached" if missing and self._heartbeat.may_be_unreachable(beat) else ""
        error = (
            f"Rank {rank} has made no progress for {timeout_s:g} s, and the others wait for it."
            + (f" It does not answer: its process is stopped or holds the interpreter{unreachable}." if missing else "")
            + "".join(f"\n  rank {each}: {_answer_text(answers[each])}" for each in sorted(answers)[:_NUM_SHOWN])
            + "\n  If a step, a handler, or a part of the script outside of a run may take so long, raise "
            f"{limit} of process_group(), or call distributed.progress() in it; the inside of rank_zero_first() may "
            "take longer than stall_timeout=."
        )
        return Failure("stalled", rank, error, levels_of(beat), is_frozen=bool(missing))


def exempt_key(rank: int) -> str:
    """The key that exists while `rank` is in a part of the script that may take any time."""
    return f"exempt/{rank}"


def _is_complete(answer: dict[str, Any]) -> bool:
    is_whole = all(
        name in answer and isinstance(answer[name], (int, float) if isinstance(default, float) else type(default))
        for name, default in _UNREADABLE.items()
    )
    return is_whole and all(isinstance(each, int) for each in answer["progress"])


def _deadlock_failure(answers: dict[int, dict[str, Any]]) -> Failure | None:
    """The failure if ranks wait for each other in different calls; None if they do not."""
    found = cause(answers, min(answers, key=lambda each: answers[each]["progress"]))
    return None if found is None else Failure("stalled", found[0], found[1], levels_of(answers[found[0]]))


def _answer_text(answer: dict[str, Any]) -> str:
    where = where_text(levels_of(answer))
    if answer["site"]:
        where += f" ({answer['site']})"
    inside = f", in {answer['collective']}" if answer["collective"] else ""
    return f"{where}{inside}, for {answer['idle_s']:.0f} s"
