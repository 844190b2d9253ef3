"""Start an iterator in the middle of the data: with a sampler that skips, or by drawing and dropping batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from dengine.data.parts import counters_of, members_of
from dengine.data.zipped import ZippedLoaders
from dengine.distributed import world
from dengine.naming import type_name

__all__ = ["can_seek", "dropping", "rest_of", "skipped_by_sampler", "warn_of_drawing"]


class _Skips(Protocol):
    """A sampler that can start in the middle of an epoch; one of batches counts those."""

    def skip(self, num_samples: int) -> None: ...


def can_seek(data: Iterable[object]) -> bool:
    """Whether a pass over the data is the same, whatever number of passes this epoch had before."""
    if members := members_of(data):
        return all(map(can_seek, members.values()))
    return bool(counters_of(data)) or isinstance(data, Sequence) or _skipping(data) is not None


def skipped_by_sampler(data: Iterable[object], num_batches: int) -> Iterator[object] | None:
    """A started iterator over the batches after the first `num_batches`; None if it cannot begin there at once."""
    if isinstance(data, ZippedLoaders):
        return data.start(num_batches, _after)
    skipping = _skipping(data)
    if skipping is None:
        return None
    sampler, batch_size = skipping
    sampler.skip(num_batches * batch_size)
    return rest_of(iter(data))


def _after(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    batches = skipped_by_sampler(loader, num_batches) if num_batches else None
    return dropping(lambda: iter(loader), num_batches) if batches is None else batches


def dropping(new_pass: Callable[[], Iterator[object]], num_batches: int) -> Iterator[object]:
    """An iterator after `num_batches`, which are drawn and dropped, in as many passes over the data as needed."""
    iterator = new_pass()
    while num_batches:
        drawn = sum(1 for _ in islice(iterator, num_batches))
        num_batches -= drawn
        if num_batches and drawn == 0:
            break
        if num_batches:
            iterator = new_pass()
    return iterator


def warn_of_drawing(data: Iterable[object], num_batches: int, why: str = "") -> None:
    """Warn, on rank 0, that `num_batches` are drawn only to be dropped; `why`, if the data keep their own position."""
    if not num_batches or world().rank != 0:
        return
    if why:
        warnings.warn(
            f"To go on from where the run was left, {num_batches} batches are drawn from the {type_name(data)} and "
            f"dropped, although it keeps its own position: {why}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    warnings.warn(
        f"To go on from where the run was left, {num_batches} batches are drawn from the "
        f"{type_name(data)} and dropped. A DataLoader that prepare_data_loader() gave starts at any "
        "batch at once, and its data draw the same random numbers whatever the workers have drawn before.",
        RuntimeWarning,
        stacklevel=2,
    )


def _skipping(data: Iterable[object]) -> tuple[_Skips, int] | None:
    batches: Any = getattr(data, "batch_sampler", None)
    if callable(getattr(batches, "skip", None)):
        return batches, 1
    sampler: Any = getattr(data, "sampler", None)
    batch_size = getattr(data, "batch_size", None)
    return (sampler, batch_size) if callable(getattr(sampler, "skip", None)) and isinstance(batch_size, int) else None


def rest_of(iterator: Iterator[object]) -> Iterator[object]:
    """The items that `iterator` still has."""
    while True:  # not `yield from`: that calls iter() once more
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch
