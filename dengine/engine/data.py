"""The data of a run: how long an epoch of it is, and how an iteration over it is begun at any position."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NoReturn, Protocol, runtime_checkable

from torch.utils.data import Dataset, IterableDataset

from dengine.comm.consistency import any_rank
from dengine.data.alike import empties_together
from dengine.data.loader import pass_counters, renew_workers
from dengine.data.passes import PassCounter
from dengine.data.seeding import tell_epoch
from dengine.distributed import all_reduce, broadcast_object, world
from dengine.engine.described import changes_of, check_unchanged, described, length_of
from dengine.engine.own_state import holds_any, parts_of
from dengine.engine.resetting import SelfResetting, may_reset_itself

__all__ = ["NO_BATCH", "SOME_BATCHES", "Absent", "Feed", "check_data"]

# What a rank knows of its batches before a run, and the ranks together by the largest of it.
NO_BATCH, PERHAPS_BATCHES, SOME_BATCHES = 0, 1, 2


def check_data(data: object) -> None:
    """Raises: TypeError: it cannot be iterated over."""
    if isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"run() takes data that can be iterated over (a DataLoader, a list), but got {data!r}.")


@dataclass(frozen=True)
class Absent:
    """What a rank of a joined engine gets as a batch where its data has ended and another rank's goes on.

    `spare` is a batch that was counted before, or another rank's: something to take part with, to be given no weight.
    Metrics are not updated with what the step makes of it.
    """

    spare: Any


@runtime_checkable
class _Skips(Protocol):
    """A sampler that can begin in the middle of an epoch without drawing what comes before."""

    def skip(self, num_samples: int) -> None: ...


class Feed:
    """Data as the loop needs it.

    Each epoch iterates over the data anew, as `for batch in data` would; a one-shot iterator (a generator, a file)
    goes on where it is. `length` is the number of iterations of an epoch, or None where only the data can tell.

    Joined, a pass over the data is as long as the longest one of any rank: what a rank lacks are `Absent`s. Ranks agree
    upon it when an epoch is entered; data of unknown length, on any rank, is not joined.

    Data without a batch are an error, unless they are one shard of several (`may_be_empty`); joined, where all are.
    """

    def __init__(
        self, data: Iterable[Any], epoch_length: int | None, *, is_joined: bool = False, may_be_empty: bool = False
    ) -> None:
        self.data = data
        self.is_one_shot = isinstance(data, Iterator)
        self.is_restored = False  # by a state of its own, to the position of the run
        self.is_length_given = epoch_length is not None
        self.length = epoch_length if epoch_length is not None else length_of(data)
        self._resetting = SelfResetting(data) if isinstance(data, Iterator) and may_reset_itself(data) else None
        self._is_joined = is_joined
        self._may_be_empty = may_be_empty
        self._may_try_again = False
        self._pass = _Pass()
        self._is_unsure = False  # whether any rank has a batch

    def expected(self) -> int:
        """What can be told of this rank's batches before there is one: `NO_BATCH`, `SOME_BATCHES`, or neither."""
        own = length_of(self.data)
        if own is None or isinstance(getattr(self.data, "dataset", None), IterableDataset):
            return PERHAPS_BATCHES  # a stream may say how long it is, and be empty all the same
        return SOME_BATCHES if own else NO_BATCH

    def take(self, expected: int) -> None:
        """What the ranks together expect, `expected` being the largest of theirs.

        Raises: ValueError: no rank has a batch. It is raised alike on every rank.
        """
        if expected == NO_BATCH:
            self._refuse("no batch on any rank" if self._may_be_empty else "no batch")
        self._is_unsure = self._may_be_empty and expected == PERHAPS_BATCHES

    def iterates_over(self, objects: Iterable[Any]) -> bool:
        """Whether the data are one of `objects`, or give the samples that one of them gives."""
        return holds_any(self.data, (each for each in objects if not _is_map_style(each)))

    def described(self, epoch: int) -> dict[str, Any] | None:
        """What a resumed run must find unchanged, as of `epoch`, which the data know."""
        return described(self.data, epoch)

    def check_same(self, saved: dict[str, Any] | None, *, default_epoch: int) -> None:
        """Raises: ValueError: the data are not what `described` has `saved`."""
        if saved is None or not changes_of(saved, self.described(default_epoch)):
            return
        self.tell(saved.get("epoch", default_epoch))  # data may grow from epoch to epoch
        check_unchanged(saved, self.described(default_epoch))

    @property
    def told(self) -> list[PassCounter]:
        """Of what would go on to the next epoch by itself: it is told, since the loop sees it."""
        return pass_counters(self.data)

    def tell(self, epoch: int) -> None:
        """Tell the data which epoch it is."""
        renew_workers(self.data, epoch)
        for part in parts_of(self.data):
            tell_epoch(part, epoch)

    def enter(self, epoch: int) -> None:
        """Tell the data which epoch it is, and learn how long that one is: data may grow from epoch to epoch."""
        self.tell(epoch)
        self._may_try_again = self.is_restored or self._resetting is not None
        if self._is_joined and world().size > 1:
            self._pass = _agreed_pass(length_of(self.data))
            if self._pass.length == 0:
                self._refuse("no batch on any rank")
        if not self.is_length_given:
            self.length = length_of(self.data) if self._pass.length is None else self._pass.length

    def start(self, *, skip: int = 0, consumed: int = 0) -> Iterator[Any]:
        """An iterator over the batches of the epoch that was entered, from its batch `skip` on.

        `consumed` is the number of batches the whole training has taken: what an iterator, given anew to a resumed
        run, must be wound forward by. Where batches are skipped, the iterator has begun when this returns: what it
        draws from the random number generators at its beginning is drawn.
        """
        if self.is_restored:
            self.is_restored = False  # the next pass begins anew
            return self._anew()
        if self._resetting is not None:
            self._resetting.finish_what_was_left()
        elif self.is_one_shot:
            return self._fast_forwarded(consumed)
        own = length_of(self.data)
        size = own if self._pass.length is None else self._pass.length
        in_pass = skip % size if size else skip  # an epoch longer than the data passes over it again and again
        if self._resetting is not None:
            batches = self._wound(skip, consumed)
        elif self._jumps():
            batches = self._from(in_pass if own is None else min(in_pass, own))
        else:  # its next pass may depend on those before
            batches = self._fast_forwarded(self._num_own(skip))
        if self._pass.is_even or own is None or size is None:
            return batches
        if skip and in_pass == 0 and not self._jumps():  # at the end of a pass
            self.finish(size)
            batches = self._anew()
        num_absent = size - max(own, in_pass)
        if self._pass.is_empty_somewhere:
            return self._with_sent_spare(batches, own, num_absent)
        return _with_own_spare(batches, num_absent, self._any_batch)

    def finish(self, num_iterations: int) -> None:
        """The epoch is over, after so many iterations since a pass over the data began in it."""
        if self._resetting is not None:
            own = length_of(self.data)
            is_longest = self._pass.length in (None, own)  # else the pass was iterated to its end
            self._resetting.finish(is_whole=is_longest and own is not None and own > 0 and num_iterations % own == 0)

    def looked_into(self, batches: Iterator[Any], epoch: int, iterations: int) -> Iterator[Any]:
        """`batches`, of which the first one of the run has been drawn if nobody knew whether any rank has one.

        Collective in that case, once a run: a small all-reduce, as soon as every rank has drawn its first batch.

        Raises: ValueError: no rank has a batch, or none any more; alike on every rank.
        """
        if not self._is_unsure:
            return batches
        self._is_unsure = False
        first = list(islice(batches, 1))
        if not first and self._may_try_again:  # it stood at the end of a pass
            self._may_try_again = False
            batches = self._anew()
            first = list(islice(batches, 1))
        if not any_rank(bool(first), "whether any rank has a batch"):
            self.refuse_empty_epoch(epoch, iterations)
        return chain(first, batches)

    def is_over(self, epoch: int, iterations: int, *, is_empty: bool) -> bool:
        """The data ended before the epoch did: whether that ends the epoch, or it is to be iterated again.

        Args:
            epoch, iterations: where the run is, and how many it has done over all.
            is_empty: this pass over the data gave nothing.

        Raises:
            ValueError: there never was a batch. RuntimeError: there are none any more.
        """
        if self._resetting is not None:
            self._resetting.has_stopped()
        if is_empty and self._may_try_again:
            self._may_try_again = False  # it stood at the end of a pass
            return False
        if is_empty and empties_together(self.data):
            self.refuse_empty_epoch(epoch, iterations)
        if is_empty and iterations == 0:
            self.refuse_no_batch()
            return True
        if self.is_one_shot and is_empty:
            raise RuntimeError(
                f"The data ran dry in epoch {epoch} after {iterations} iterations: a one-shot iterator "
                f"({type(self.data).__qualname__}) cannot begin again. Pass something that can be iterated over more "
                "than once (a list, a DataLoader), or epoch_length= and max_epochs= that it suffices for."
            )
        if is_empty and not self._may_be_empty:
            self.refuse_empty_epoch(epoch, iterations)
        return is_empty or not self.is_length_given

    def refuse_no_batch(self) -> None:
        """Raises: ValueError: there is no batch, and there has to be one."""
        if not self._may_be_empty:
            self._refuse("no batch")
        if empties_together(self.data):
            self._refuse("no batch on any rank")

    def refuse_empty_epoch(self, epoch: int, iterations: int) -> NoReturn:
        """Raises: ValueError: no rank has a batch in `epoch`. RuntimeError: the same in a world of one, where there
        were batches before.
        """
        if iterations == 0:
            self._refuse("no batch on any rank" if self._may_be_empty else "no batch")
        text = f"in epoch {epoch} after {iterations} iterations"
        again = f"iterating over this {type(self.data).__qualname__} again must begin anew"
        if self._may_be_empty:
            raise ValueError(f"The data gave no batch on any rank {text}: {again}, and give some batches.")
        raise RuntimeError(f"The data gave no batch {text}: {again}.")

    def _refuse(self, nothing: str) -> NoReturn:
        raise ValueError(
            f"The data ({type(self.data).__qualname__}) gave {nothing}: there is nothing to run over. "
            "Check the data set's size, and drop_last with a batch size above it."
        )

    def _from(self, skip: int) -> Iterator[Any]:
        if skip and self._skip_by_sampler(skip):
            return _begun(iter(self.data))
        return self._fast_forwarded(skip)

    def _with_sent_spare(self, batches: Iterator[Any], own: int, num_absent: int) -> Iterator[Any]:
        """Some rank has no batch at all: the first rank that has one sends it. Collective: one object broadcast."""
        first = list(islice(batches, 1))
        spare = broadcast_object((first or [self._any_batch()])[0] if own else None, self._pass.source)
        return chain(first, batches, (Absent(spare) for _ in range(num_absent)))

    def _wound(self, in_epoch: int, consumed: int) -> Iterator[Any]:
        """A self-resetting iterator does all of the training again: nothing tells what it keeps from pass to pass."""
        if consumed and world().rank == 0:
            self._warn_of_drawing(consumed)
        earlier = consumed - in_epoch
        while earlier > 0:
            num_iterations = min(self.length or earlier, earlier)
            self._dropping(self._num_own(num_iterations))
            self.finish(num_iterations)
            earlier -= num_iterations
        return self._dropping(self._num_own(in_epoch))

    def _num_own(self, num_iterations: int) -> int:
        """How many of this rank's batches so many iterations of an epoch take."""
        own = length_of(self.data)
        if not own or self._pass.length is None:
            return num_iterations
        num_passes, rest = divmod(num_iterations, self._pass.length)
        return num_passes * own + min(rest, own)

    def _any_batch(self) -> Any:
        batch = next(self._anew())
        if self._resetting is not None:
            self._resetting.give_back(batch)
        return batch

    def _anew(self) -> Iterator[Any]:
        for counter in self.told:
            counter.again()
        if self._resetting is not None:
            return self._resetting.begin()
        # The loop may enter an iterator twice, and iter() of it would begin a self-resetting one anew; an iterator
        # without __iter__, which `for` takes, would not be taken. Through chain() neither matters.
        return chain(self.data)

    def _jumps(self) -> bool:
        """Whether a pass over the data is the same however often they were passed over before in this epoch."""
        return bool(self.told) or isinstance(self.data, Sequence) or self._skipping() is not None

    def _skipping(self) -> tuple[_Skips, int] | None:
        sampler = getattr(self.data, "sampler", None)
        batch_size = getattr(self.data, "batch_size", None)
        return (sampler, batch_size) if isinstance(sampler, _Skips) and isinstance(batch_size, int) else None

    def _skip_by_sampler(self, num_batches: int) -> bool:
        skipping = self._skipping()
        if skipping is not None:
            sampler, batch_size = skipping
            sampler.skip(num_batches * batch_size)
        return skipping is not None

    def _fast_forwarded(self, num_batches: int) -> Iterator[Any]:
        """Draw and drop `num_batches`, passing over the data as often as an epoch longer than the data does."""
        if num_batches and not isinstance(self.data, Sequence) and world().rank == 0:
            self._warn_of_drawing(num_batches)
        return self._dropping(num_batches)

    def _dropping(self, num_batches: int) -> Iterator[Any]:
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


@dataclass(frozen=True)
class _Pass:
    """One pass over the data, as all ranks agree about it. `length` is None where it is not joined."""

    length: int | None = None
    is_even: bool = True
    is_empty_somewhere: bool = False
    source: int = 0  # the first rank that has a batch


def _agreed_pass(own: int | None) -> _Pass:
    """Collective: one small all-reduce."""
    here = world()
    told = {
        "longest": -1 if own is None else own,
        "shortest": 1 if own is None else -own,
        "source": -here.rank if own else -here.size,
    }
    found = all_reduce(told, "max", name="the length of a pass over the data")
    longest, shortest = found["longest"], -found["shortest"]
    if shortest < 0 or longest < 0:
        return _Pass()
    return _Pass(longest, longest == shortest, shortest == 0, -found["source"])


def _with_own_spare(batches: Iterator[Any], num_absent: int, any_batch: Callable[[], Any]) -> Iterator[Any]:
    last = None
    for last in batches:
        yield last
    if num_absent:
        # A run resumed behind the end of its own data has drawn none of it.
        spare = any_batch() if last is None else last
        for _ in range(num_absent):
            yield Absent(spare)


def _is_map_style(value: object) -> bool:
    """A data set that is asked for samples by their index: its state is no position."""
    return isinstance(value, Dataset) and not isinstance(value, IterableDataset)


def _begun(iterator: Iterator[Any]) -> Iterator[Any]:
    while True:  # not `yield from`: that calls iter() once more
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch
