"""The order in which a sampler of the user's draws an epoch's samples, known at any position, the same on all ranks.

What torch's own samplers draw follows from (seed, epoch, position) alone, so that nothing is stored and any position is
reached at once. Any other sampler is asked for its whole epoch (`whole_epochs.py`).
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from dengine.data.generators import states_digest
from dengine.data.permutation import Permutation
from dengine.data.whole_epochs import WholeEpochs, digest, refuse_indices, size_of
from dengine.splitmix64 import derived_seed

__all__ = ["Draw", "Order", "draw_of", "is_plain"]

# Gives the indices of samples at positions of the epoch's order. Shapes: (N,) to (N,).
Order: TypeAlias = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.integer[Any]]]

_GAMMA, _FIRST, _SECOND = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Draw(Protocol):
    """An order of samples that a sampler describes."""

    inside: Any  # the user's sampler
    shuffle: bool

    def length(self, epoch: int) -> int:
        """The number of indices of the epoch, over all ranks."""

    def order(self, epoch: int) -> Order: ...

    def description(self, epoch: int) -> dict[str, Any]:
        """What must be the same on all ranks and in a resumed run: plain values."""


def draw_of(sampler: object, dataset: object, seed: int) -> Draw | None:
    """The order that `sampler` draws; None if it is all samples, shuffled or not.

    Raises:
        TypeError: it has no length. ValueError: its weights or indices do not fit `dataset`.
    """
    size = size_of(dataset)
    sampler_type: Any = type(sampler)
    if sampler_type is WeightedRandomSampler and sampler.replacement:  # type: ignore[attr-defined]
        return _Weighted(sampler, size, seed)
    if sampler_type is WeightedRandomSampler:
        _checked_weights(sampler, size)
    if sampler_type is SubsetRandomSampler:
        return _Subset(sampler, size, seed)
    if is_plain(sampler, RandomSampler):
        number: Any = sampler
        population = len(number.data_source)
        if number.replacement:
            return _Replaced(sampler, size, seed, population)
        if number.num_samples != population or population != size:
            return _Shuffled(sampler, size, seed, population)
        return None
    if is_plain(sampler, SequentialSampler) and size_of(sampler.data_source) == size:  # type: ignore[attr-defined]
        return None
    return WholeEpochs(sampler, dataset, seed)


def is_plain(sampler: object, kind: type) -> bool:
    """Whether it does what torch's sampler of that `kind` does: torch's own, or that of torchdata's loader."""
    if type(sampler).__module__ == "torchdata.stateful_dataloader.sampler":
        return type(sampler).__name__ == kind.__name__
    return isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__  # type: ignore[attr-defined]


class _ByPosition:
    """What the draws by position have in common; with a generator in the sampler, its state is the seed."""

    shuffle = True

    def __init__(self, sampler: Any, size: int | None, seed: int) -> None:
        self.inside = sampler
        self._size = size
        self._generator = states_digest([sampler])
        self._seed = derived_seed(seed, int(self._generator, 16)) if self._generator else seed

    def length(self, epoch: int) -> int:
        return len(self.inside)

    def _described(self, *parts: str) -> dict[str, Any]:
        parts = (f"{len(self.inside)} draws", *parts)
        if self._generator:
            parts += (f"a generator in the state {self._generator}",)
        return {"sampler": f"{type(self.inside).__qualname__} ({', '.join(parts)})"}


class _Replaced(_ByPosition):
    """`RandomSampler(replacement=True)`: each position by itself, any sample with the same probability."""

    def __init__(self, sampler: Any, size: int | None, seed: int, population: int) -> None:
        super().__init__(sampler, size, seed)
        self._population = population
        _check_population(sampler, population, size)

    def order(self, epoch: int) -> Order:
        key = derived_seed(self._seed, epoch)
        return lambda positions: np.floor(_uniform(key, positions) * self._population).astype(np.int64)

    def description(self, epoch: int) -> dict[str, Any]:
        return self._described(f"with replacement from {self._population} samples")


class _Weighted(_ByPosition):
    """`WeightedRandomSampler(replacement=True)`: each position by itself, by a search in the sums of the weights."""

    def __init__(self, sampler: Any, size: int | None, seed: int) -> None:
        super().__init__(sampler, size, seed)
        _checked_weights(sampler, size)

    def order(self, epoch: int) -> Order:
        key = derived_seed(self._seed, epoch)
        weights = _checked_weights(self.inside, self._size)  # which may change from epoch to epoch
        sums = np.cumsum(weights / weights.max())  # whose sum is finite
        last = int(np.flatnonzero(weights)[-1])

        def drawn(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            found: npt.NDArray[np.int64] = np.searchsorted(sums, _uniform(key, positions) * sums[-1], side="right")
            return found.clip(max=last)

        return drawn

    def description(self, epoch: int) -> dict[str, Any]:
        weights = _checked_weights(self.inside, self._size)
        head = ", ".join(f"{weight:.4g}" for weight in weights[:4].tolist())
        return self._described(f"with replacement by {len(weights)} weights {head}, ... of digest {digest(weights)}")


class _Shuffled(_ByPosition):
    """Permutations one after the other, each with every sample once: `RandomSampler(num_samples=)`."""

    def __init__(self, sampler: Any, size: int | None, seed: int, population: int) -> None:
        super().__init__(sampler, size, seed)
        self._population = population
        _check_population(sampler, population, size)

    def order(self, epoch: int) -> Order:
        num = self._population
        turns = [
            Permutation(num, derived_seed(self._seed, turn) if turn else self._seed, epoch)
            for turn in range(-(-len(self.inside) // num) if num else 0)
        ]

        def drawn(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            turn, within = np.divmod(positions, num)
            found = np.empty_like(positions)
            for each in np.unique(turn).tolist():
                found[turn == each] = turns[each](within[turn == each])
            return found

        return drawn

    def description(self, epoch: int) -> dict[str, Any]:
        return self._described(f"without replacement from {self._population} samples")


class _Subset(_ByPosition):
    """`SubsetRandomSampler`: a permutation of its indices."""

    def __init__(self, sampler: Any, size: int | None, seed: int) -> None:
        super().__init__(sampler, size, seed)
        self._indices()

    def order(self, epoch: int) -> Order:
        indices = self._indices()
        permutation = Permutation(len(indices), self._seed, epoch)
        return lambda positions: indices[permutation(positions)]

    def description(self, epoch: int) -> dict[str, Any]:
        indices = self._indices()
        return self._described(f"of indices {', '.join(map(str, indices[:4]))}, ... of digest {digest(indices)}")

    def _indices(self) -> npt.NDArray[np.int64]:
        indices = np.asarray(self.inside.indices, dtype=np.int64)  # copies a list, but not a tensor or an array
        refuse_indices(self.inside, indices, self._size)
        return indices


def _checked_weights(sampler: Any, size: int | None) -> npt.NDArray[np.float64]:
    """The weights of a sampler. Raises: ValueError: they do not fit the data set, or cannot be drawn by."""
    weights = torch.as_tensor(sampler.weights, dtype=torch.double).numpy(force=True)
    if size is not None and len(weights) != size:
        raise ValueError(
            f"This loader's WeightedRandomSampler has {len(weights)} weights, but the data set has {size} samples: "
            "give it one weight for each sample, 0 for those that are not to be drawn."
        )
    is_wrong = ~(np.isfinite(weights) & (weights >= 0))
    if is_wrong.any() or not weights.any():
        first = int(np.argmax(is_wrong))
        found = f"weight {first} is {weights[first]}" if is_wrong.any() else "all of them are 0"
        raise ValueError(
            "The weights of this loader's WeightedRandomSampler must be finite numbers of at least 0, some above 0, "
            f"but {found}."
        )
    return weights


def _check_population(sampler: Any, population: int, size: int | None) -> None:
    if population == 0 and len(sampler):
        raise ValueError(f"This loader's {type(sampler).__qualname__} draws {len(sampler)} of no samples.")
    refuse_indices(sampler, np.arange(max(0, population - 1), population), size)


def _uniform(key: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each position: output number `position` of splitmix64 with the seed `key`.

    Shapes: (N,) to (N,).
    """
    words = (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA + np.uint64(key)
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    words ^= words >> np.uint64(31)
    fractions: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions
