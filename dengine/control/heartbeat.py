"""Where each rank is, as it tells the store now and then, and whether its process lives."""

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from dengine.control.failure import Level
from dengine.control.plane import Control
from dengine.launch.parsing import complain, parse_object, parse_ranks, tells
from dengine.launch.process import identity, is_alive

__all__ = ["Presence", "levels_of"]


class Presence:
    """What this rank tells of itself, and what the others have told.

    The loop pays nothing: its place is read from the integers that it keeps anyway.

    Attributes:
        progressed_at_s: when this rank was first seen where it is (of `time.monotonic()`).
        told_by_host: what rank 0 told last, where it hosts the store, which could not be asked afterwards.
    """

    def __init__(self, control: Control) -> None:
        self.progressed_at_s = time.monotonic()
        self.told_by_host: dict[str, Any] = control.link.host_process
        self._control = control
        self._here = control.link.here
        self._store = control.link.store
        self._identity = identity()
        self._progress: object = None
        self._told_at_s, self._told_turn = 0.0, 0
        self._watched: set[int] = set()
        self._store.append(f"on/{self._identity['host']}", f"{self._here.rank} ")

    # -- this rank -----------------------------------------------------------------------------------------------

    def place(self) -> tuple[Level, ...]:
        """Where the loop is; empty outside of a run."""
        try:
            return self._place_by_stack()
        except Exception:  # frames of another thread, which goes on: what it tells is not worth a failure
            return ()

    def _place_by_stack(self) -> tuple[Level, ...]:
        frame = sys._current_frames().get(self._control.runs.thread_id)
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return self._control.runs.where(frames[::-1])

    def note_progress(self, place: tuple[Level, ...]) -> None:
        runs, ledger = self._control.runs, self._control.ledger
        begun = tuple(run.begun for run in runs.under_way)
        progress = (runs.num_turns, begun, ledger.num_calls, ledger.is_inside, self._control.num_ticks, place)
        if progress != self._progress:
            self._progress = progress
            self.progressed_at_s = time.monotonic()

    def tell_now_and_then(self, period_s: float) -> bool:
        """Tell the store once a period and, so that a run is known soon after it began, between two runs; whether it
        was time to.
        """
        is_new_turn = self._control.runs.num_turns != self._told_turn
        is_time = time.monotonic() >= self._told_at_s + (period_s / 10 if is_new_turn else period_s)
        if is_time:
            self.tell()
        return is_time

    def tell(self) -> None:
        """Tell the store. Cost: one small request; two where rank 0 hosts the store."""
        self._told_at_s, self._told_turn = time.monotonic(), self._control.runs.num_turns
        place, ledger = self.place(), self._control.ledger
        told = {
            "where": [asdict(level) for level in place],
            "collective": ledger.current,
            "is_inside": ledger.is_inside,
            "time_s": time.time(),
            **self._identity,
        }
        self._store.set(f"at/{self._here.rank}", json.dumps(told))
        if self._control.link.meeting.is_hosted_by_rank_zero and self._here.rank != 0:
            self.told_by_host = self.told(0) or self.told_by_host
            self._control.failures.last_seen_of_rank_zero = levels_of(self.told_by_host)
        self.note_progress(place)

    # -- the others ----------------------------------------------------------------------------------------------

    def told(self, rank: int) -> dict[str, Any]:
        """What `rank` told last; empty where it never did."""
        key = f"at/{rank}"
        told = parse_object(self._store.get(key)) if self._store.check([key]) else None
        return told if told is not None and _is_whole(told) else {}

    def neighbours(self) -> set[int]:
        """The other ranks of this host that have told so; none where it cannot be told which host this is."""
        host = self._identity["host"]
        ranks = parse_ranks(self._store.get(f"on/{host}"), self._here.size) if host else set()
        return ranks - {self._here.rank}

    def is_seen_dead(self, told: dict[str, Any]) -> bool:
        """Whether the process that told this was one of this host, and has ended."""
        return self._is_of_this_host(told) and not is_alive(told)

    def is_seen_alive(self, told: dict[str, Any]) -> bool:
        return self._is_of_this_host(told) and is_alive(told)

    def may_be_unreached(self, told: dict[str, Any]) -> bool:
        """Whether a network lies between this process and the one that told this: then that may be what is broken."""
        return bool(told) and told["host"] != self._identity["host"]

    def _is_of_this_host(self, told: dict[str, Any]) -> bool:
        return bool(told) and bool(told["host"]) and told["host"] == self._identity["host"]

    def watch_neighbours(self) -> bool:
        """Have the end of each process of this host noticed, once it has told which one it is: whether all have."""
        for rank in self.neighbours() - self._watched:
            told = self.told(rank)
            if told:
                self._watched.add(rank)
                if self.is_seen_alive(told):
                    self._control.link.connections.watch_process(told["pid"])
        return len(self._watched) >= self._here.local_size - 1


def levels_of(told: dict[str, Any]) -> tuple[Level, ...]:
    """Where a rank told that it is; empty outside of a run."""
    try:
        return tuple(Level.from_dict(level) for level in told.get("where", ()))
    except TypeError:
        complain(told)
        return ()


def _is_whole(told: dict[str, Any]) -> bool:
    return tells(told, where=list, collective=str, time_s=(int, float), host=str, pid=int, start=str)
