"""Decide whether data without a batch are an error, and raise it."""

from collections.abc import Iterable
from typing import NoReturn

from torch.utils.data import IterableDataset

from dengine.data.alike import empties_together
from dengine.engine.data.description import length_of
from dengine.naming import type_name

__all__ = ["Emptiness"]

# What a rank knows of its batches before a run. The largest of all ranks holds for all together. The last: it has some,
# but nobody made sure that they are no other rank's.
NO_BATCH, PERHAPS_BATCHES, SOME_BATCHES, DOUBTFUL_BATCHES = 0, 1, 2, 3


class Emptiness:
    """Keeps whether `data` have a batch, as far as is known.

    They must have one, unless they are one shard of several (`may_be_empty`); then at least one rank must.
    """

    def __init__(self, data: Iterable[object], *, may_be_empty: bool) -> None:
        self.may_be_empty = may_be_empty
        self.is_unsure = False  # whether any rank has a batch
        self.is_doubtful = False  # whether the first batch should be compared with those of other ranks
        self._data = data

    def expected(self, *, is_in_doubt: bool) -> int:
        """The knowledge of this rank's batches before the run: one of the numbers above."""
        own = length_of(self._data)
        if own is None or isinstance(getattr(self._data, "dataset", None), IterableDataset):
            return PERHAPS_BATCHES  # a stream may say how long it is, and be empty all the same
        return (DOUBTFUL_BATCHES if is_in_doubt else SOME_BATCHES) if own else NO_BATCH

    def take(self, expected: int) -> None:
        """Take over the largest `expected` of all ranks.

        Raises: ValueError, on every rank: no rank has a batch.
        """
        if expected == NO_BATCH:
            self.refuse("no batch on any rank" if self.may_be_empty else "no batch")
        self.is_unsure = self.may_be_empty and expected == PERHAPS_BATCHES
        self.is_doubtful = self.may_be_empty and expected == DOUBTFUL_BATCHES

    def refuse_no_batch(self) -> None:
        """Refuse data without a batch, if they must have one.

        Raises: ValueError: they must have one.
        """
        if not self.may_be_empty:
            self.refuse("no batch")
        if empties_together(self._data):
            self.refuse("no batch on any rank")

    def refuse_empty_epoch(self, epoch: int, iterations: int) -> NoReturn:
        """Refuse an `epoch` in which no rank has a batch.

        Raises: ValueError: on several ranks. RuntimeError: in a world of one, which had batches before.
        """
        if iterations == 0:
            self.refuse("no batch on any rank" if self.may_be_empty else "no batch")
        text = f"in epoch {epoch} after {iterations} iterations"
        again = f"iterating over this {type_name(self._data)} again must start from its beginning"
        if self.may_be_empty:
            raise ValueError(f"The data gave no batch on any rank {text}: {again}, and give some batches.")
        raise RuntimeError(f"The data gave no batch {text}: {again}.")

    def refuse(self, nothing: str) -> NoReturn:
        """Raise that the data gave `nothing`, and what to check. Raises: ValueError: always."""
        raise ValueError(
            f"The data ({type_name(self._data)}) gave {nothing}: there is nothing to run over. "
            "Check the data set's size, and drop_last with a batch size above it."
        )
