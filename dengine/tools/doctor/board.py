"""Where the ranks of a doctor meet: a notice board in the launcher's store. Nothing on it waits for ever.

It is no process group, so that it works where a group could not be made, and tells who never came.
"""

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from dengine.launch.env import Launch
from dengine.launch.store import open_store
from dengine.torch_internals import HashStore, PrefixStore

__all__ = ["Board", "BoardLostError", "open_board"]

_POLL_S = 0.02
_OPERATION_S = 30.0  # of the store: it answers at once, or is gone


class BoardLostError(Exception):
    """The store is gone: rank 0, or torchrun's agent, ended before it had said what it found."""


class Board:
    """Notes by topic and rank, as JSON."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store

    def post(self, topic: str, note: Any) -> None:
        """Put up this rank's note. Raises: BoardLostError."""
        self._do("set", f"{topic}/{self.rank}", json.dumps(note))
        self._do("add", f"{topic}/count", 1)

    def read(self, topic: str, rank: int, timeout_s: float) -> Any:
        """The note of `rank`, waited for. Raises: TimeoutError: it did not come; BoardLostError."""
        found = self.collect(topic, [rank], timeout_s)
        if not found:
            raise TimeoutError(f"rank {rank} has put up no {topic} within {timeout_s:g} s")
        return found[rank]

    def collect(self, topic: str, ranks: Iterable[int], timeout_s: float) -> dict[int, Any]:
        """The notes of those of `ranks` that put up one within the time. Raises: BoardLostError."""
        wanted, found = sorted(ranks), {}
        end = time.monotonic() + timeout_s
        while True:
            is_over = time.monotonic() >= end
            # One question for all of them, until they are there or the time is over.
            if is_over or len(wanted) == 1 or self._do("add", f"{topic}/count", 0) >= len(wanted):
                for rank in wanted:
                    if rank not in found and self._do("check", [f"{topic}/{rank}"]):
                        found[rank] = json.loads(self._do("get", f"{topic}/{rank}"))
            if is_over or len(found) == len(wanted):
                return {rank: found[rank] for rank in wanted if rank in found}
            time.sleep(_POLL_S)

    def decide(self, topic: str, note: Any) -> Any:
        """One note for all ranks: this one, where nobody has put up another before. Raises: BoardLostError."""
        return json.loads(self._do("compare_set", topic, "", json.dumps(note)))

    def is_there(self, key: str) -> bool:
        return bool(self._do("check", [key]))

    def count(self, topic: str) -> int:
        """How often this was called with `topic`, by whomever. Raises: BoardLostError."""
        return int(self._do("add", topic, 1))

    def ping(self, key: str) -> None:
        self._do("set", key, "1")

    def wait(self, key: str, timeout_s: float) -> str:
        """The text at `key`, as soon as it is there. Raises: TimeoutError; BoardLostError."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            if "timeout" in str(error).lower():
                raise TimeoutError(key) from error
            raise BoardLostError(str(error).splitlines()[0]) from error
        return str(self._do("get", key).decode())

    def answer(self, key: str, text: str) -> None:
        self._do("set", key, text)

    def _do(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, operation)(*arguments)
        except RuntimeError as error:
            raise BoardLostError(str(error).splitlines()[0]) from error


def open_board(launch: Launch | None, timeout_s: float) -> Board:
    """The board of the ranks that were launched together; one process has one of its own.

    Raises: RuntimeError, OSError: the store cannot be hosted, or not be reached within `timeout_s`.
    """
    if launch is None:
        return Board(HashStore(), 0, 1)
    store = open_store(launch, timeout_s)  # the process group that is tried later is hosted by the same server
    store.set_timeout(timedelta(seconds=_OPERATION_S))
    # An agent's store outlives its workers, and keeps what those before a restart have said.
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Board(PrefixStore(f"dengine/doctor/{attempt}", store), launch.rank, launch.size)
