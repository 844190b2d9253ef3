"""Functions that only rank 0 runs. They may call no collective: the other ranks would never join it."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dengine.launch.world import rank_zero_scope, world

__all__ = ["rank_zero_only"]

T = TypeVar("T")
P = ParamSpec("P")


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
        rank_zero_scope.names.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            rank_zero_scope.names.pop()

    return called
