"""Functions that only rank 0 runs. They may call no collective: the other ranks would never join it."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dengine.errors import RankZeroCollectiveError
from dengine.launch.world import world

__all__ = ["rank_zero_only", "refuse_on_rank_zero_alone"]

T = TypeVar("T")
P = ParamSpec("P")


class _Scope(threading.local):
    """The names of the rank-0-only functions that this thread is in."""

    def __init__(self) -> None:
        self.names: list[str] = []


_rank_zero_scope = _Scope()


def rank_zero_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """`function` on rank 0; on every other rank a call does nothing and gives None.

    A collective of this package called inside it raises `RankZeroCollectiveError` at once, in a run of one process
    too, so that the mistake shows before the script runs on several ranks. The arguments of a call are computed on
    every rank, as always in Python.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T | None:
        if world().rank != 0:
            return None
        _rank_zero_scope.names.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            _rank_zero_scope.names.pop()

    return called


def refuse_on_rank_zero_alone(collective: str) -> None:
    """Raise `RankZeroCollectiveError` inside a function that only rank 0 runs."""
    if _rank_zero_scope.names:
        raise RankZeroCollectiveError(
            f"{collective} is a collective, but {_rank_zero_scope.names[-1]} runs on rank 0 only, so the other ranks "
            "would never join it. Call it from a handler that runs on every rank; an evaluation that is rank 0's own "
            "takes Engine(..., distributed=False)."
        )
