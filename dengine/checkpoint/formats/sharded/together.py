"""What each rank does of a common work on a folder, and the failure of one that all raise."""

from collections.abc import Callable
from typing import TypeVar

from dengine.checkpoint.formats.sharded.files import InvalidDeclarationError
from dengine.comm.outcome import Failure, from_rank_zero, on_all_ranks
from dengine.distributed import world
from dengine.errors import CheckpointError, CorruptCheckpointError

__all__ = ["on_rank_zero", "shared_by_all"]

T = TypeVar("T")

# What keeps its class on the way to the other ranks; everything else arrives as a CheckpointError.
_KEPT_CLASSES: tuple[type[Exception], ...] = (
    InvalidDeclarationError,
    CorruptCheckpointError,
    FileNotFoundError,
    TypeError,
    ValueError,
)


def shared_by_all(action: Callable[[], T], purpose: str) -> list[T]:
    """Every rank's result of `action`. Collective: one gather of objects.

    Raises:
        CheckpointError, or what `_KEPT_CLASSES` has of the failure: on all ranks, if it fails on one.
    """
    return on_all_ranks(action, purpose, lambda error: _failure(error, purpose))


def _failure(error: Exception, purpose: str) -> Failure:
    """As every rank can raise it."""
    start = f"Rank {world().rank} could not {purpose}: "
    for kind in _KEPT_CLASSES:
        if isinstance(error, kind):
            return kind, f"{start}{error}"
    return CheckpointError, f"{start}{type(error).__qualname__}: {error}"


def on_rank_zero(action: Callable[[], T], purpose: str) -> T:
    return from_rank_zero(
        action,
        purpose,
        lambda error: (CheckpointError, f"Rank 0 could not {purpose}: {type(error).__qualname__}: {error}"),
    )
