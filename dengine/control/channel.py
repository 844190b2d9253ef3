"""A list of messages in the store. A thread of each rank reads them in order, and sleeps until there is one."""

import json
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from dengine.launch.parsing import parse_object
from dengine.torch_internals import PrefixStore, TCPStore

__all__ = ["POLL_S", "Messages", "StoreEndpoint"]

POLL_S = 0.002  # between two looks of a thread that collects answers, and so cannot sleep until there is a message
_FOR_EVER = timedelta(days=365)
_NUM_KEPT = 1024  # messages; no rank is later by more, since all must have answered a probe before many others come


@dataclass(frozen=True)
class StoreEndpoint:
    """The store of the ranks: its address, the prefix of their keys, and whether rank 0 hosts it."""

    host: str
    port: int
    prefix: str
    is_hosted_by_rank_zero: bool

    def connect(self, timeout_s: float = 60.0) -> Store:
        """Make a new connection. Each thread that waits needs its own, as nothing else can use it meanwhile."""
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(self.prefix, store)


class Messages:
    """The list of messages. Any thread may call `publish`; the rest is for the thread that reads.

    Attributes:
        number: the number of the next message to read.
        reader: the reading thread's connection to the store.
    """

    def __init__(self, endpoint: StoreEndpoint, store: Store, *, deletes_old: bool) -> None:
        """`deletes_old`: this rank removes messages that all have read."""
        self.number = 0
        self.reader = endpoint.connect()
        self._store = store
        self._deletes_old = deletes_old

    def publish(self, **message: Any) -> None:
        """Append a message for all ranks.

        One request takes the number and stores the message: with two, a process that is killed in between would leave
        a number for which all others wait for ever.
        """
        text = json.dumps({**message, "id": uuid.uuid4().hex})
        number = self.number  # no earlier number is free
        while (there := self._claim(number, text)) != text:
            self._store.set(f"message/{number}", there)  # see `_claim`
            number += 1
        self._store.set(f"message/{number}", text)

    def _claim(self, number: int, text: str) -> str:
        """Store `text` as message `number` unless that exists already, and give the message with this number.

        In torch's older store (USE_LIBUV=0) this request wakes up no reader; a second write of the same text does.
        """
        return str(self._store.compare_set(f"message/{number}", "", text).decode(errors="replace"))

    def next(self, *, may_sleep: bool) -> dict[str, Any] | None:
        """The next message; None if it is malformed or, if this may not sleep (`may_sleep`), not there yet."""
        key = f"message/{self.number}"
        if may_sleep:
            self.reader.wait([key], _FOR_EVER)
        elif not self.reader.check([key]):
            time.sleep(POLL_S)
            return None
        text = self.reader.get(key)
        if self._deletes_old and self.number >= _NUM_KEPT:
            self.reader.delete_key(f"message/{self.number - _NUM_KEPT}")
        self.number += 1
        return parse_object(text)
