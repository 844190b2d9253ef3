"""The store exchange: texts that ranks publish for each other in a store, by topic and rank.

It uses the store, since a collective of a thread could mix with those of the training, and since the store shows which
ranks never came.
"""

import time
from collections.abc import Callable, Iterable

from torch.distributed import Store

__all__ = ["StoreExchange", "after"]


class StoreExchange:
    """Exchanges one text of each rank for a topic; the name of a topic is used once.

    Cost: two requests to the store to publish a text. To collect: one in each `poll_s`, and two for each text.
    """

    def __init__(self, store: Store, rank: int, *, poll_s: float = 0.02) -> None:
        self._store = store
        self._rank = rank
        self._poll_s = poll_s

    def post(self, topic: str, text: str) -> None:
        """Publish this rank's text."""
        self._store.set(f"{topic}/{self._rank}", text)
        self._store.add(f"{topic}/count", 1)

    def collect(
        self, topic: str, ranks: Iterable[int], is_over: Callable[[], bool], *, is_read_once: bool = False
    ) -> dict[int, bytes]:
        """The texts of the `ranks` that have published one before `is_over()`, in the order of ranks.

        `is_read_once`: no other rank reads them, so they are removed.
        """
        wanted = sorted(ranks)
        found: dict[int, bytes] = {}
        while True:
            is_last = is_over()
            # One request for all of them, until they are there or the wait is over.
            if is_last or len(wanted) == 1 or self._store.add(f"{topic}/count", 0) >= len(wanted):
                found |= {rank: text for rank in wanted if rank not in found and (text := self._text(topic, rank))}
            if is_last or len(found) == len(wanted):
                break
            time.sleep(self._poll_s)
        if is_read_once:
            for key in [*(f"{topic}/{rank}" for rank in found), f"{topic}/count"]:
                self._store.delete_key(key)
        return {rank: found[rank] for rank in wanted if rank in found}

    def _text(self, topic: str, rank: int) -> bytes:
        key = f"{topic}/{rank}"
        return bytes(self._store.get(key)) if self._store.check([key]) else b""


def after(timeout_s: float) -> Callable[[], bool]:
    """A function that says whether `timeout_s` have passed since this call."""
    end_s = time.monotonic() + timeout_s
    return lambda: time.monotonic() >= end_s
