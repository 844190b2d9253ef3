"""Deal out the batches of a batch sampler: every rank draws the epoch, and takes its turns in rounds of one batch each.

    batches of the epoch     0 1 2 3 4 5 6
    three ranks              0 1 2 | 0 1 2 | 0 . .     the ranks that take them; `.`: padded, or nothing with exact=True

A run that goes on over another number of ranks, within an epoch, deals out what is left of the epoch anew.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from dengine.checks import whole_number
from dengine.comm.mesh import note_different_samples
from dengine.data.passes import PassCounter
from dengine.data.sampler import DataState
from dengine.data.seeding import EpochIndex
from dengine.data.whole_epochs import WholeEpochs, size_of
from dengine.launch.world import world

__all__ = ["DealtBatches"]

_NOT_RESUMED: tuple[int, list[list[int]]] = (-1, [])


class DealtBatches(Sampler[list[int]]):
    """This rank's batches of those that a batch sampler gives, whole, in whole rounds over the ranks.

    If the last round has no batch for every rank, it is filled up with the first batches of the epoch, so that all take
    the same number of steps; with `exact` the others have one batch fewer.

    As an `ElasticSampler` it goes on by itself to the next epoch, begins anywhere, and lets indices carry the epoch.

    Cost: see `WholeEpochs`.
    """

    def __init__(self, inside: Any, dataset: Any, *, seed: int, exact: bool) -> None:
        here = world()
        note_different_samples()
        self.rank, self.num_replicas = here.data_rank, here.data_size
        self.draw = WholeEpochs(inside, dataset, seed, is_of_batches=True)
        self.exact = exact
        self.carries_epoch = False
        self._dataset = dataset
        self._kind = {"length": size_of(dataset), "seed": seed, "shuffle": None, "exact": exact, "drop_last": False}
        self.passes = PassCounter({**self._kind, "sampler": type(inside).__qualname__})
        self._skipped = 0
        self._resumed = _NOT_RESUMED  # an epoch that a run before has begun, and its rounds

    def __len__(self) -> int:
        return self._length(self.passes.epoch)

    def __iter__(self) -> Iterator[list[int]]:
        self.draw.take_own_epoch(self.passes)
        epoch = self.passes.begin(self._dataset)
        first, self._skipped = self._skipped, 0
        if not first:
            self._resumed = _NOT_RESUMED  # one more pass over the same epoch
        indices, offsets = self.draw.batches(epoch)
        number = EpochIndex.of(epoch) if self.carries_epoch else int
        start, before = self._last_rounds(epoch)
        for iteration in range(first, self._length(epoch)):
            batch = (before + (iteration - start) * self.num_replicas + self.rank) % (len(offsets) - 1)
            mine = indices[offsets[batch] : offsets[batch + 1]].tolist()
            yield list(map(number, mine)) if self.carries_epoch else mine
        self._resumed = _NOT_RESUMED

    def set_epoch(self, epoch: int) -> None:
        """Give the batches of `epoch` in the next iteration, from its beginning."""
        self.passes.set_epoch(epoch)
        self.draw.ignore_own_epoch()
        self._skipped = 0
        if epoch != self._resumed[0]:
            self._resumed = _NOT_RESUMED

    def skip(self, num_batches: int) -> None:
        """Begin the next iteration after the first `num_batches` of this rank."""
        self._skipped = whole_number("num_batches", num_batches, least=0)

    def go_on_from(self, saved: DataState, num_batches: int) -> None:
        """Go on in the epoch of a saved state, of which each rank has had `num_batches`, perhaps among fewer or more
        ranks: those that are left are dealt out anew.
        """
        epoch, rounds = saved["sampler_epoch"], saved["rounds"]
        if rounds[-1][1] != self.num_replicas:
            rounds = [*(each for each in rounds if each[0] < num_batches), [num_batches, self.num_replicas]]
        self._resumed = epoch, rounds

    def state(self) -> DataState:
        """The same as for `ElasticSampler`. `rounds`: how many batches make a round, from which of this rank's on."""
        epoch = self.passes.epoch
        return {
            **self._kind,
            "global_batch_size": None,
            **self.draw.description(epoch),
            "rounds": self._rounds_of(epoch),
        }

    def _length(self, epoch: int) -> int:
        start, before = self._last_rounds(epoch)
        left = max(0, self.draw.length(epoch) - before - (self.rank if self.exact else 0))
        return start + -(-left // self.num_replicas)

    def _last_rounds(self, epoch: int) -> tuple[int, int]:
        """From which of this rank's batches on the last rounds are dealt out, and how many batches came before them."""
        rounds = self._rounds_of(epoch)
        starts = [start for start, _ in rounds]
        return starts[-1], sum((end - start) * size for (start, size), end in zip(rounds, starts[1:], strict=False))

    def _rounds_of(self, epoch: int) -> list[list[int]]:
        return self._resumed[1] if self._resumed[0] == epoch else [[0, self.num_replicas]]
