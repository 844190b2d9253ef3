"""Reports of a thread of each rank to rank 0 about its part of common work."""

import math
import threading
import time

from dengine.control.exchange import StoreExchange
from dengine.control.plane import plane
from dengine.errors import RemoteRankError
from dengine.launch.world import world

__all__ = ["Mailbox"]

_POLL_S = 0.01  # how often rank 0 looks for notes


class Mailbox:
    """Collects one note from each rank, with a name that is used once.

    Make it on the loop's thread, on all ranks; the other methods are for one thread of each rank. No collective. Cost:
    two requests to the store for each note, and one every 10 ms.

    Args:
        is_leaving: set once this rank leaves its run by an error: then it no longer waits for missing notes.
    """

    def __init__(self, name: str, is_leaving: threading.Event) -> None:
        self._topic = f"mailbox/{name}"
        self._is_leaving = is_leaving
        self._here = world()
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
        notes = self._exchange.collect(self._topic, range(self._here.size), self._is_over, is_read_once=True)
        missing = [rank for rank in range(self._here.size) if rank not in notes]
        if missing:
            raise RemoteRankError(f"Rank {missing[0]} has not reported that its part is written.", rank=missing[0])
        return [note.decode() for note in notes.values()]

    def _is_over(self) -> bool:
        patience_s = self._plane.patience_s(is_leaving=self._is_leaving.is_set())
        # A failure that was recovered from meanwhile sets no limit.
        self._end_s = math.inf if math.isinf(patience_s) else min(self._end_s, time.monotonic() + patience_s)
        return time.monotonic() >= self._end_s
