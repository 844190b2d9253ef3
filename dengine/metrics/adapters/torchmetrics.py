"""Adapt metrics of torchmetrics to the packed reduction, by the states that they declare.

Whole numbers are summed. Floating-point states have a slot for each rank, and are combined by the metric's own
reduction function, in the order and the precision of torchmetrics, so that results are equal to the last bit.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_sum

from dengine.comm.collectives import all_gather_object
from dengine.launch.world import world
from dengine.metrics.core.computed import Form
from dengine.metrics.core.metric import StateOp
from dengine.metrics.reduction.reduce import State

__all__ = ["TorchmetricsAdapter"]


class TorchmetricsAdapter:
    """Adapts a metric of torchmetrics, or a collection of them with its compute groups."""

    def __init__(self, metric: torchmetrics.Metric | torchmetrics.MetricCollection, label: str) -> None:
        self._metric = metric
        self._label = label
        self._states: list[_Declared] = []
        self._loose_lists: list[_Declared] = []

    def states(self) -> list[State]:
        states = list(_states(self._metric))
        self._states = [state for state in states if not state.is_loose_list]
        self._loose_lists = [state for state in states if state.is_loose_list]
        return [
            State(self._label, state.name, state.op, state.tensor(), state.owner._update_count > 0)
            for state in self._states
        ]

    def reduced(self, values: Sequence[torch.Tensor], forms: Sequence[Form] = ()) -> Any:
        """A copy that holds the reduced states and takes part in no collective of torchmetrics' own.

        Collective only for lists without a reduction function: one object gather each.
        """
        memo: dict[int, Any] = {
            id(state.value): state.synchronized(value) for state, value in zip(self._states, values, strict=True)
        }
        for state in self._loose_lists:
            mine = state.value if world().counts_samples else []
            memo[id(state.value)] = [part for parts in all_gather_object(mine) for part in parts]
        # deepcopy looks into its memo first, so the copy gets the reduced states instead of copies of the local ones.
        return self._copy(memo)

    def own(self) -> Any:
        return self._copy({})

    def _copy(self, memo: dict[int, Any]) -> Any:
        copied = deepcopy(self._metric, memo)
        for metric in copied.modules():
            if isinstance(metric, torchmetrics.Metric):
                metric._computed = None
                metric._to_sync = False
                metric.sync_on_compute = False
                metric._update_count = max(metric._update_count, 1)
        return copied


@dataclass(frozen=True)
class _Declared:
    name: str
    owner: Any
    value: Any
    function: Any  # torchmetrics' reduction: a function of the ranks' stacked values, or None

    @property
    def is_loose_list(self) -> bool:
        return isinstance(self.value, list) and self.function is None

    @property
    def op(self) -> StateOp:
        if isinstance(self.value, list):
            return "cat"
        is_whole = not (self.value.is_floating_point() or self.value.is_complex())
        return "sum" if is_whole and self.function is dim_zero_sum else "gather"

    def tensor(self) -> torch.Tensor:
        if isinstance(self.value, list):
            return dim_zero_cat(self.value) if self.value else torch.empty(0)
        return self.value  # type: ignore[no-any-return]

    def synchronized(self, reduced: torch.Tensor) -> torch.Tensor:
        """The state as torchmetrics would have synchronised it."""
        if self.op != "gather":
            return reduced.to(self.owner.device)
        stacked = reduced.to(self.value.device)
        return stacked if self.function is None else self.function(stacked)


def _states(metric: torchmetrics.Metric | torchmetrics.MetricCollection) -> Iterator[_Declared]:
    """The states of a metric and of the metrics inside it.

    Each member of a compute group gives the states, though they are shared: groups are found at the first update, so a
    rank that saw nothing knows of none, and all ranks must send the same.
    """
    if isinstance(metric, torchmetrics.MetricCollection):
        metric.items(copy_state=False)  # lets the members of a compute group refer to their leader's states
    for path, module in metric.named_modules():
        for name, function in getattr(module, "_reductions", {}).items():
            yield _Declared(f"{path}.{name}".lstrip("."), module, getattr(module, name), function)
