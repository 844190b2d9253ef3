"""Ask a sampler or batch sampler of the user's for all indices of an epoch, in a way that gives the same anywhere.

It is told the epoch by `set_epoch`, if it has one, and whatever generators it may draw from (the global ones, its own,
those of samplers inside it) are seeded from (seed, their own state as the loader was prepared, epoch) while it draws.
"""

import operator
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from dengine.data.generators import attributes_of, seeded, states_digest
from dengine.data.passes import PassCounter
from dengine.data.seeding import set_epoch_of
from dengine.naming import a_type
from dengine.splitmix64 import derived_seed

__all__ = ["WholeEpochs", "digest", "refuse_indices", "size_of"]

_MAX_DEPTH = 4  # of samplers inside samplers


class WholeEpochs:
    """The indices of each epoch, drawn at once; those of the epoch that was drawn last are kept.

    For a batch sampler (`is_of_batches`) they stand one batch after the other, and `offsets` has where each begins.

    Cost: an epoch is drawn whole as it starts, also in a resumed run, and stored with 8 bytes an index; the first one
    that a process draws is drawn twice, to see that it comes out the same.

    Raises:
        TypeError: the sampler has no length.
        ValueError: it gives one rank's part of the samples already.
    """

    shuffle = True  # as far as is known

    def __init__(self, sampler: Any, dataset: object, seed: int, *, is_of_batches: bool = False) -> None:
        self.inside = sampler
        self._name = type(sampler).__qualname__
        self._what = "batches" if is_of_batches else "indices"
        self._is_of_batches = is_of_batches
        self._size = size_of(dataset)
        self._parts = list(_samplers_in(sampler))
        _refuse_parts(self._parts, self._name)
        self._generators = states_digest(self._parts)
        self._seed = derived_seed(seed, int(self._generators or "0", 16))
        self._must_compare = True
        self._epoch: int | None = None  # that was drawn last
        self._own_epoch = 0  # the sampler's own, as it was left
        self._indices: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._offsets: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._own_length()

    def length(self, epoch: int) -> int:
        """The number of indices of the epoch, or batches."""
        if epoch == self._epoch:
            return len(self._offsets) - 1 if self._is_of_batches else len(self._indices)
        self._set_epoch(epoch)
        return self._own_length()

    def order(self, epoch: int) -> Any:
        """The index at each of the positions that it is given."""
        self._draw(epoch)
        return self._indices.__getitem__

    def batches(self, epoch: int) -> "tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]":
        """The indices of all batches of the epoch, and where each batch begins among them; at last, where all end."""
        self._draw(epoch)
        return self._indices, self._offsets

    def take_own_epoch(self, passes: PassCounter) -> None:
        """Make the next pass one of the epoch that the user has set on the sampler itself, if he has since the last."""
        own = getattr(self.inside, "epoch", None)
        if type(own) is int and own != self._own_epoch:
            passes.set_epoch(own)

    def ignore_own_epoch(self) -> None:
        self._own_epoch = getattr(self.inside, "epoch", 0)

    def description(self, epoch: int) -> dict[str, Any]:
        self._draw(epoch)
        head = ", ".join(map(str, self._indices[:4].tolist()))
        text = (
            f"{self.length(epoch)} {self._what}, the first {head}, ... of digest {digest(self._indices, self._offsets)}"
        )
        text += f", generators in the state {self._generators}" if self._generators else ""
        if isinstance(weights := getattr(self.inside, "weights", None), torch.Tensor):
            text += f", weights of digest {digest(weights.numpy(force=True))}"  # other ones may draw the same for once
        return {"sampler": f"{self._name} ({text} in epoch {epoch})", "sampler_epoch": epoch}

    def _draw(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        drawn = self._drawn(epoch)
        if self._must_compare and not all(map(np.array_equal, drawn, self._drawn(epoch))):
            raise ValueError(
                f"This loader's {self._name} gave other {self._what} as it was asked for epoch {epoch} once more, so "
                "that other ranks and a resumed run would see other samples. Let its order follow from "
                "set_epoch(epoch), or draw it from a generator that is an attribute of it, or from the global one of "
                "torch, NumPy or Python."
            )
        self._must_compare = False
        self._indices, self._offsets = drawn
        self._epoch = epoch

    def _drawn(self, epoch: int) -> "tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]":
        with seeded(self._parts, derived_seed(self._seed, epoch)):
            self._set_epoch(epoch)
            length = self._own_length()
            items = list(islice(self.inside, length + 1))  # it may have no end
        self.ignore_own_epoch()  # which may go on by itself at the end
        if len(items) != length:
            given = "more" if len(items) > length else f"{len(items)}"
            raise ValueError(
                f"This loader's {self._name} says that its length is {length}, but gives {given} {self._what} in epoch "
                f"{epoch}: let __len__ count what __iter__ gives after set_epoch(epoch), exactly."
            )
        offsets = np.zeros(1, np.int64)
        if self._is_of_batches:
            items = [batch if isinstance(batch, list | tuple) else list(batch) for batch in items]
            offsets = np.cumsum([0, *map(len, items)], dtype=np.int64)
            items = list(chain.from_iterable(items))
        indices = self._whole_numbers(items)
        refuse_indices(self.inside, indices, self._size, f" in epoch {epoch}")
        return indices, offsets

    def _set_epoch(self, epoch: int) -> None:
        for part in self._parts:
            set_epoch_of(part, epoch)
        self.ignore_own_epoch()

    def _own_length(self) -> int:
        try:
            return len(self.inside)
        except Exception as error:  # TypeError; ValueError (torch_geometric's DynamicBatchSampler)
            raise TypeError(
                f"This loader's {self._name} has no length ({error}), which prepare_data_loader() needs so that all "
                f"ranks take part to the end: give it a __len__ that counts its {self._what}, or have it give this "
                "rank's part (see dengine.distributed.world()) and use the loader as it is."
            ) from error

    def _whole_numbers(self, items: Iterable[Any]) -> npt.NDArray[np.int64]:
        try:
            return np.fromiter(map(operator.index, items), np.int64)
        except TypeError as error:
            wrong = next(item for item in items if not hasattr(item, "__index__"))
            raise TypeError(
                f"This loader's {self._name} gives {a_type(wrong)} as an index, but prepare_data_loader() deals out "
                "whole numbers"
                + (": a batch sampler belongs to batch_sampler=." if isinstance(wrong, list | tuple) else ".")
            ) from error


def size_of(dataset: Any) -> int | None:
    """The number of samples of a data set; None if it does not say."""
    try:
        return len(dataset)
    except Exception:
        return None


def digest(*values: npt.NDArray[Any]) -> str:
    """A digest of arrays as text."""
    return blake2b(b"".join(each.tobytes() for each in values), digest_size=6).hexdigest()


def refuse_indices(sampler: object, indices: npt.NDArray[np.int64], size: int | None, when: str = "") -> None:
    """Refuse indices that the data set does not have; negative ones count from its end.

    Raises: ValueError: there is one.
    """
    if size is None or not indices.size or (indices.max() < size and indices.min() >= -size):
        return
    wrong = indices[(indices >= size) | (indices < -size)][0]
    raise ValueError(
        f"This loader's {type(sampler).__qualname__} gives index {wrong}{when}, but the data set has {size} samples, "
        "counted from 0: make the sampler for the data set that the loader has."
    )


def _samplers_in(sampler: object, depth: int = _MAX_DEPTH) -> Iterator[object]:
    """`sampler`, and the samplers that it holds."""
    yield sampler
    for name, value in attributes_of(sampler).items() if depth else ():
        if isinstance(value, Sampler) or name.endswith("sampler"):
            yield from _samplers_in(value, depth - 1)


def _refuse_parts(parts: Iterable[object], name: str) -> None:
    """Raises: ValueError: one of the samplers gives one rank's part of the samples already."""
    for part in parts:
        num_parts = getattr(part, "num_replicas", getattr(part, "num_processes", 1))
        if isinstance(num_parts, int) and num_parts > 1:
            raise ValueError(
                f"This loader's {name} gives one of {num_parts} parts of the samples already (its "
                f"{type(part).__qualname__} does), which prepare_data_loader() would cut up once more. Let it give all "
                "samples, the same on every rank, or use the loader as it is."
            )
