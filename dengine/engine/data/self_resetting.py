"""Iterators with a length that restart by themselves after their end, as DALI's do."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

from dengine import torch_internals
from dengine.engine.data.description import length_of
from dengine.engine.data.skipping import rest_of

__all__ = ["SelfResetting", "may_reset_itself"]


def may_reset_itself(data: Iterator[object]) -> bool:
    """Whether it is an iterator with a length: the number of batches before it restarts."""
    return not torch_internals.is_loader_iterator(data) and length_of(data) is not None


class _Position:
    def __init__(self) -> None:
        self.is_under_way = False
        self.ahead: list[object] = []


# The positions of iterators between two runs: an evaluation that was cut short, and the next one.
_positions: WeakKeyDictionary[Any, _Position] = WeakKeyDictionary()


class SelfResetting:
    """Takes a self-resetting iterator to its StopIteration, where it resets itself, after each pass.

    A pass has as many batches as the iterator says. An iterator that goes on after that (an endless one) loses none:
    the batch that was drawn too much comes first in the next pass.
    """

    def __init__(self, data: Iterator[object]) -> None:
        self._data = data
        try:
            self._position = _positions.setdefault(data, _Position())
        except TypeError:  # no weak references, or no hash
            self._position = _Position()

    def begin(self) -> Iterator[object]:
        """The batches of the iterator from its present position on."""
        ahead, self._position.ahead = self._position.ahead, []
        self._position.is_under_way = True
        return chain(ahead, self._data)

    def has_stopped(self) -> None:
        """Note that the iterator has raised StopIteration, and so has reset itself."""
        self._position.is_under_way = False

    def finish(self, *, is_whole: bool) -> None:
        """End the epoch. `is_whole`: a pass ends with it, so that only StopIteration is left."""
        self._position.is_under_way = False
        if is_whole:
            self._position.ahead.extend(islice(rest_of(self._data), 1))

    def finish_what_was_left(self) -> None:
        """Draw and drop the rest of an epoch that was cut short, so that the next one is whole."""
        if not self._position.is_under_way:
            return
        self._position.is_under_way = False
        self._position.ahead = []
        num_at_most = (length_of(self._data) or 0) + 1
        for _ in islice(rest_of(self._data), num_at_most):
            pass

    def push_back(self, batch: object) -> None:
        """Make `batch`, which was drawn but not used, the first one of the next pass."""
        self._position.ahead.append(batch)
