"""All states of all metrics of an engine, reduced over the ranks in one all-reduce.

They are packed into one buffer (packing.py). "cat" states follow in one padded gather, once their lengths are known,
and minima and maxima in one more all-reduce. The ranks agree on the schemas before (schema.py): once per engine, and
again if the states of a rank have changed (a number of classes inferred from the first batch), which it reports by a
flag in the header of the buffer.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from dengine.comm.collectives import sum_tensor
from dengine.comm.consistency import gather_distinct
from dengine.errors import MetricStateError
from dengine.launch.world import World
from dengine.metrics.core.computed import Form
from dengine.metrics.reduction.packing import HEADER, Plan, of_one_rank, packed, unpacked
from dengine.metrics.reduction.schema import Schema, State, fitted, merged, schemas_of

__all__ = ["Reduction", "State"]


class Reduction:
    """Reduces the states of one set of metrics, and keeps the schemas that the ranks have agreed on."""

    def __init__(self) -> None:
        self._schemas: tuple[Schema, ...] | None = None
        self._plan = Plan.of(())

    def agree(self, states: Sequence[State], here: World, failure: str | None = None) -> None:
        """Compare the states of the ranks of `here`: they need the same metrics, order and shapes.

        Collective. Cost: a gather of one number; one more, of the different states, if something differs.

        Raises:
            MetricStateError: on every rank; the message names the rank and the metric that differ, or a rank that
                failed.
        """
        mine = schemas_of(states)
        self._schemas = None
        of_ranks = gather_distinct((mine, failure), here)
        _raise_failures([rank_failure for _, rank_failure in of_ranks])
        self._take(merged([schemas for schemas, _ in of_ranks]))

    def take(self, states: Sequence[State]) -> None:
        """Keep the schemas of `states`, which are the same on all ranks, unless there are schemas already."""
        if self._schemas is None:
            self._take(schemas_of(states))

    def _take(self, schemas: tuple[Schema, ...]) -> None:
        self._schemas, self._plan = schemas, Plan.of(schemas)

    @property
    def is_agreed(self) -> bool:
        return self._schemas is not None

    def forms(self) -> list[Form]:
        """The form of each state on which the ranks have agreed: see `State.form`."""
        return [schema.form for schema in self._schemas or ()]

    def reduce(self, states: Sequence[State], here: World, failure: str | None = None) -> list[torch.Tensor]:
        """The states reduced over `here`, in the order of `states`, on the CPU; "cat" states stay on the device.

        `failure` tells the others that this rank could not give its states. The states are not changed.

        Collective. Cost: one all-reduce; one more for minima and maxima, one gather for "cat"
        states; one copy to the host.
        Raises: MetricStateError, as `agree` does.
        """
        if not states and failure is None:
            return []
        if self._schemas is None or any(schema.is_open for schema in self._schemas):
            self.agree(states, here, failure)
        for _ in range(2):
            assert self._schemas is not None
            mine = fitted(states, self._schemas)
            if mine is not None and failure is None and here.size == 1 and here.device.type == "cpu":
                return of_one_rank(mine, self._schemas, here)  # on a GPU one buffer is one wait for all states
            sent = packed(mine, self._schemas, self._plan, here, failure)
            host = sum_tensor(sent, here).cpu()
            if not host[:HEADER].any():
                return unpacked(host, mine or [], self._schemas, self._plan, here)
            self.agree(states, here, failure)
        raise MetricStateError("The metrics' states changed while they were being reduced.")  # pragma: no cover

    def fail(self, failure: str, here: World) -> None:
        """Tell the other ranks, which wait in the reduction, that this rank cannot give its states. Collective."""
        with suppress(MetricStateError):
            self.reduce((), here, failure)


def _raise_failures(failures: list[str | None]) -> None:
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        raise MetricStateError(
            "A metric could not be computed: " + "; ".join(f"on rank {rank}: {failure}" for rank, failure in failed)
        )
