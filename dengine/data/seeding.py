"""Random augmentation that depends only on the sample: not on the worker, the rank, or a resumed run.

While sample i of epoch e is fetched, Python's, NumPy's and torch's CPU generators are seeded from (seed, e, i); while a
batch is collated, from (seed, e, its first sample). The epoch travels with the index, so that it reaches workers that
outlive an epoch.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from dengine.data.transparent import TransparentDataset
from dengine.splitmix64 import derived_seed

__all__ = [
    "EpochIndex",
    "SeededCollate",
    "SeededDataset",
    "SeededStream",
    "draws_nothing",
    "kept_generators",
    "seed_generators",
    "set_epoch_in_worker",
    "set_epoch_of",
]

_State: TypeAlias = tuple[Any, Any, torch.Tensor]

_COLLATING = 1  # added to seed, epoch and sample, so that it differs from the sample's own seed


class EpochIndex(int):
    """The index of a sample, which carries the epoch in which it is drawn. It works as an int, and pickles with its
    epoch.

    Indices of one epoch have a type of their own, `EpochIndex.of(epoch)`: to make one costs no more than any int.

    Example:
        >>> index = EpochIndex.of(7)(1)
        >>> "abc"[index], index.epoch, index + 1
        ('b', 7, 2)
    """

    __slots__ = ()
    epoch: ClassVar[int]

    @staticmethod
    def of(epoch: int) -> type["EpochIndex"]:
        return _index_type(epoch)

    def __reduce__(self) -> tuple[Callable[[int, int], "EpochIndex"], tuple[int, int]]:
        return _index, (int(self), self.epoch)


@lru_cache(maxsize=8)
def _index_type(epoch: int) -> type[EpochIndex]:
    return type("EpochIndex", (EpochIndex,), {"__slots__": (), "epoch": epoch})


def _index(value: int, epoch: int) -> EpochIndex:
    return _index_type(epoch)(value)


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generator with 64 bits.

    Cost: 8 us. `torch.manual_seed` alone costs 260, and seeds the generators of every GPU.
    """
    random.seed(seed)
    # torch and NumPy draw by the same algorithm and use 32 bits of a seed: the same bits would give the same numbers.
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed & 0xFFFFFFFF)


def draws_nothing(dataset: object, collate_fn: object) -> bool:
    """Whether fetching from `dataset` only looks something up, so that seeding would be wasted."""
    if collate_fn not in (default_collate, default_convert):
        return False
    if type(dataset) is Subset:
        return draws_nothing(dataset.dataset, collate_fn)
    if type(dataset) is ConcatDataset:
        return all(draws_nothing(part, collate_fn) for part in dataset.datasets)
    return type(dataset) in (TensorDataset, torch.Tensor, np.ndarray, list, tuple, range)


class SeededDataset(TransparentDataset):
    """A map-style data set whose random state, while sample i of epoch e is fetched, follows from (seed, e, i).

    An index that is no `EpochIndex` passes through. In the main process the generators are restored afterwards; a
    worker's belong to the data set. Generators that the data set holds itself are not touched. `collate` gets the seed
    of the batch that was fetched.

    A batched fetch (`__getitems__`) stays batched as long as it draws nothing at random. Once a batch does, it is
    fetched again sample by sample, and so are all later ones. If a fetch gives no list, the batch is seeded by its
    first sample.

    Cost: 8 us a sample; in the main process 0.15 ms a batch; a batched fetch 0.15 ms a batch and nothing a sample.
    """

    def __init__(self, dataset: Any, seed: int, collate: "SeededCollate | None" = None) -> None:
        super().__init__(dataset, _seed=seed, _collate=collate, _epoch=None, _draws_in_batches=False)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, EpochIndex):
            return self._dataset[index]
        self._announce(index)
        with _surroundings():
            return self._one(index)

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        is_batched = callable(getattr(self._dataset, "__getitems__", None))
        if not all(isinstance(index, EpochIndex) for index in indices):
            return self._fetched(indices)
        if indices:
            self._announce(indices[0])
        with _surroundings():
            return self._batch(indices) if is_batched and indices else [self._one(index) for index in indices]

    def __reduce__(self) -> tuple[type["SeededDataset"], tuple[Any, ...]]:
        return SeededDataset, (self._dataset, self._seed, self._collate)

    def _announce(self, first: EpochIndex) -> None:
        if self._collate is not None:
            self._collate.next_seed = derived_seed(self._seed, first.epoch, first, _COLLATING)

    def _one(self, index: EpochIndex) -> Any:
        self._seed_for(index)
        return self._dataset[int(index)]

    def _batch(self, indices: Sequence[EpochIndex]) -> Any:
        if not self._draws_in_batches:
            self._seed_for(indices[0])
            before = _state()
            fetched = self._dataset.__getitems__([int(index) for index in indices])
            if _is_same(before, _state()) or not isinstance(fetched, list):
                return fetched
            self.__dict__["_draws_in_batches"] = True
        fetched = []
        for index in indices:
            self._seed_for(index)
            fetched.extend(self._dataset.__getitems__([int(index)]))
        return fetched

    def _seed_for(self, index: EpochIndex) -> None:
        if index.epoch != self._epoch:
            self.__dict__["_epoch"] = index.epoch
            set_epoch_in_worker(self._dataset, index.epoch)
        seed_generators(derived_seed(self._seed, index.epoch, index))


class SeededCollate:
    """A `collate_fn` whose random state follows from the batch: the data set sets `next_seed` when it fetches one.

    A loader collates a batch before it fetches the next one, in the same process, so the data set and this function can
    share an object, also after they were pickled for a worker. The generators are restored afterwards. Cost: 0.2 ms a
    batch.
    """

    def __init__(self, inside: Callable[..., object]) -> None:
        self.inside = inside
        self.next_seed: int | None = None

    def __call__(self, fetched: Any) -> Any:
        seed, self.next_seed = self.next_seed, None
        if seed is None:
            return self.inside(fetched)
        with kept_generators():
            seed_generators(seed)
            return self.inside(fetched)


class SeededStream:
    """The generators of one iteration over an iterable data set: seeded from (seed, epoch, worker) as it starts.

    All ranks read the same stream, so they draw the same. In a worker the generators are the process's own; in the
    main process they replace the surrounding ones within each `with stream.drawing():`. Cost there: 0.3 ms.
    """

    def __init__(self, seed: int, epoch: int, *, is_alike_in_workers: bool = False) -> None:
        worker = get_worker_info()
        self._is_main = worker is None
        self._number = derived_seed(seed, epoch, -1 - (0 if worker is None or is_alike_in_workers else worker.id))
        self._inside: _State | None = None
        if self._is_main:
            with kept_generators():
                seed_generators(self._number)
                self._inside = _state()
        else:
            seed_generators(self._number)

    def drawing(self) -> AbstractContextManager[None]:
        return self._exchanged() if self._is_main else nullcontext()

    def seed_of(self, first: int) -> int:
        """The seed for collating the batch that begins with sample number `first` of the stream."""
        return derived_seed(self._number, first)

    def state(self) -> dict[str, Any]:
        """The generators as they are now, as plain values."""
        python, numpy, of_torch = self._inside or _state()
        key = {**numpy["state"], "key": numpy["state"]["key"].tobytes()}
        numbers = np.array(python[1], np.uint32).tobytes()
        return {
            "python": (python[0], numbers, python[2]),
            "numpy": {**numpy, "state": key},
            "torch": of_torch.numpy().tobytes(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Set the generators to what `state` gave."""
        version, numbers, gauss = saved["python"]
        key = np.frombuffer(saved["numpy"]["state"]["key"], np.uint32)
        state = (
            (version, tuple(np.frombuffer(numbers, np.uint32).tolist()), gauss),
            {**saved["numpy"], "state": {**saved["numpy"]["state"], "key": key}},
            torch.frombuffer(bytearray(saved["torch"]), dtype=torch.uint8),
        )
        if self._is_main:
            self._inside = state
        else:
            _set(state)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        assert self._inside is not None
        with kept_generators():
            _set(self._inside)
            yield
            self._inside = _state()


def set_epoch_of(dataset: object, epoch: int) -> None:
    """Call `set_epoch` of the data set, if it has one."""
    set_epoch = getattr(dataset, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)


def set_epoch_in_worker(dataset: object, epoch: int) -> None:
    """Call `set_epoch` of a worker's copy of the data set: the engine reaches only the copy in the main process."""
    if get_worker_info() is not None:
        set_epoch_of(dataset, epoch)


def _surroundings() -> AbstractContextManager[None]:
    """A context that restores the generators at its end in the main process; a worker's belong to the data set."""
    return kept_generators() if get_worker_info() is None else nullcontext()


@contextmanager
def kept_generators() -> Iterator[None]:
    """A context after which Python's, NumPy's and torch's CPU generators are as before."""
    outside = _state()
    try:
        yield
    finally:
        _set(outside)


def _state() -> _State:
    return random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()


def _set(state: _State) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.default_generator.set_state(state[2])


def _is_same(one: _State, other: _State) -> bool:
    if one[0] != other[0] or not torch.equal(one[2], other[2]):
        return False
    mine, theirs = one[1]["state"], other[1]["state"]
    return (
        mine["pos"] == theirs["pos"]
        and one[1]["has_gauss"] == other[1]["has_gauss"]
        and np.array_equal(mine["key"], theirs["key"])
    )
