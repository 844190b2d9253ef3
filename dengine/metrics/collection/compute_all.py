"""Compute metrics that the user updates by hand, together."""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from dengine.comm.consistency import text_digest
from dengine.control.plane import plane
from dengine.errors import MetricStateError
from dengine.launch.world import World
from dengine.metrics.collection.metric_set import AnyMetric, MetricSet
from dengine.metrics.core.computed import Form
from dengine.metrics.reduction.reduce import Reduction, State
from dengine.types import MetricValue

__all__ = ["compute_all"]

_BITS = 20  # of a digest: its square, summed up over a million ranks, has less than 63


def compute_all(metrics: Mapping[str, AnyMetric]) -> dict[str, MetricValue]:
    """The values of `metrics` over the samples of all ranks, as an engine computes them at the end of an epoch.

    Collective: call on all ranks with the same names. Cost: as `Engine.add_metric`; the first time for these names, or
    if the states of a rank have another shape than before, also one object gather.

    Raises:
        NotComputableError: no sample was seen; the message names the metric. MetricStateError: the ranks' metrics
            differ.
    """
    together = MetricSet(counts_once=False, reduction=_known(tuple(metrics)))
    together.add_all(metrics)
    return together.compute(distributed=True)


class _NamedReduction(Reduction):
    """A reduction for metrics of some names, in which the ranks also compare the names.

    A run of an engine compares them when it starts. Here a rank may call `compute_all` with other ones than before, of
    states that fit those of the other ranks by chance.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        digest = text_digest(names) % 2**_BITS
        self._digest = torch.tensor([digest, digest**2])  # with the squares, sums are equal for equal digests only

    def forms(self) -> list[Form]:
        return super().forms()[:-1]

    def reduce(self, states: Sequence[State], here: World, failure: str | None = None) -> list[torch.Tensor]:
        if not states and failure is None:
            return []
        named = State("the names of the metrics", "digest", "sum", self._digest)
        *reduced, total = super().reduce([*states, named], here, failure)
        if not torch.equal(total, len(here.all_counting_ranks) * self._digest):
            raise MetricStateError(
                f"compute_all() got {', '.join(self._names)} on rank {here.rank}, but other metrics on another rank: "
                "give it the same names in the same order on every rank."
            )
        return reduced


_reductions: WeakKeyDictionary[ProcessGroup, dict[tuple[str, ...], _NamedReduction]] = WeakKeyDictionary()


def _known(names: tuple[str, ...]) -> Reduction:
    """The reduction that was used for these names before, by the ranks of the present group."""
    if (group := plane().group) is None:
        return Reduction()
    known = _reductions.setdefault(group, {})
    if names not in known:
        known[names] = _NamedReduction(names)
    return known[names]
