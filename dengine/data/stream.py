"""Split a stream of samples over ranks: each rank reads all of it, and keeps its turns."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dengine.data.passes import PassCounter
from dengine.data.sampler import DataState
from dengine.data.seeding import SeededCollate, SeededStream, set_epoch_in_worker, set_epoch_of
from dengine.launch.world import World

__all__ = ["StreamShard"]


class StreamShard(IterableDataset[Any]):
    """This rank's turns, of `batch_size` samples each, in a stream; `dataset` is the user's own.

    Ranks take turns by batch. If the stream ends before every rank had a turn in the last round, the others repeat the
    first batch of that round, so that all take the same number of steps; with `exact` they have one batch fewer. For a
    stream that gives each rank its own samples already, `here` is a world of one, and `num_parts` counts all ranks.

    A stream with a method `undivided` (`pack_sequences`) gives the same in all workers, which take turns too: the
    batches of a rank do not depend on their number.
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

    def begin_pass(self) -> None:
        """Begin an iteration over the loader, in the main process."""
        is_counted = self._epoch >= 0
        epoch = self.passes.begin(self._dataset)
        self._epoch = epoch if is_counted or epoch else -1
        self._epoch_for_workers.fill_(self._epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch
        if self._has_iterated_in_worker:
            epoch = int(self._epoch_for_workers)
        self._has_iterated_in_worker = get_worker_info() is not None
        if epoch >= 0:
            set_epoch_in_worker(self._dataset, epoch)
        undivided = getattr(self._dataset, "undivided", None)
        if callable(undivided):
            worker = get_worker_info()
            generators = SeededStream(self._seed, max(epoch, 0), is_alike_in_workers=True)
            return self._turns(generators, undivided, *((0, 1) if worker is None else (worker.id, worker.num_workers)))
        return self._turns(SeededStream(self._seed, max(epoch, 0)), self._dataset.__iter__)

    def _turns(
        self, generators: SeededStream, begin: Callable[[], Iterator[Any]], worker: int = 0, num_workers: int = 1
    ) -> Iterator[Any]:
        """This rank's turns; of a stream that is the same in all workers, this worker's ones."""
        with generators.drawing():
            stream = begin()
        for turn in count(self._rank, self._size):
            with generators.drawing():
                first, mine, is_whole = self._round(stream)
            if turn // self._size % num_workers != worker:
                if not is_whole:
                    return
                continue
            if self._collate is not None:  # which gets the samples of one turn
                self._collate.next_seed = generators.seed_of(turn * self._batch_size)
            if is_whole or not self._drop_last:
                yield from mine if mine or self._exact else first
            if not is_whole:
                return

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
        self._epoch = epoch
        set_epoch_of(self._dataset, epoch)

    def state(self) -> DataState:
        """The same as for `ElasticSampler`, except that a stream has no known length, and its order never changes."""
        return {**self.passes.kind, "global_batch_size": self._num_parts * self._batch_size}
