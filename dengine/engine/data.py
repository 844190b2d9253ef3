"""The data of a run: how long an epoch of it is, and how an iteration over it is begun at any position."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

from dengine.distributed import world

__all__ = ["Feed"]


@runtime_checkable
class _Skips(Protocol):
    """A sampler that can begin in the middle of an epoch without drawing what comes before."""

    def skip(self, num_samples: int) -> None: ...


class Feed:
    """Data as the loop needs it.

    Each epoch iterates over the data anew, as `for batch in data` would; a one-shot iterator (a generator, a file)
    goes on where it is. `length` is the number of iterations of an epoch, or None where only the data can tell.
    """

    def __init__(self, data: Iterable[Any], epoch_length: int | None) -> None:
        self.data = data
        self.is_one_shot = isinstance(data, Iterator)
        self.is_length_given = epoch_length is not None
        self.length = epoch_length if epoch_length is not None else _length(data)

    def enter(self, epoch: int) -> None:
        """Tell the data which epoch it is, and learn how long that one is: data may grow from epoch to epoch."""
        for part in _parts(self.data):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        if not self.is_length_given:
            self.length = _length(self.data)

    def start(self, *, skip: int = 0, consumed: int = 0) -> Iterator[Any]:
        """An iterator over the batches of the epoch that was entered, from its batch `skip` on.

        `consumed` is the number of batches the whole training has taken: what a one-shot iterator, given anew to a
        resumed run, must be wound forward by. Where batches are skipped, the iterator has begun when this returns: what
        it draws from the random number generators at its beginning is drawn.
        """
        if self.is_one_shot:
            return self._fast_forwarded(consumed)
        size = _length(self.data)
        if size:
            skip %= size  # an epoch longer than the data passes over it again and again
        if skip and self._skip_by_sampler(skip):
            return _drawn(iter(self.data))
        return self._fast_forwarded(skip)

    def _anew(self) -> Iterator[Any]:
        # The loop may enter an iterator twice, and iter() of it would begin a self-resetting one anew; an iterator
        # without __iter__, which `for` takes, would not be taken. Through chain() neither matters.
        return chain(self.data)

    def _skip_by_sampler(self, num_batches: int) -> bool:
        sampler = getattr(self.data, "sampler", None)
        batch_size = getattr(self.data, "batch_size", None)
        if not isinstance(sampler, _Skips) or not isinstance(batch_size, int):
            return False
        sampler.skip(num_batches * batch_size)
        return True

    def _fast_forwarded(self, num_batches: int) -> Iterator[Any]:
        """Draw and drop `num_batches`, passing over the data as often as an epoch longer than the data does."""
        if num_batches and not isinstance(self.data, Sequence) and world().rank == 0:
            self._warn_of_drawing(num_batches)
        iterator = self._anew()
        while num_batches:
            drawn = sum(1 for _ in islice(iterator, num_batches))
            num_batches -= drawn
            if num_batches and drawn == 0:
                break
            if num_batches:
                iterator = self._anew()
        return iterator

    def _warn_of_drawing(self, num_batches: int) -> None:
        warnings.warn(
            f"To go on where the run was left, {num_batches} batches are drawn from the "
            f"{type(self.data).__qualname__} and dropped. A DataLoader that prepare_data_loader() gave begins at any "
            "batch at once, and its data draw the same random numbers whatever the workers have drawn before.",
            RuntimeWarning,
            stacklevel=2,
        )


def _drawn(iterator: Iterator[Any]) -> Iterator[Any]:
    while True:  # not `yield from`: that calls iter() once more
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch


def _parts(data: Any) -> list[Any]:
    """The data, its data set and its samplers, each once: whatever may have a `set_epoch`."""
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = (
        data,
        getattr(data, "dataset", None),  # an iterable data set that shuffles by epoch
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return list({id(part): part for part in parts if part is not None}.values())


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # e.g. a DataLoader over an iterable data set
        return None
