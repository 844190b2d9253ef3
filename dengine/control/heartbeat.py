"""The heartbeat: each rank publishes its position about once a second, and reads those of the others."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dengine.control.context import ControlContext
from dengine.control.failure import Level
from dengine.launch.parsing import has_fields, parse_object, parse_ranks, warn_malformed
from dengine.launch.process import identity, is_alive

__all__ = ["Heartbeat", "levels_of"]


class Heartbeat:
    """Publishes the position of this rank, and reads those of the others.

    Attributes:
        latest_of_host: the last heartbeat of rank 0 if it hosts the store: it cannot be read once that is gone.
    """

    def __init__(self, context: ControlContext) -> None:
        self.activity = context.activity
        self.latest_of_host: dict[str, Any] = context.host_process
        self._context = context
        self._here = context.here
        self._store = context.store
        self._identity = identity()
        self._published_at_s, self._published_turn = 0.0, 0
        self._watched: set[int] = set()
        self._store.append(f"on/{self._identity['host']}", f"{self._here.rank} ")  # type: ignore[attr-defined]  # not in torch's stubs

    # -- this rank -----------------------------------------------------------------------------------------------

    def publish_when_due(self, period_s: float) -> bool:
        """Publish once a period, and soon after a run has started or ended. Gives whether it did."""
        is_new_turn = self.activity.runs.num_run_boundaries != self._published_turn
        is_due = time.monotonic() >= self._published_at_s + (period_s / 10 if is_new_turn else period_s)
        if is_due:
            self.publish()
        return is_due

    def publish(self) -> None:
        """Publish the position of this rank. Cost: one small request; two if rank 0 hosts the store."""
        self._published_at_s, self._published_turn = time.monotonic(), self.activity.runs.num_run_boundaries
        position, call_log = self.activity.position(), self.activity.call_log
        beat = {
            "where": [asdict(level) for level in position],
            "collective": call_log.current,
            "is_inside": call_log.is_inside,
            "time_s": time.time(),
            **self._identity,
        }
        self._store.set(f"at/{self._here.rank}", json.dumps(beat))
        if self._context.endpoint.is_hosted_by_rank_zero and self._here.rank != 0:
            self.latest_of_host = self.latest(0) or self.latest_of_host
        self.activity.note_progress(position)

    # -- the others ----------------------------------------------------------------------------------------------

    def latest(self, rank: int) -> dict[str, Any]:
        """The last heartbeat of `rank`; empty if there is none."""
        key = f"at/{rank}"
        beat = parse_object(self._store.get(key)) if self._store.check([key]) else None
        return beat if beat is not None and _is_complete(beat) else {}

    def ranks_on_host(self) -> set[int]:
        """The other ranks of this host that have registered; none if this host has no identity (not Linux)."""
        host = self._identity["host"]
        ranks = parse_ranks(self._store.get(f"on/{host}"), self._here.size) if host else set()
        return ranks - {self._here.rank}

    def is_known_dead(self, beat: Mapping[str, object]) -> bool:
        """Whether the process that sent `beat` was one of this host, and has ended."""
        return self._is_of_this_host(beat) and not is_alive(beat)

    def is_known_alive(self, beat: Mapping[str, object]) -> bool:
        return self._is_of_this_host(beat) and is_alive(beat)

    def may_be_unreachable(self, beat: Mapping[str, object]) -> bool:
        """Whether the process that sent `beat` is on another host, so that the network may be broken instead."""
        return bool(beat) and beat["host"] != self._identity["host"]

    def _is_of_this_host(self, beat: Mapping[str, object]) -> bool:
        return bool(beat) and bool(beat["host"]) and beat["host"] == self._identity["host"]

    def watch_host_processes(self) -> bool:
        """Watch for the end of each process of this host that has published. Gives whether all of them have."""
        for rank in self.ranks_on_host() - self._watched:
            beat = self.latest(rank)
            if beat:
                self._watched.add(rank)
                if self.is_known_alive(beat):
                    self._context.connections.watch_process(beat["pid"])
        return len(self._watched) >= self._here.local_size - 1


def levels_of(beat: dict[str, Any]) -> tuple[Level, ...]:
    """The position in a heartbeat or an answer; empty outside of a run."""
    try:
        return tuple(Level.from_dict(level) for level in beat.get("where", ()))
    except TypeError:
        warn_malformed(beat)
        return ()


def _is_complete(beat: dict[str, Any]) -> bool:
    return has_fields(beat, where=list, collective=str, time_s=(int, float), host=str, pid=int, start=str)
