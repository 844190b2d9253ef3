"""Notes that a thread of each rank leaves for rank 0.

They go through the store, since a collective of a thread could mix with those of the training.
"""

import math
import threading
import time
from typing import Any

from dengine import torch_internals
from dengine.control.plane import Control
from dengine.errors import RemoteRankError
from dengine.launch.world import entered_plane, world

__all__ = ["Mailbox"]

_POLL_S = 0.01  # how often rank 0 looks for notes
# How much longer rank 0 waits after a failure: a rank that is gone leaves no note; one that raised is alive, and its
# thread may still be at work.
_GONE_S = 2.0
_RAISED_S = 30.0
_UNWATCHED_S = 1800.0  # if there is no control plane that reports failures: as long as a collective of torch waits


class Mailbox:
    """One note from each rank, under a name that is used once. Make it on the loop's thread, on all ranks; everything
    else is for one thread of each. No collective. Cost: one request to the store a note, and one look in 10 ms.

    Args:
        is_leaving: set once this rank leaves its run by an error: then a note that is missing is not waited for.
    """

    def __init__(self, name: str, is_leaving: threading.Event) -> None:
        self._is_leaving = is_leaving
        self._here = world()
        plane = entered_plane()
        self._status = plane._status if isinstance(plane, Control) else None
        self._prefix = f"mailbox/{name}"
        self._store: Any = None
        if self._here.size > 1:
            # A group that was made elsewhere has a store of its own.
            self._store = plane.context.store if isinstance(plane, Control) else torch_internals.default_store()
        self._own: str | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this rank collects the notes."""
        return self._here.rank == 0

    def post(self, note: str) -> None:
        """Leave this rank's note.

        Raises:
            RuntimeError: the store is gone.
        """
        self._own = note
        if not self.is_mine:
            self._store.set(f"{self._prefix}/{self._here.rank}", note)

    def collect(self) -> list[str]:
        """On rank 0, after its own `post`: the notes of all ranks, in their order. Waits for them.

        Raises:
            RemoteRankError: another rank has failed, and left none. RuntimeError: the store is gone.
        """
        assert self._own is not None
        notes = {0: self._own}
        end = math.inf
        while len(notes) < self._here.size:
            for rank in range(1, self._here.size):
                key = f"{self._prefix}/{rank}"
                if rank not in notes and self._store.check([key]):
                    notes[rank] = self._store.get(key).decode()
                    self._store.delete_key(key)
            if len(notes) < self._here.size:
                patience_s = self._patience_s()
                # A failure that was recovered from meanwhile sets no limit.
                end = math.inf if math.isinf(patience_s) else min(end, time.monotonic() + patience_s)
                if time.monotonic() >= end:
                    missing = next(rank for rank in range(self._here.size) if rank not in notes)
                    raise RemoteRankError(f"Rank {missing} has not reported that its part is written.", rank=missing)
                time.sleep(_POLL_S)
        return [notes[rank] for rank in range(self._here.size)]

    def _patience_s(self) -> float:
        """How many more seconds a note may take, given the status of the group."""
        failure = None if self._status is None else self._status.failure
        if failure is not None and failure.kind != "raised":
            return _GONE_S
        if failure is not None or self._is_leaving.is_set():
            return _RAISED_S
        return _UNWATCHED_S if self._status is None else math.inf
