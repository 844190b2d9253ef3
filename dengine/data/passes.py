"""Counts the passes over each loader's data, so that nobody has to set a loader's epoch.

A sampler whose epoch is set takes the order of that epoch. One whose epoch nobody sets (the loader is inside a `tqdm`,
a `zip`, a class of the user's, a step) goes on to the next epoch with each new pass. The counters of this process are
saved with its random number generators.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from dengine.data.failures import Failures
from dengine.data.seeding import set_epoch_of

__all__ = ["PassCounter", "Passes", "capture_passes", "restore_passes"]

Passes: TypeAlias = list[dict[str, Any]]  # the oldest loader first; plain values

_numbers = count()
_living: WeakValueDictionary[int, "PassCounter"] = WeakValueDictionary()


class PassCounter:
    """The epoch that the next pass over one loader's data belongs to.

    `kind` (settings of the loader, as plain values) finds the same counter again in a resumed script.

    Example:
        >>> passes = PassCounter({})
        >>> passes.begin(), passes.begin()
        (0, 1)
        >>> passes.set_epoch(7)
        >>> passes.begin(), passes.begin()
        (7, 8)
    """

    def __init__(self, kind: Mapping[str, object]) -> None:
        self.kind = kind
        self.epoch = 0
        self.has_started = False
        self.failures: Failures | None = None  # of a loader that leaves out batches whose loading raised
        self._is_known = True  # to the data
        _living[next(_numbers)] = self

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass one of `epoch`. The caller sets the epoch of the data set, too."""
        self.epoch, self.has_started, self._is_known = epoch, False, True

    def again(self) -> None:
        """Make the next pass one of the same epoch as the last."""
        self.has_started = False

    def restore(self, epoch: int, *, has_started: bool) -> None:
        self.epoch, self.has_started, self._is_known = epoch, has_started, epoch == 0

    def begin(self, dataset: object = None) -> int:
        """Begin a pass, and give its epoch: the one that was set, else the one after that of the last pass.

        An epoch that nobody set is set on `dataset`, if that has a `set_epoch`.
        """
        if self.has_started:
            self.epoch, self._is_known = self.epoch + 1, False
        self.has_started = True
        if not self._is_known:
            self._is_known = True
            set_epoch_of(dataset, self.epoch)
        return self.epoch

    def __reduce__(self) -> tuple[Any, ...]:
        return _counted, (self.kind, self.epoch, self.has_started)  # a copy is counted by itself


def capture_passes() -> Passes:
    """The state of the counters of every loader of this process."""
    return [
        {"kind": each.kind, "epoch": each.epoch, "is_begun": each.has_started}
        | ({} if each.failures is None else {"errors": each.failures.state()})
        for each in _in_order()
    ]


def restore_passes(saved: Passes, *, but: Collection[PassCounter] = ()) -> None:
    """Set the counters of this process's loaders to what `capture_passes` gave, except the epochs of those in `but`.

    Loaders of one kind are matched in the order in which they were made, from the newest: older ones may be left over.
    """
    left = list(saved)
    for counter in reversed(_in_order()):
        fitting = next((index for index in reversed(range(len(left))) if left[index]["kind"] == counter.kind), None)
        if fitting is None:
            continue
        state = left.pop(fitting)
        if counter.failures is not None and "errors" in state:
            counter.failures.restore(state["errors"])
        if not any(counter is each for each in but):
            counter.restore(state["epoch"], has_started=state["is_begun"])


def _in_order() -> list[PassCounter]:
    items: Iterable[tuple[int, PassCounter]] = list(_living.items())
    return [counter for _, counter in sorted(items, key=lambda item: item[0])]


def _counted(kind: dict[str, Any], epoch: int, has_started: bool) -> PassCounter:
    counter = PassCounter(kind)
    counter.restore(epoch, has_started=has_started)
    return counter
