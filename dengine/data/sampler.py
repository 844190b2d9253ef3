"""The samples of each rank and their order: one order per epoch, split in global batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import DistributedSampler

from dengine.checks import whole_number
from dengine.comm.mesh import note_different_samples
from dengine.data.draws import Draw, Order
from dengine.data.passes import PassCounter
from dengine.data.permutation import Permutation
from dengine.data.seeding import EpochIndex
from dengine.data.whole_epochs import WholeEpochs, size_of
from dengine.launch.world import world

__all__ = ["DataState", "ElasticSampler", "changed_order", "refuse_changes"]

DataState: TypeAlias = dict[str, Any]  # None: not known

# Positions computed at a time: few, to start at once; then more, up to what fits a processor's cache.
_FIRST_CHUNK, _CHUNK = 1 << 10, 1 << 15

# Settings that must not change, so that a resumed run sees each sample once: the name of each, and the advice.
_MUST_STAY = {
    "length": ("the number of samples", "continue with the data set that the run began with"),
    "global_batch_size": (
        "the global batch",
        "pass global_batch_size={} to prepare_data_loader(), or a batch_size and number of ranks whose product it is",
    ),
    "seed": ("the seed of the order", "pass seed={} to prepare_data_loader()"),
    "shuffle": ("shuffle", "build the loader with shuffle={}"),
    "exact": ("exact", "pass exact={} to prepare_data_loader()"),
    "drop_last": ("drop_last", "build the loader with drop_last={}"),
}


def refuse_changes(changes: Sequence[str]) -> None:
    """Refuse to resume a run if there are `changes` of its data or their order.

    Raises: ValueError: there are some; the message has a line for each.

    Example:
        >>> state = ElasticSampler(range(9), batch_size=2, num_replicas=2, rank=0).state()
        >>> refuse_changes(changed_order(state, ElasticSampler(range(9), batch_size=4, num_replicas=1, rank=0).state()))
        >>> refuse_changes(changed_order(state, {**state, "seed": 5}))
        Traceback (most recent call last):
            ...
        ValueError: The data is not what this run was started with, so samples could be missed or come twice:
        the seed of the order was 0 and is 5: pass seed=0 to prepare_data_loader().
        Or say allow_changed_data=True, and the run goes on at the same batch of the changed data.
    """
    if changes:
        raise ValueError(
            "The data is not what this run was started with, so samples could be missed or come twice:\n"
            + ";\n".join(changes)
            + ".\nOr say allow_changed_data=True, and the run goes on at the same batch of the changed data."
        )


def changed_order(saved: Mapping[str, object], current: Mapping[str, object]) -> list[str]:
    """The differences between two states of an `ElasticSampler`, each with advice, as lines of text. Pure.

    The number of ranks may differ.

    Raises:
        ValueError: `saved` lacks a value.
    """
    changes = []
    if saved.get("sampler") != current.get("sampler"):
        used = [state.get("sampler") or "none of its own" for state in (saved, current)]
        changes.append(f"the sampler was {used[0]} and is {used[1]}: build the loader with the one that the run had")
    for key, (name, advice) in _MUST_STAY.items():
        if key not in saved:
            raise ValueError(f"The saved state of the data has no {key!r}: it holds {sorted(saved)}.")
        was, now = saved[key], current[key]
        if type(was) is not type(now) or was != now:
            changes.append(f"{name} was {was} and is {now}: {advice.format(was)}")
    return changes


class ElasticSampler(DistributedSampler[int]):
    """A `DistributedSampler` whose order of samples does not depend on the number of ranks.

    The epoch is one permutation (or the given order). It is consumed in global batches of
    `batch_size * num_replicas` samples, of which each rank takes one run of `batch_size`: another number of ranks with
    the same global batch sees the same global batches. The rest at the end, less than a global batch, is split evenly.
    If it does not divide, it is

    - padded from the start of the order, so that all ranks take the same number of steps (the default, for training),
    - dropped with `drop_last=True`,
    - left uneven with `exact=True`: every sample once over all ranks, shards differ in length by at most one.

    Nobody has to set the epoch: each new iteration goes on to the next one, and keeps the epoch that it began with.
    After `set_epoch`, which an engine calls, the next iteration is of that epoch.

    `num_replicas` and `rank` are, if they are not given, `World.data_size` and `data_rank`: the ranks of this process
    group, or on a mesh the groups of ranks that share their data.

    With `draw`, which `prepare_data_loader` gives for samplers of the user's, the epoch is not a permutation of all
    samples, but what that draws, dealt out in the same way.

    With `carries_epoch`, which `prepare_data_loader` sets, indices are `EpochIndex`: ints that carry the epoch to the
    worker that fetches the sample.

    Cost: O(1) memory and time to set up, also for 10^9 samples; no collective. 0.1 us a sample, 0.3 with its epoch.

    Raises:
        ValueError, TypeError: an invalid size, rank or batch size; `exact` together with `drop_last`.

    Example:
        >>> list(ElasticSampler(range(5), batch_size=2, num_replicas=2, rank=0, shuffle=False, exact=True))
        [0, 1, 4]
        >>> list(ElasticSampler(range(5), batch_size=2, num_replicas=2, rank=1, shuffle=False, exact=True))
        [2, 3]
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        batch_size: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        exact: bool = False,
        draw: Draw | None = None,
    ) -> None:
        # DistributedSampler's own constructor would ask for a process group; its attributes are kept to.
        self.dataset: Any = dataset
        here = world()
        self.num_replicas = whole_number(
            "num_replicas", here.data_size if num_replicas is None else num_replicas, least=1
        )
        if self.num_replicas == here.size:
            note_different_samples()
        self.rank = whole_number("rank", here.data_rank if rank is None else rank, least=0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank={rank} must lie below num_replicas={self.num_replicas}.")
        if exact and drop_last:
            raise ValueError("exact=True sees every sample, but drop_last=True drops some: choose one.")
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.exact = exact
        self.carries_epoch = False
        self.draw = draw
        self._skipped = 0
        kind = {"length": size_of(dataset), "seed": seed, "shuffle": shuffle, "exact": exact, "drop_last": drop_last}
        self.passes = PassCounter(kind if draw is None else {**kind, "sampler": type(draw.inside).__qualname__})

    @property
    def epoch(self) -> int:
        """The epoch that was set last, or that the last iteration went on to."""
        return self.passes.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.passes.set_epoch(epoch)

    @property
    def num_samples(self) -> int:  # type: ignore[override]  # a plain attribute there, and stale once the data grows
        """Samples of this rank in an epoch."""
        full, left = divmod(self._size(), self.num_replicas * self.batch_size)
        return full * self.batch_size + self._share_of_rest(left)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples of all ranks in an epoch, padding included."""
        size = self._size()
        left = size % (self.num_replicas * self.batch_size)
        if self.exact or left == 0:
            return size
        return size - left if self.drop_last else size + -left % self.num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self._chunks())

    def _chunks(self) -> Iterator[Iterable[int]]:
        # Begun with its first sample: a loader with workers makes two iterators, and uses one.
        if isinstance(self.draw, WholeEpochs):
            self.draw.take_own_epoch(self.passes)
        epoch = self.passes.begin(self.dataset)
        first, self._skipped = self._skipped, 0
        size, end = self._size(), self.num_samples  # which may depend on the epoch
        order = self._order(epoch)
        length = _FIRST_CHUNK
        while first < end:
            mine = np.arange(first, min(first + length, end), dtype=np.int64)
            positions = self._positions(mine, size)
            indices = (positions if order is None else order(positions)).tolist()
            yield map(EpochIndex.of(epoch), indices) if self.carries_epoch else indices
            first, length = first + length, min(2 * length, _CHUNK)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of `epoch` in the next iteration, from its beginning."""
        self.passes.set_epoch(epoch)
        if isinstance(self.draw, WholeEpochs):
            self.draw.ignore_own_epoch()
        self._skipped = 0

    def skip(self, num_samples: int) -> None:
        """Begin the next iteration after the first `num_samples` of this rank: O(1), for a resumed run.

        In batches of this rank's `batch_size`, the position is the same for any number of ranks.
        """
        self._skipped = whole_number("num_samples", num_samples, least=0)

    def state(self) -> DataState:
        """The values on which the order of samples depends, for `changed_order`. The number of ranks is not one of
        them.
        """
        return {
            "length": len(self.dataset) if self.draw is None else size_of(self.dataset),
            "global_batch_size": self.num_replicas * self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "exact": self.exact,
            "drop_last": self.drop_last,
            **({} if self.draw is None else self.draw.description(self.epoch)),
        }

    def _size(self) -> int:
        return len(self.dataset) if self.draw is None else self.draw.length(self.epoch)

    def _order(self, epoch: int) -> Order | None:
        if self.draw is not None:
            return self.draw.order(epoch)
        return Permutation(len(self.dataset), self.seed, epoch) if self.shuffle else None

    def _share_of_rest(self, left: int) -> int:
        if self.exact:
            return left // self.num_replicas + (self.rank < left % self.num_replicas)
        return 0 if self.drop_last else -(-left // self.num_replicas)

    def _positions(self, mine: "np.typing.NDArray[np.int64]", size: int) -> "np.typing.NDArray[np.int64]":
        """The positions in the epoch's order, of `size`, of this rank's samples number `mine`. Shapes: (N,) to (N,)."""
        num_full, left = divmod(size, self.num_replicas * self.batch_size)
        batch, within = np.divmod(mine, self.batch_size)
        positions = (batch * self.num_replicas + self.rank) * self.batch_size + within
        is_rest = mine >= num_full * self.batch_size
        if is_rest.any():
            share, extra = divmod(left, self.num_replicas)
            # The rest of the epoch: each rank one run again; the first `extra` runs are longer by one.
            longer_before = min(self.rank, extra) if self.exact else self.rank * (extra > 0)
            offset = self.rank * share + longer_before
            rest = size - left + offset + (mine - num_full * self.batch_size)
            positions = np.where(is_rest, rest % size, positions)
        return positions
