"""Reports of a thread of each rank to rank 0 about its part of common work."""

import math
import threading
import time
from collections.abc import Sequence

from dengine.control.exchange import StoreExchange
from dengine.control.plane import plane
from dengine.errors import RemoteRankError
from dengine.launch.world import world

__all__ = ["Mailbox"]

_POLL_S = 0.01  # how often rank 0 looks for notes
_PART_BYTES = 4 << 20  # of what rank 0 answers: torch's store takes at most 8 MiB at a time


class Mailbox:
    """Collects one note from each rank, or from each of `members`, with a name that is used once; rank 0 may answer.

    Make it on the loop's thread, on all ranks; the other methods are for one thread of each rank. No collective. Cost:
    two requests to the store for each note, and one every 10 ms.

    Args:
        is_leaving: set once this rank leaves its run by an error: then it no longer waits for missing notes.
        members: the ranks that post a note; all by default.
    """

    def __init__(self, name: str, is_leaving: threading.Event, members: Sequence[int] | None = None) -> None:
        self._topic = f"mailbox/{name}"
        self._is_leaving = is_leaving
        self._here = world()
        self._members = range(self._here.size) if members is None else members
        self._plane = plane()
        self._exchange = StoreExchange(self._plane.store, self._here.rank, poll_s=_POLL_S)
        self._end_s = math.inf

    @property
    def is_mine(self) -> bool:
        """Whether this rank collects the notes."""
        return self._here.rank == 0

    def post(self, note: str) -> None:
        """Publish this rank's note. Raises: RuntimeError: the store is gone."""
        self._exchange.post(self._topic, note)

    def collect(self) -> list[str]:
        """Wait for the notes of all ranks, and give them in their order. On rank 0, after its own `post`.

        Raises:
            RemoteRankError: another rank has failed, and published none. RuntimeError: the store is gone.
        """
        notes = self._collected(self._topic, self._members, is_read_once=True)
        return [note.decode() for note in notes.values()]

    def answer(self, content: bytes) -> None:
        """Publish `content` for all members, on rank 0. Raises: RuntimeError: the store is gone."""
        parts = [content[start : start + _PART_BYTES] for start in range(0, len(content), _PART_BYTES)]
        for number, part in enumerate(parts):
            self._plane.store.set(f"{self._topic}/answer/part{number}", part)  # type: ignore[arg-type]
        self._exchange.post(f"{self._topic}/answer", str(len(parts)))

    def answered(self, *, is_last: bool = False) -> bytes:
        """Wait for rank 0's answer, and give it; `is_last`: nobody else is to read it, so remove it.

        Raises: as `collect`.
        """
        notes = self._collected(f"{self._topic}/answer", [0], is_read_once=is_last)
        keys = [f"{self._topic}/answer/part{number}" for number in range(int(notes[0]))]
        content = b"".join(bytes(self._plane.store.get(key)) for key in keys)
        for key in keys if is_last else ():
            self._plane.store.delete_key(key)
        return content

    def _collected(self, topic: str, ranks: Sequence[int], *, is_read_once: bool) -> dict[int, bytes]:
        notes = self._exchange.collect(topic, ranks, self._is_over, is_read_once=is_read_once)
        missing = [rank for rank in ranks if rank not in notes]
        if missing:
            raise RemoteRankError(f"Rank {missing[0]} has not reported that its part is written.", rank=missing[0])
        return notes

    def _is_over(self) -> bool:
        patience_s = self._plane.patience_s(is_leaving=self._is_leaving.is_set())
        # A failure that was recovered from meanwhile sets no limit.
        self._end_s = math.inf if math.isinf(patience_s) else min(self._end_s, time.monotonic() + patience_s)
        return time.monotonic() >= self._end_s
