"""Split a stream of samples over ranks: each rank reads all of it, and keeps its turns."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import count, islice
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dengine.data.passes import PassCounter
from dengine.data.sampler import DataState
from dengine.data.seeding import SeededCollate, SeededStream, set_epoch_in_worker, set_epoch_of
from dengine.launch.world import World

__all__ = ["Carried", "CarryingCollate", "StatefulStreamShard", "StreamPosition", "StreamShard"]

StreamPosition: TypeAlias = tuple[int, Any]  # rounds of all ranks, and the state of the stream after them


class Undivided(Protocol):
    """A stream that gives the same in all workers, which share it out among themselves; it knows its position."""

    is_alike_in_workers: bool
    draws_alone: bool  # at random, if at all, whatever the generators are

    def undivided(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def check_state(self, state: dict[str, Any]) -> None: ...


class StreamShard(IterableDataset[Any]):
    """This rank's turns, of `batch_size` samples each, in a stream; `dataset` is the user's own.

    Ranks take turns by batch. If the stream ends before every rank had a turn in the last round, the others repeat the
    first batch of that round, so that all take the same number of steps; with `exact` they have one batch fewer. For a
    stream that gives each rank its own samples already, `here` is a world of one, and `num_parts` counts all ranks.

    Workers take turns, too, in a stream that is `Undivided` (`pack_sequences`): the batches of a rank do not depend on
    their number. Its position after each of them goes with the batch (`carrier`), is
    the same on all ranks, and is where an iteration after `go_on_from` starts.
    """

    def __init__(
        self,
        dataset: "IterableDataset[Any]",
        batch_size: int | None,
        here: World,
        exact: bool,
        drop_last: bool,
        seed: int = 0,
        collate: SeededCollate | None = None,
        num_parts: int | None = None,
    ) -> None:
        self._num_parts = here.data_size if num_parts is None else num_parts
        self.shards_itself = num_parts is not None
        self._dataset = dataset
        self._batch_size = batch_size or 1
        self._rank, self._size = here.data_rank, here.data_size
        self._exact, self._drop_last = exact, drop_last
        self._seed = seed
        self._collate = collate
        kind = {"length": None, "seed": seed, "shuffle": None, "exact": exact, "drop_last": drop_last}
        self.passes = PassCounter(kind)
        self._epoch = -1  # of the pass under way; a worker's copy is of when it was started. -1: nobody counts
        # Workers that outlive an epoch get no index that could carry the next one. They read it here when an iteration
        # starts, which is after it was set.
        self._epoch_for_workers = torch.full((), -1, dtype=torch.int64)
        self._epoch_for_workers.share_memory_()  # type: ignore[no-untyped-call]
        self._has_iterated_in_worker = False
        self._iterated_epoch = -1
        self._num_rounds = 0  # of the iteration under way
        self._is_over = False
        self._generators: SeededStream | None = None
        self.carrier: CarryingCollate | None = None
        self._next_start: StreamPosition | None = None  # of the next iteration
        self._start: StreamPosition | None = None  # of the one under way

    @property
    def is_undivided(self) -> bool:
        """Whether the stream gives the same in all workers, and knows its position."""
        return getattr(self._dataset, "is_alike_in_workers", False) is True

    def go_on_from(self, position: "StreamPosition | None") -> None:
        """Begin the next iteration at `position`, which is in the present epoch."""
        self._next_start = position

    def begin_pass(self) -> None:
        """Begin an iteration over the loader, in the main process."""
        is_counted = self._epoch >= 0
        epoch = self.passes.begin(self._dataset)
        self._epoch = epoch if is_counted or epoch else -1
        self._epoch_for_workers.fill_(self._epoch)
        self._start, self._next_start = self._next_start, None

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch
        if self._has_iterated_in_worker:
            epoch = int(self._epoch_for_workers)
        self._has_iterated_in_worker = get_worker_info() is not None
        self._iterated_epoch = epoch
        if epoch >= 0:
            set_epoch_in_worker(self._dataset, epoch)
        generators = SeededStream(self._seed, max(epoch, 0), is_alike_in_workers=self.is_undivided)
        return self._turns(generators) if not self.is_undivided else self._worker_turns(generators)

    def _turns(self, generators: SeededStream) -> Iterator[Any]:
        """This rank's turns."""
        first_number = self._begin(generators)
        if self._is_over:
            return
        with generators.drawing():
            stream = iter(self._dataset)
        for number in count(first_number):
            with generators.drawing():
                first, mine, is_whole = self._round(stream)
            self._num_rounds, self._is_over = number + 1, not is_whole
            yield from self._given(number, first, mine, is_whole, generators)
            if not is_whole:
                return

    def _worker_turns(self, generators: SeededStream) -> Iterator[Any]:
        """This worker's part of this rank's turns in an undivided stream, from the start of the iteration on."""
        dataset = cast(Undivided, self._dataset)
        worker = get_worker_info()
        number_of_worker, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first_number, state = self._start or (0, None)
        # What the stream draws at random is its own affair, unless it reads from a source that cannot seed itself.
        drawing = nullcontext if dataset.draws_alone else generators.drawing
        with drawing():
            if state is not None:
                dataset.load_state_dict(state)
            stream = dataset.undivided()
        for number in count(first_number):
            with drawing():
                first, mine, is_whole = self._round(stream)
            if (number - first_number) % num_workers == number_of_worker:
                if self.carrier is not None:
                    self.carrier.position = number + 1, dataset.state_dict()
                yield from self._given(number, first, mine, is_whole, generators)
            if not is_whole:
                return

    def _given(
        self, number: int, first: list[Any], mine: list[Any], is_whole: bool, generators: SeededStream
    ) -> list[Any]:
        """The samples of this rank in the round `number`, for whose batch the collate function is seeded."""
        if self._collate is not None:  # which gets the samples of one turn
            self._collate.next_seed = generators.seed_of((number * self._size + self._rank) * self._batch_size)
        if self._drop_last and not is_whole:
            return []
        return mine if mine or self._exact else first

    def _begin(self, generators: SeededStream) -> int:
        """Begin an iteration with its first round, or with the one of a state that was loaded, and give its number."""
        self._num_rounds, self._is_over, self._generators = 0, False, generators
        return 0

    def _round(self, stream: Iterator[Any]) -> tuple[list[Any], list[Any], bool]:
        """The first turn of the next round, this rank's turn, and whether every rank had a whole one."""
        first: list[Any] = []
        mine: list[Any] = []
        for rank in range(self._size):
            turn = list(islice(stream, self._batch_size))
            first = turn if rank == 0 else first
            mine = turn if rank == self._rank else mine
            if len(turn) < self._batch_size:
                return first, mine, False
        return first, mine, True

    def set_epoch(self, epoch: int) -> None:
        """Seed the next iteration for `epoch`; pass it on to a data set that shuffles by epoch."""
        self.passes.set_epoch(epoch)
        if self._next_start is not None and self._next_start[1]["epoch"] != epoch:
            self._next_start = None
        self._epoch = epoch
        set_epoch_of(self._dataset, epoch)

    def state(self) -> DataState:
        """The same as for `ElasticSampler`, except that a stream has no known length, and its order never changes."""
        return {**self.passes.kind, "global_batch_size": self._num_parts * self._batch_size}


class Carried(NamedTuple):
    """A batch on its way from a worker, with the position of the stream after it."""

    batch: Any
    position: StreamPosition


class CarryingCollate:
    """A `collate_fn` that gives the position along with the batch: the stream sets it when it gives the samples."""

    def __init__(self, inside: Callable[..., Any]) -> None:
        self.inside = inside
        self.position: StreamPosition = (0, None)

    def __call__(self, fetched: Any) -> Carried:
        return Carried(self.inside(fetched), self.position)


class StatefulStreamShard(StreamShard):
    """That of a stream which keeps its own position, as this one does between two turns."""

    _loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last turn that was given: plain values, and the state of the stream.

        Without a shard of its own (`shards_itself`) it is the same on all ranks, and for any number of ranks with the
        same global batch.
        """
        if self._loaded is not None:
            return dict(self._loaded)
        has_started = self._num_rounds > 0 and self._generators is not None
        return {
            "epoch": self._iterated_epoch,
            "rounds": self._num_rounds,
            "is_over": self._is_over,  # a stream may stand at its beginning again by then
            "stream": self._dataset.state_dict() if has_started else None,  # type: ignore[attr-defined]
            "generators": self._generators.state() if has_started and self._generators is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration go on from where `state` was taken.

        Raises: ValueError: it is of something else.
        """
        if missing := {"epoch", "rounds", "is_over", "stream", "generators"} - set(state):
            raise ValueError(f"The state of the stream has no {', '.join(sorted(missing))}: it holds {sorted(state)}.")
        self._loaded = state if state["rounds"] else None

    def _begin(self, generators: SeededStream) -> int:
        start, self._loaded = self._loaded, None
        self._num_rounds, self._is_over, self._generators = 0, False, generators
        if start is None:
            return 0
        self._dataset.load_state_dict(start["stream"])  # type: ignore[attr-defined]
        if start["epoch"] != self._iterated_epoch:
            return 0  # it was at the end of an epoch
        generators.restore(start["generators"])
        self._num_rounds, self._is_over = start["rounds"], start["is_over"]
        return self._num_rounds
