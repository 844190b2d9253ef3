"""States of which each rank has its own on purpose, and which are all kept: a replay buffer, statistics of a rank."""

from typing import Any

from torch import nn

from dengine.checkpoint.formats.sharded.tree import all_tensors
from dengine.distributed import unwrap_model, world
from dengine.dtensor import any_dtensor
from dengine.errors import CheckpointError
from dengine.naming import shown
from dengine.types import Stateful, is_stateful, with_per_rank_state

__all__ = ["PerRank", "is_of_ranks"]

_NUM_RANKS = "dengine.num_ranks"


class PerRank:
    """Declares that each rank has its own state of `value`, and that a checkpoint is to keep them all.

    A checkpoint of several ranks with it is a folder, in which each rank's is in that rank's file: no rank reads or
    holds those of others. It loads on as many ranks as have saved it; on others it is refused, or left out with
    `load(..., partial=True)`. Without it, tensors that differ between ranks in an object of your own fail the save.

    Args:
        value: an object with `state_dict()` and `load_state_dict()`, also a model or an optimizer of this rank alone.

    Raises:
        TypeError: `value` is no such object, or an engine, of which a checkpoint has each rank's part anyway.

    Example:
        >>> import tempfile, torch
        >>> from dengine.checkpoint import load, save
        >>> path, buffer = f"{tempfile.mkdtemp()}/replay_1", torch.nn.BatchNorm1d(2)
        >>> save(path, {"replay": PerRank(buffer)})  # on every rank, and so is the next line
        >>> load(path, {"replay": PerRank(buffer)})
    """

    def __init__(self, value: Stateful) -> None:
        if isinstance(value, type) or not is_stateful(value) or isinstance(value, PerRank):
            raise TypeError(f"PerRank() takes an object with state_dict() and load_state_dict(), but got {value!r}.")
        if with_per_rank_state({"": value}):
            raise TypeError(f"A checkpoint keeps what each rank has of {value!r} without PerRank(): give it as it is.")
        self._value = unwrap_model(value) if isinstance(value, nn.Module) else value

    def __repr__(self) -> str:
        return shown(self, self._value)

    def state_dict(self) -> dict[Any, Any]:
        """
        Raises:
            CheckpointError: it is spread over ranks, so that no rank has a whole one of its own.
        """
        state = self._value.state_dict()
        if any_dtensor(all_tensors(state)):
            raise CheckpointError(
                "PerRank() is for what a rank has alone, but a tensor in it is sharded over ranks (a DTensor): give "
                "it without PerRank(), and every rank's part is kept."
            )
        return {_NUM_RANKS: world().size, world().rank: state}

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """
        Raises:
            ValueError: it was saved by another number of ranks, or without `PerRank`.
        """
        if (reason := self.misfit(state_dict)) is not None:
            raise ValueError(reason)
        self._value.load_state_dict(state_dict[world().rank])

    def misfit(self, state: object) -> str | None:
        """The reason why `state` is not for this rank; None if it is."""
        here = world()
        if not isinstance(state, dict) or not is_of_ranks(state):
            return "it was saved without PerRank(), the same for all ranks: load it into the object itself."
        if state[_NUM_RANKS] != here.size or here.rank not in state:
            return (
                f"each of {state[_NUM_RANKS]} ranks has saved a state of its own (PerRank), and there are "
                f"{here.size} now: load on as many, or leave it out, as load(..., partial=True) does."
            )
        return None


def is_of_ranks(state: object) -> bool:
    """Whether `state` is what `PerRank.state_dict()` gives, of this rank or of others."""
    return (
        isinstance(state, dict) and _NUM_RANKS in state and all(type(key) is int for key in state.keys() - {_NUM_RANKS})
    )
