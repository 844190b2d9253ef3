"""The three kinds of metric that hold states, alike to the reduction: declared, computed per rank, torchmetrics'."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dengine.distributed import world
from dengine.errors import NotComputableError
from dengine.metrics.distributed import DistributedMetric
from dengine.metrics.metric import Expression, Metric
from dengine.metrics.reduction import Item
from dengine.metrics.transform import is_torchmetrics
from dengine.types import MetricValue

__all__ = ["Leaf", "leaf_of"]


class Leaf(Protocol):
    """A metric's states on their way out, and the metric that comes back from the reduced ones."""

    def items(self) -> list[Item]: ...

    def reduced(self, values: Sequence[torch.Tensor]) -> Any: ...


def leaf_of(metric: Any, label: str, *, is_alone: bool) -> Leaf:
    """The leaf of `metric`, known to the user by `label`. `is_alone`: there is one rank, so nothing is averaged."""
    assert not isinstance(metric, Expression)
    if isinstance(metric, DistributedMetric):
        weight = 1.0 if is_alone else metric.weight
        return ValueLeaf(metric, label, metric.reduce_op, weight, metric.num_updates > 0)
    if isinstance(metric, Metric) and metric.states:
        return DeclaredLeaf(metric, label)
    if is_torchmetrics(metric):
        from dengine.metrics.torchmetrics import TorchmetricsLeaf

        return TorchmetricsLeaf(metric, label, is_alone=is_alone)
    num_updates = getattr(metric, "num_updates", 1)
    if not is_alone:
        _warn_once(metric, label)
    weight = 1.0 if is_alone else float(num_updates)
    return ValueLeaf(metric, label, "mean", weight, num_updates > 0)


class DeclaredLeaf:
    """A metric with declared states."""

    def __init__(self, metric: Metric, label: str) -> None:
        self._metric = metric
        self._label = label

    def items(self) -> list[Item]:
        self._metric.settle()
        is_seen = self._metric.num_updates > 0
        return [
            Item(self._label, name, spec.reduce, _tensor(getattr(self._metric, name), self._label, name), is_seen)
            for name, spec in self._metric.states.items()
        ]

    def reduced(self, values: Sequence[torch.Tensor]) -> Metric:
        return self._metric.with_states(dict(zip(self._metric.states, values, strict=True)))


class ValueLeaf:
    """A metric that is computed per rank, its values then reduced: a mean weighted by what each rank saw, or an op."""

    def __init__(self, metric: Any, label: str, op: str, weight: float, is_seen: bool) -> None:
        self._metric = metric
        self._label = label
        self._op = op
        self._weight = weight
        self._is_seen = is_seen

    def items(self) -> list[Item]:
        value = self._value()
        weight = self._weight if value is not None else 0.0
        neutral = {"mean": 0.0, "sum": 0.0, "max": -torch.inf, "min": torch.inf}[self._op]
        shown = torch.as_tensor(neutral if value is None else value, dtype=torch.float64)
        is_seen = value is not None
        op: Any = "sum" if self._op == "mean" else self._op
        return [
            Item(self._label, "value", op, shown * weight if self._op == "mean" else shown, is_seen),
            Item(self._label, "weight", "sum", torch.tensor(weight, dtype=torch.float64), is_seen),
        ]

    def reduced(self, values: Sequence[torch.Tensor]) -> "_Computed":
        value, weight = values
        if weight == 0:
            return _Computed(None)
        return _Computed(value / weight if self._op == "mean" else value)

    def _value(self) -> MetricValue | None:
        if not self._is_seen:
            return None
        try:
            value: MetricValue = self._metric.compute()
        except NotComputableError:  # updated, but with empty batches only
            return None
        return value.detach() if isinstance(value, torch.Tensor) else value


class _Computed:
    """A value that is there already, in the place of a metric that would compute it."""

    def __init__(self, value: torch.Tensor | None) -> None:
        self._value = value

    def compute(self) -> torch.Tensor:
        if self._value is None:
            raise NotComputableError("it was not updated on any rank")
        return self._value


def _tensor(value: Any, label: str, name: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, list):
        parts = [_row(torch.as_tensor(part).detach()) for part in value]
        return torch.cat(parts) if parts else torch.empty(0)
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    raise TypeError(f"State {name!r} of metric {label} must be a number, a tensor or a list, but is {value!r}.")


def _row(part: torch.Tensor) -> torch.Tensor:
    return part if part.ndim else part.reshape(1)


def _warn_once(metric: Any, label: str) -> None:
    if world().rank != 0 or getattr(type(metric), "_dengine_has_warned", False):
        return
    type(metric)._dengine_has_warned = True
    warnings.warn(
        f"Metric {label} declares no states, so it is computed per rank and averaged by the number of its updates, "
        "which is not exact for every metric. Declare its states with add_state(name, default, reduce=...) to have "
        "it computed over all samples.",
        UserWarning,
        stacklevel=2,
    )
