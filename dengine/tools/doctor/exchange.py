"""Messages between the ranks of a doctor, through the launcher's store. Nothing here waits for ever.

It is no process group, so that it works even if a group could not be made, and shows which ranks never came.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from dengine.control.exchange import StoreExchange, after
from dengine.launch.env import Launch
from dengine.launch.store import open_store
from dengine.torch_internals import HashStore, PrefixStore

__all__ = ["Exchange", "StoreLostError", "open_exchange"]

_OPERATION_S = 30.0  # for one request: the store answers at once, or is gone


class StoreLostError(Exception):
    """The store is gone: rank 0, or torchrun's agent, ended before it had published its results."""


class Exchange:
    """Results by topic and rank, as JSON, and single texts by key. Its methods raise `StoreLostError`."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._exchange = StoreExchange(store, rank)

    def post(self, topic: str, result: object) -> None:
        """Publish this rank's result."""
        with _noticing_loss():
            self._exchange.post(topic, json.dumps(result))

    def read(self, topic: str, rank: int, timeout_s: float) -> Any:
        """Wait for the result of `rank`. Raises: TimeoutError: it did not come."""
        found = self.collect(topic, [rank], timeout_s)
        if not found:
            raise TimeoutError(f"rank {rank} has left no {topic} within {timeout_s:g} s")
        return found[rank]

    def collect(self, topic: str, ranks: Iterable[int], timeout_s: float) -> dict[int, Any]:
        """The results of the `ranks` that published one within the time."""
        with _noticing_loss():
            found = self._exchange.collect(topic, ranks, after(timeout_s))
        return {rank: json.loads(text) for rank, text in found.items()}

    def decide(self, topic: str, result: object) -> Any:
        """One result for all ranks: this one, unless another rank has published one before."""
        with _noticing_loss():
            return json.loads(self._store.compare_set(topic, "", json.dumps(result)))

    def is_there(self, key: str) -> bool:
        with _noticing_loss():
            return bool(self._store.check([key]))

    def count(self, topic: str) -> int:
        """The number of calls of this with `topic`, on all ranks."""
        with _noticing_loss():
            return int(self._store.add(topic, 1))

    def ping(self, key: str) -> None:
        self.answer(key, "1")

    def answer(self, key: str, text: str) -> None:
        with _noticing_loss():
            self._store.set(key, text)

    def wait(self, key: str, timeout_s: float) -> str:
        """Wait for the text at `key`. Raises: TimeoutError."""
        with _noticing_loss():
            try:
                self._store.wait([key], timedelta(seconds=timeout_s))
            except RuntimeError as error:
                if "timeout" in str(error).lower():
                    raise TimeoutError(key) from error
                raise
            return str(self._store.get(key).decode())


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StoreLostError(str(error).splitlines()[0]) from error


def open_exchange(launch: Launch | None, timeout_s: float) -> Exchange:
    """The exchange of the ranks that were launched together, or of one process.

    Raises: RuntimeError, OSError: the store cannot be hosted, or cannot be reached within `timeout_s`.
    """
    if launch is None:
        return Exchange(HashStore(), 0, 1)
    store = open_store(launch, timeout_s)  # the process group that is tried later is hosted by the same server
    store.set_timeout(timedelta(seconds=_OPERATION_S))
    # An agent's store outlives its workers, and keeps the messages from before a restart.
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Exchange(PrefixStore(f"dengine/doctor/{attempt}", store), launch.rank, launch.size)
