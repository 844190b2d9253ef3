"""Sized iterators that begin anew by themselves once they were exhausted, as DALI's do."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

from dengine import torch_internals
from dengine.engine.described import length_of

__all__ = ["SelfResetting", "may_reset_itself"]


def may_reset_itself(data: Iterator[Any]) -> bool:
    """Whether it is an iterator with a length: one that says how much it gives before it begins anew."""
    return not torch_internals.is_loader_iterator(data) and length_of(data) is not None


class _Standing:
    def __init__(self) -> None:
        self.is_under_way = False
        self.ahead: list[Any] = []


# Where iterators stand between two runs, an evaluation that was cut short and the next one.
_standings: WeakKeyDictionary[Any, _Standing] = WeakKeyDictionary()


class SelfResetting:
    """Takes such an iterator to its StopIteration, at which it resets itself, where a pass is over or was cut short.

    A pass over it has as many batches as it says. One that goes on beyond that (an endless one) loses none: what was
    drawn ahead comes first in the next pass.
    """

    def __init__(self, data: Iterator[Any]) -> None:
        self._data = data
        try:
            self._standing = _standings.setdefault(data, _Standing())
        except TypeError:  # no weak references, or no hash
            self._standing = _Standing()

    def begin(self) -> Iterator[Any]:
        """Its batches, from where it stands."""
        ahead, self._standing.ahead = self._standing.ahead, []
        self._standing.is_under_way = True
        return chain(ahead, self._data)

    def has_stopped(self) -> None:
        self._standing.is_under_way = False

    def finish(self, *, is_whole: bool) -> None:
        """The epoch is over; `is_whole`: with it a pass, and nothing but StopIteration is to come."""
        self._standing.is_under_way = False
        if is_whole:
            self._standing.ahead.extend(islice(self._rest(), 1))

    def finish_what_was_left(self) -> None:
        """What an epoch that was cut short has left is drawn and dropped, so that the next one is whole."""
        if not self._standing.is_under_way:
            return
        self._standing.is_under_way = False
        self._standing.ahead = []
        num_at_most = (length_of(self._data) or 0) + 1
        for _ in islice(self._rest(), num_at_most):
            pass

    def give_back(self, batch: Any) -> None:
        """`batch` was drawn, but not used."""
        self._standing.ahead.append(batch)

    def _rest(self) -> Iterator[Any]:
        while True:  # not `yield from`: iter() may begin anew
            try:
                batch = next(self._data)
            except StopIteration:
                return
            yield batch
