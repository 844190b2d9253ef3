"""Let ranks with fewer batches take part to the end: the common length of a pass, and placeholder batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from dengine.distributed import all_reduce, broadcast_object, world

__all__ = ["Absent", "Pass", "agreed_pass", "with_own_spare", "with_sent_spare"]


@dataclass(frozen=True)
class Absent:
    """A placeholder batch, which a rank of a joined engine gets after its own data have ended.

    `spare` is a batch that was used before, or another rank's: the step runs on it, but must give it no weight. Metrics
    are not updated with the output of that step.
    """

    spare: Any


@dataclass(frozen=True)
class Pass:
    """One pass over the data, as all ranks have agreed. `length` is None if it is not joined."""

    length: int | None = None
    is_even: bool = True
    is_empty_somewhere: bool = False
    source: int = 0  # the first rank that has a batch


def agreed_pass(own: int | None) -> Pass:
    """The pass of all ranks. `own` is the length of this rank's pass, if known. Collective: one small all-reduce."""
    here = world()
    mine = {
        "longest": -1 if own is None else own,
        "shortest": 1 if own is None else -own,
        "source": -here.rank if own else -here.size,
    }
    found = all_reduce(mine, "max", name="the length of a pass over the data")
    longest, shortest = found["longest"], -found["shortest"]
    if shortest < 0 or longest < 0:
        return Pass()
    return Pass(longest, longest == shortest, shortest == 0, -found["source"])


def with_own_spare(batches: Iterator[object], num_absent: int, any_batch: Callable[[], object]) -> Iterator[object]:
    """`batches`, then `num_absent` placeholders with the last batch, or with `any_batch()` if there was none."""
    last = None
    for last in batches:
        yield last
    if num_absent:
        # A run that is resumed after the end of its own data has drawn none of it.
        spare = any_batch() if last is None else last
        for _ in range(num_absent):
            yield Absent(spare)


def with_sent_spare(
    batches: Iterator[object], own: int, num_absent: int, source: int, any_batch: Callable[[], object]
) -> Iterator[object]:
    """`batches`, then `num_absent` placeholders with a batch of rank `source`, since some rank has no batch.

    Collective: one object broadcast.

    Args:
        own: the number of batches of this rank in a pass.
    """
    first = list(islice(batches, 1))
    spare = broadcast_object((first or [any_batch()])[0] if own else None, source)
    return chain(first, batches, (Absent(spare) for _ in range(num_absent)))
