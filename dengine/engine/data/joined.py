"""Let ranks without a batch take part: the common length of a pass, and placeholder batches."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dengine.comm.consistency import Compared, refuse_differences, text_digest
from dengine.distributed import all_reduce, broadcast_object, world

__all__ = ["Absent", "Pass", "agreed_pass", "with_placeholders", "with_sent_spare"]


@dataclass(frozen=True)
class Absent:
    """A placeholder batch, which a rank of a joined engine gets for a batch of None, or after its own data have ended.

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


def agreed_pass(own: int | None, drawn: str = "") -> Pass:
    """The pass of all ranks. Collective: one small all-reduce.

    Args:
        own: the length of this rank's pass, if known.
        drawn: what a sampler draws in it, in words, which must be the same on all ranks.

    Raises: ConsistencyError: on every rank, naming two that have drawn differently.
    """
    here = world()
    digest = text_digest([drawn])
    mine = {
        "longest": -1 if own is None else own,
        "shortest": 1 if own is None else -own,
        "source": -here.rank if own else -here.size,
        "drawn": digest,
        "drawn, least": -digest,
    }
    found = all_reduce(mine, "max", name="the length of a pass over the data")
    if found["drawn"] != -found["drawn, least"]:
        advice = "A sampler must give the same indices on every rank after set_epoch(epoch), whatever the rank."
        refuse_differences([Compared("The samples of this epoch", [drawn], advice)])
    longest, shortest = found["longest"], -found["shortest"]
    if shortest < 0 or longest < 0:
        return Pass()
    return Pass(longest, longest == shortest, shortest == 0, -found["source"])


def with_placeholders(
    batches: Iterator[object],
    num_absent: int,
    any_batch: Callable[[], object],
    note_ahead: Callable[[bool], None],
    spare: object = None,
) -> Iterator[object]:
    """`batches`, with a placeholder for each that is None, then `num_absent` more placeholders.

    They hold the batch before; at the beginning `spare`, else the next batch, else `any_batch()`. `note_ahead` is told
    whether batches were drawn that are not given yet.
    """
    for batch in batches:
        if batch is not None:
            spare = batch
            yield batch
        elif spare is not None:
            yield Absent(spare)
        else:
            num_none, ahead = _until_first(batches)
            spare = any_batch() if ahead is None else ahead
            note_ahead(num_none > 0 or ahead is not None)
            for _ in range(1 + num_none):
                yield Absent(spare)
            note_ahead(False)
            if ahead is not None:
                yield ahead
    if num_absent:
        # A run that is resumed after the end of its own data has drawn none of it.
        spare = any_batch() if spare is None else spare
        for _ in range(num_absent):
            yield Absent(spare)


def _until_first(batches: Iterator[object]) -> tuple[int, object]:
    """How many of `batches` are None before the first that is not, and that one; None if there is none."""
    num_none = 0
    for batch in batches:
        if batch is not None:
            return num_none, batch
        num_none += 1
    return num_none, None


def with_sent_spare(
    batches: Iterator[object],
    own: int,
    num_absent: int,
    source: int,
    any_batch: Callable[[], object],
    note_ahead: Callable[[bool], None],
) -> Iterator[object]:
    """`batches`, then `num_absent` placeholders with a batch of rank `source`, since some rank has no batch.

    Collective: one object broadcast.

    Args:
        own: the number of batches of this rank in a pass.
    """
    num_none, first = _until_first(batches) if own else (0, None)
    mine = any_batch() if own and first is None else first
    spare = broadcast_object(mine, source)
    head = _with_note([None] * num_none, note_ahead) if num_none else iter(())
    first_of_all = [] if first is None else [first]
    own_batches = with_placeholders(chain(head, first_of_all, batches), 0, any_batch, note_ahead, spare)
    return chain(own_batches, (Absent(spare) for _ in range(num_absent)))


def _with_note(drawn: Iterable[object], note_ahead: Callable[[bool], None]) -> Iterator[object]:
    note_ahead(True)
    yield from drawn
    note_ahead(False)
