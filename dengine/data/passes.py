"""How often each loader's data was passed over: so that nobody has to tell a loader the epoch.

A sampler that is told the epoch takes its order. One that nobody tells (the loader is inside a `tqdm`, a `zip`, a class
of the user's, a step) goes on to the next epoch with each new pass. Where the passes of this process stand is saved
with its random number generators.
"""

from collections.abc import Collection, Iterable
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from dengine.data.seeding import tell_epoch

__all__ = ["PassCounter", "Passes", "capture_passes", "restore_passes"]

Passes: TypeAlias = list[dict[str, Any]]  # the oldest loader first; plain values

_numbers = count()
_living: WeakValueDictionary[int, "PassCounter"] = WeakValueDictionary()


class PassCounter:
    """Which epoch the next pass over one loader's data is of.

    `kind` tells counters apart that a resumed script makes again: settings of the loader, as plain values.

    Example:
        >>> passes = PassCounter({})
        >>> passes.begin(), passes.begin()
        (0, 1)
        >>> passes.tell(7)
        >>> passes.begin(), passes.begin()
        (7, 8)
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        self.kind = kind
        self.epoch = 0
        self.is_begun = False
        self._is_known = True  # to the data
        _living[next(_numbers)] = self

    def tell(self, epoch: int) -> None:
        """The next pass is of `epoch`, as somebody says who tells the data set too."""
        self.epoch, self.is_begun, self._is_known = epoch, False, True

    def again(self) -> None:
        """The next pass is of the same epoch as the last one."""
        self.is_begun = False

    def stand_at(self, epoch: int, *, is_begun: bool) -> None:
        self.epoch, self.is_begun, self._is_known = epoch, is_begun, epoch == 0

    def begin(self, dataset: object = None) -> int:
        """Begin a pass: the epoch it is of, the one after that of the last pass unless another one was told.

        An epoch that nobody told is told to `dataset`, if that has a `set_epoch`.
        """
        if self.is_begun:
            self.epoch, self._is_known = self.epoch + 1, False
        self.is_begun = True
        if not self._is_known:
            self._is_known = True
            tell_epoch(dataset, self.epoch)
        return self.epoch

    def __reduce__(self) -> tuple[Any, ...]:
        return _counted, (self.kind, self.epoch, self.is_begun)  # a copy is counted by itself


def capture_passes() -> Passes:
    """Where the passes of every loader of this process stand."""
    return [{"kind": each.kind, "epoch": each.epoch, "is_begun": each.is_begun} for each in _in_order()]


def restore_passes(saved: Passes, *, told: Collection[PassCounter] = ()) -> None:
    """Set the passes of this process's loaders to what `capture_passes` gave; those of `told` are told by somebody.

    A loader is the one that was made in the same order among those of its kind, counted from the newest: older ones may
    be left from before.
    """
    left = list(saved)
    for counter in reversed(_in_order()):
        fitting = next((index for index in reversed(range(len(left))) if left[index]["kind"] == counter.kind), None)
        if fitting is None:
            continue
        state = left.pop(fitting)
        if not any(counter is each for each in told):
            counter.stand_at(state["epoch"], is_begun=state["is_begun"])


def _in_order() -> list[PassCounter]:
    items: Iterable[tuple[int, PassCounter]] = list(_living.items())
    return [counter for _, counter in sorted(items, key=lambda item: item[0])]


def _counted(kind: dict[str, Any], epoch: int, is_begun: bool) -> PassCounter:
    counter = PassCounter(kind)
    counter.stand_at(epoch, is_begun=is_begun)
    return counter
