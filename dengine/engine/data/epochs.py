"""The epochs of a run's data: their length, and an iterator that can start at any position."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset

from dengine import torch_internals
from dengine.data.alike import empties_together
from dengine.data.loader import PositionedLoader, drawn_epoch
from dengine.data.parts import counters_of, members_of, set_epoch_of_parts
from dengine.data.passes import PassCounter
from dengine.engine.data.description import length_of
from dengine.engine.data.duplicates import compare_ranks
from dengine.engine.data.emptiness import Emptiness
from dengine.engine.data.joined import Absent, Pass, agreed_pass, with_placeholders, with_sent_spare
from dengine.engine.data.own_state import holds_any, is_restored_by_user
from dengine.engine.data.self_resetting import SelfResetting, may_reset_itself
from dengine.engine.data.skipping import can_seek, dropping, rest_of, skipped_by_sampler, warn_of_drawing
from dengine.engine.data.source import SavedSource, Source
from dengine.naming import type_name
from dengine.random_state import RandomState, capture, restore

__all__ = ["EpochIterator", "check_data"]


def check_data(data: object) -> None:
    """Refuse `data` that cannot be iterated over. Raises: TypeError."""
    if isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"run() takes data that can be iterated over (a DataLoader, a list), but got {data!r}.")


class EpochIterator:
    """The data of a run, iterated over epoch by epoch.

    Each epoch iterates over the data anew, as `for batch in data` would; a one-shot iterator (a generator, a file)
    goes on from where it is. `length` is the number of iterations of an epoch, or None if it is unknown until the data
    end.

    In a joined run, a pass over the data is as long as the longest one of any rank: a rank with fewer batches gets
    `Absent`s at the end. Ranks agree on the length when an epoch is entered; data of unknown length, on any rank, are
    not joined.

    `is_shared`: some ranks must get the same data; their first batches are compared.

    Data without a batch are an error, unless they are one shard of several (`may_be_empty`) and another rank has some.

    `is_continued`: an iterator outlives the epoch, and the next epoch goes on with it. What is entered is a pass then,
    not an epoch.
    """

    def __init__(
        self,
        data: Iterable[object],
        epoch_length: int | None,
        *,
        is_joined: bool = False,
        may_be_empty: bool = False,
        is_shared: bool = False,
        is_continued: bool = False,
    ) -> None:
        self.data = data
        self.is_one_shot = isinstance(data, Iterator) and not members_of(data)  # iter() of which begins anew
        self.is_continued = is_continued
        self._workers: Any = None  # of a pass that is under way between two epochs
        self.source = Source(data, can_seek=can_seek(data) and not isinstance(data, PositionedLoader))
        self.is_restored = False  # by the user, to the position of the run
        self._was_empty = False  # the pass after the data were restored
        self.is_length_given = epoch_length is not None
        self.length = epoch_length if epoch_length is not None else length_of(data)
        self._resetting = None
        if isinstance(data, Iterator) and self.is_one_shot and may_reset_itself(data):
            self._resetting = SelfResetting(data)
        self.emptiness = Emptiness(data, may_be_empty=may_be_empty)
        self._is_joined = is_joined
        self._must_compare = is_shared
        self._may_try_again = False
        self._pass = Pass()

    def iterates_over(self, objects: Iterable[object]) -> bool:
        """Whether the data are one of `objects`, or take their samples from one of them."""
        return holds_any(self.data, (each for each in objects if not _is_map_style(each)))

    @property
    def spans_epochs(self) -> bool:
        """Whether an iterator over the data outlives an epoch."""
        return self.is_one_shot or self.is_continued

    def goes_on(self) -> bool:
        """Whether the user has loaded a state into the data, so that their next pass goes on from there."""
        return is_restored_by_user(self.data)

    @property
    def counters(self) -> list[PassCounter]:
        """The counters of the parts of the data that go on to the next epoch by themselves, unless the loop sets it."""
        return counters_of(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Call `set_epoch(epoch)` of the data, and of the data set and the samplers in it."""
        set_epoch_of_parts(self.data, epoch)

    def enter(self, epoch: int) -> None:
        """Set the epoch of the data, and find out its length, which may change from epoch to epoch.

        Collective in a joined run: one small all-reduce.
        """
        if self._workers is not None:
            torch_internals.exchange_workers(cast("DataLoader[object]", self.data), self._workers)
            self._workers = None
        self.set_epoch(epoch)
        self.source.begin_pass()
        self._may_try_again = self._resetting is not None
        if self._is_joined:
            self._pass = agreed_pass(length_of(self.data), drawn_epoch(self.data))
            if self._pass.length == 0:
                self.emptiness.refuse("no batch on any rank")
        if not self.is_length_given:
            self.length = length_of(self.data) if self._pass.length is None else self._pass.length

    def keep_workers(self) -> None:
        """Take the persistent workers of a pass that the next epoch goes on with from the loader: another iteration
        over it, by an evaluator, would begin them anew.
        """
        if self.is_continued and isinstance(self.data, DataLoader) and self.data.persistent_workers:
            taken = torch_internals.exchange_workers(self.data, None)
            self._workers = self._workers if taken is None else taken

    def is_at_end(self, position: int) -> bool:
        """Whether the pass that was entered is known to be over, `position` iterations after its start."""
        if self.is_one_shot or self.is_restored:
            return False
        size = length_of(self.data) if self._pass.length is None else self._pass.length
        return size is not None and 0 < size <= position

    def start(self, *, skip: int = 0, consumed: int = 0) -> Iterator[object]:
        """An iterator over the batches of the epoch that was entered, from its batch `skip` on.

        `consumed` is the number of batches that the whole training has taken: a one-shot iterator that is given to a
        resumed run is fast-forwarded by as many. If batches are skipped, the iterator has started when this returns, so
        that it has drawn from the random number generators what it draws at its start.
        """
        batches = self._started(skip, consumed)
        return batches if not self.source.kind else self.source.counted(batches, skip)

    def _started(self, skip: int, consumed: int) -> Iterator[object]:
        may_be_over = not skip or (self.is_length_given and not self.is_continued)
        restored = self._restored(may_be_over=may_be_over, is_between=not skip)
        if restored is None and self._resetting is not None:
            self._resetting.finish_what_was_left()
        elif restored is None and self.is_one_shot:
            return self._filled(self._fast_forwarded(consumed))
        own = length_of(self.data)
        size = own if self._pass.length is None else self._pass.length
        in_pass = skip % size if size else skip  # an epoch longer than the data passes over it again and again
        if restored is not None:
            batches = restored
        elif self._resetting is not None:
            batches = self._replayed(consumed if self.is_continued else skip, consumed)
        elif can_seek(self.data):
            batches = self._jumped(in_pass if own is None else min(in_pass, own))
        else:  # its next pass may depend on earlier ones
            batches = self._fast_forwarded(self._num_own(skip))
        if self._pass.is_even or own is None or size is None:
            return self._filled(batches)
        if skip and in_pass == 0 and restored is None and not can_seek(self.data):  # at the end of a pass
            self.finish(size)
            batches = self._new_pass()
        num_absent = size - max(own, in_pass)
        if self._pass.is_empty_somewhere:
            return with_sent_spare(batches, own, num_absent, self._pass.source, self._any_batch, self.source.note_ahead)
        return self._filled(batches, num_absent)

    def _filled(self, batches: Iterator[object], num_absent: int = 0) -> Iterator[object]:
        """`batches`, with placeholders if other ranks wait for this one: for batches of None, and `num_absent` more."""
        waits = self._is_joined and self.emptiness.may_be_empty
        if not waits and not num_absent:
            return batches
        return with_placeholders(batches, num_absent, self._any_batch, self.source.note_ahead)

    def position(self, done: int, *, is_completed: bool) -> SavedSource | None:
        """The position that the data keep, after the first `done` batches of the pass; `is_completed`: the epoch is."""
        return self.source.state(done, is_completed=is_completed, ends_pass=self._ends_pass(done))

    def _ends_pass(self, num_iterations: int) -> bool:
        """Whether `num_iterations` after the start of an epoch this rank's data are at the end of a pass."""
        own = length_of(self.data)
        size = own if self._pass.length is None else self._pass.length
        if not own or not size or not num_iterations:
            return False
        return num_iterations % size == 0 or num_iterations % size >= own

    def finish(self, num_iterations: int) -> None:
        """End the epoch, `num_iterations` after its last pass over the data started."""
        self.source.is_at_end = self._ends_pass(num_iterations)
        if self._resetting is not None and not self.is_continued:
            own = length_of(self.data)
            is_longest = self._pass.length in (None, own)  # else the pass was iterated to its end
            self._resetting.finish(is_whole=is_longest and own is not None and own > 0 and num_iterations % own == 0)

    def looked_into(
        self, batches: Iterator[object], epoch: int, iterations: int, *, is_start: bool
    ) -> Iterator[object]:
        """`batches`, after a look at the first one of the run, if that is needed.

        It is if no rank knows whether there is a batch, if some ranks must have the same one, or if others may have,
        although they should not. `is_start`: `batches` start at the beginning of the epoch, so that at least one rank
        must have one.

        Collective then, once a run: a small all-reduce, as soon as every rank has drawn its first batch.

        Raises, on every rank:
            ValueError: no rank has a batch, or none any more.
            ConsistencyError: ranks that share their data have different batches.
        """
        is_unsure = is_start and self.emptiness.is_unsure
        if not (is_unsure or self._must_compare or (is_start and self.emptiness.is_doubtful)):
            return batches
        first = list(islice(batches, 1))
        if is_unsure:
            self.emptiness.is_unsure = False
            if not first and self._may_try_again:  # it stood at the end of a pass
                self._may_try_again = False
                batches = self.start()
                first = list(islice(batches, 1))
        if not self._has_any_rank(first) and is_unsure:
            self.emptiness.refuse_empty_epoch(epoch, iterations)
        return chain(first, batches)

    def _has_any_rank(self, first: list[object]) -> bool:
        is_shared, self._must_compare, self.emptiness.is_doubtful = self._must_compare, False, False
        first = [batch.spare if isinstance(batch, Absent) else batch for batch in first]
        return compare_ranks(self.data, first, is_shared=is_shared)

    def is_over(self, epoch: int, iterations: int, *, is_empty: bool) -> bool:
        """Whether the epoch ends here, at the end of a pass over the data; else the data are iterated again.

        Args:
            epoch, iterations: the present epoch, and the iterations of the whole training.
            is_empty: this pass over the data gave nothing.

        Raises:
            ValueError: there never was a batch. RuntimeError: there are no more.
        """
        self.source.is_at_end = True
        if self._resetting is not None:
            self._resetting.has_stopped()
        if is_empty and self._may_try_again:
            self._may_try_again = False  # it stood at the end of a pass
            return False
        if is_empty and empties_together(self.data):
            self.emptiness.refuse_empty_epoch(epoch, iterations)
        if is_empty and iterations == 0:
            self.emptiness.refuse_no_batch()
            return True
        if self.is_one_shot and is_empty:
            raise RuntimeError(
                f"The data ran dry in epoch {epoch} after {iterations} iterations: a one-shot iterator "
                f"({type_name(self.data)}) cannot begin again. Pass something that can be iterated over more "
                "than once (a list, a DataLoader), or epoch_length= and max_epochs= for which it has enough batches."
            )
        if is_empty and not self.emptiness.may_be_empty:
            self.emptiness.refuse_empty_epoch(epoch, iterations)
        return is_empty or not self.is_length_given

    def _restored(self, *, may_be_over: bool, is_between: bool) -> Iterator[object] | None:
        """The batches of data that were restored; None if they were not. `is_between`: two epochs."""
        is_restored = self.is_restored or self._was_empty
        self.is_restored = self._was_empty = False  # the next pass starts at the beginning
        before = capture() if is_restored or self.source.has_loaded else None
        batches = self.source.take_loaded(may_be_over=may_be_over)
        if batches is None and is_restored:
            batches = self._new_pass()
        return None if batches is None else self._going_on(batches, before if is_between else None, may_be_over)

    def _going_on(self, batches: Iterator[object], before: RandomState | None, may_be_over: bool) -> Iterator[object]:
        """`batches` of data that were restored; those of a new pass if there is none, as the pass `may_be_over`.

        The new pass draws from the generators as they were `before`.
        """
        first = list(islice(batches, 1))
        if first or not may_be_over:
            self._was_empty = not first  # the data may have kept the position for the next pass
            yield from chain(first, rest_of(batches))
            return
        if before is not None:
            restore(before)
        yield from self._new_pass()

    def _replayed(self, in_epoch: int, consumed: int) -> Iterator[object]:
        """A self-resetting iterator after all batches of the training so far, since what it keeps between passes is
        unknown.
        """
        warn_of_drawing(self.data, consumed, self.source.why_drawn)
        earlier = consumed - in_epoch
        while earlier > 0:
            num_iterations = min(self.length or earlier, earlier)
            dropping(self._new_pass, self._num_own(num_iterations))
            self.finish(num_iterations)
            earlier -= num_iterations
        return dropping(self._new_pass, self._num_own(in_epoch))

    def _num_own(self, num_iterations: int) -> int:
        """The number of this rank's batches that `num_iterations` of an epoch take."""
        own = length_of(self.data)
        if not own or self._pass.length is None:
            return num_iterations
        num_passes, rest = divmod(num_iterations, self._pass.length)
        return num_passes * own + min(rest, own)

    def _any_batch(self) -> object:
        for batch in self._new_pass():
            if self._resetting is not None:
                self._resetting.push_back(batch)
            if batch is not None:
                self.source.load_again()
                return batch
        raise RuntimeError(
            f"All batches that this {type_name(self.data)} gave on this rank are None, so that it has none with which "
            "to take part in the steps of other ranks: give each rank data of which something is left."
        )

    def _new_pass(self) -> Iterator[object]:
        for counter in self.counters:
            counter.again()
        if self._resetting is not None:
            return self._resetting.begin()
        # The loop may enter an iterator twice, and iter() of it would restart a self-resetting one; an iterator without
        # __iter__, which `for` takes, would be refused. Through chain() neither happens.
        return chain(self.data)

    def _jumped(self, skip: int) -> Iterator[object]:
        batches = skipped_by_sampler(self.data, skip) if skip else None
        return self._fast_forwarded(skip) if batches is None else batches

    def _fast_forwarded(self, num_batches: int) -> Iterator[object]:
        """An iterator after `num_batches`, which are drawn and dropped, in several passes if an epoch is longer than
        the data.
        """
        if not isinstance(self.data, Sequence):
            warn_of_drawing(self.data, num_batches, self.source.why_drawn)
        return dropping(self._new_pass, num_batches)


def _is_map_style(value: object) -> bool:
    """Whether it is a data set that gives samples by their index, so that its state is no position."""
    return isinstance(value, Dataset) and not isinstance(value, IterableDataset)
