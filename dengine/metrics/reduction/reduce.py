"""All states of all metrics of an engine, reduced over the ranks in one all-reduce.

They are laid into one buffer (packing.py). States to be joined ("cat") follow in one padded gather, their lengths being
known by then; minima and maxima in one more all-reduce. What lies where is agreed upon before (schema.py): once per
engine, and again where a rank finds that its states have changed (a number of classes inferred from the first batch),
which it says in a lane of the buffer itself.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from dengine.comm.collectives import all_gather_object, sum_tensor
from dengine.errors import MetricStateError
from dengine.launch.world import World
from dengine.metrics.reduction.packing import HEADER, Plan, packed, unpacked
from dengine.metrics.reduction.schema import Entry, Item, entry_of, fitted, merged

__all__ = ["Item", "Reduction"]


class Reduction:
    """Reduces the states of one set of metrics, remembering what the ranks have agreed upon."""

    def __init__(self) -> None:
        self._layout: tuple[Entry, ...] | None = None
        self._plan = Plan.of(())

    def agree(self, items: Sequence[Item], failure: str | None = None) -> None:
        """Have the ranks compare their states: the same metrics, in the same order, of the same shapes.

        Collective. Cost: one object gather.

        Raises:
            MetricStateError: on every rank, naming the rank and the metric that differ, or a rank that failed.
        """
        mine = tuple(entry_of(item) for item in items)
        self._layout = None
        told = all_gather_object((mine, failure))
        _raise_failures([rank_failure for _, rank_failure in told])
        self._take(merged([entries for entries, _ in told]))

    def take(self, items: Sequence[Item]) -> None:
        """Take over a layout that all ranks are known to share; none where there was one already."""
        if self._layout is None:
            self._take(tuple(map(entry_of, items)))

    def _take(self, layout: tuple[Entry, ...]) -> None:
        self._layout, self._plan = layout, Plan.of(layout)

    @property
    def is_agreed(self) -> bool:
        return self._layout is not None

    def forms(self) -> list[tuple[Any, ...]]:
        """What the ranks have agreed upon of each state, besides its shape: see `Item.form`."""
        return [entry.form for entry in self._layout or ()]

    def reduce(self, items: Sequence[Item], here: World, failure: str | None = None) -> list[torch.Tensor]:
        """The states reduced over `here`, in the order of `items`, on the CPU; "cat" states stay on the device.

        `failure` tells the others that this rank could not give its states. The items themselves are left alone.

        Collective. Cost: one all-reduce; one more where there are minima or maxima, one gather where there are "cat"
        states; one copy to the host.
        Raises: MetricStateError, as `agree` does.
        """
        if not items and failure is None:
            return []
        is_alone = here.size == 1
        if not is_alone and (self._layout is None or any(entry.is_open for entry in self._layout)):
            self.agree(items, failure)
        for _ in range(2):
            mine = None if self._layout is None else fitted(items, self._layout)
            if mine is None and is_alone:  # nobody to agree with
                self._take(tuple(entry_of(item) for item in items))
                continue
            assert self._layout is not None
            sent = packed(mine, self._layout, self._plan, here, failure)
            host = sum_tensor(sent, here).cpu()
            if is_alone or not host[:HEADER].any():
                return unpacked(host, mine or [], self._layout, self._plan, here)
            self.agree(items, failure)
        raise MetricStateError("The metrics' states changed while they were being reduced.")  # pragma: no cover

    def fail(self, failure: str, here: World) -> None:
        """Let the others know, who wait in the reduction, that this rank cannot give its states. Collective."""
        with suppress(MetricStateError):
            self.reduce((), here, failure)


def _raise_failures(failures: list[str | None]) -> None:
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        raise MetricStateError(
            "A metric could not be computed: " + "; ".join(f"on rank {rank}: {failure}" for rank, failure in failed)
        )
