"""Run a function on one rank or on all, and give its result, or its failure, to every rank."""

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from dengine.comm.collectives import gather_objects, share_object
from dengine.control.failure import repr_of
from dengine.errors import RemoteRankError
from dengine.launch.world import World, world_for

__all__ = ["Failure", "from_rank_zero", "on_all_ranks"]

T = TypeVar("T")

# The error for every rank. Its class and text are sent, since not every exception can be pickled.
Failure: TypeAlias = tuple[type[Exception], str]


def from_rank_zero(action: Callable[[], T], purpose: str, failure: Callable[[Exception], Failure] | None = None) -> T:
    """Run `action` on rank 0 and give its result, or its failure, to every rank.

    With `failure`, every rank raises the error that this function makes of the exception.

    Collective: call on all ranks. The result must pickle. Cost: one object broadcast.

    Raises:
        RemoteRankError: on the other ranks, if `action` failed on rank 0: "Rank 0 could not {purpose}". Rank 0 raises
            the error itself.
    """
    here = world_for(f"To {purpose} on rank 0 for all ranks")
    return _shared(action, purpose, failure, here, [0])[0]


def on_all_ranks(
    action: Callable[[], T], purpose: str, failure: Callable[[Exception], Failure] | None = None
) -> list[T]:
    """Run `action` on every rank and give all results to every rank.

    If it fails on any rank, all raise as in `from_rank_zero`, and name the first rank that failed.

    Collective: call on all ranks. The results must pickle. Cost: one gather of objects.
    """
    here = world_for(f"To {purpose} on all ranks")
    return _shared(action, purpose, failure, here, range(here.size))


def _shared(
    action: Callable[[], T],
    purpose: str,
    failure: Callable[[Exception], Failure] | None,
    here: World,
    ranks: Sequence[int],
) -> list[T]:
    """The results of `action` on each of `ranks`: all ranks of `here`, or rank 0 alone."""
    result: T | None = None
    error: Exception | None = None
    failed: tuple[type[Exception] | None, str] | None = None
    if here.rank in ranks:
        try:
            result = action()
        except Exception as caught:
            error = caught
            failed = (None, repr_of(error)) if failure is None else failure(error)
    try:
        outcomes = [share_object((result, failed), here)] if len(ranks) < 2 else gather_objects((result, failed), here)
        for rank, (_, failed) in zip(ranks, outcomes, strict=True):
            if failed is None:
                continue
            kind, text = failed
            if kind is not None:
                raise kind(text) from error
            if error is not None:
                raise error
            raise RemoteRankError(f"Rank {rank} could not {purpose}, so this rank stops too: {text}", rank=rank)
    finally:
        del error  # which holds this frame
    return [value for value, _ in outcomes]  # type: ignore[misc]
