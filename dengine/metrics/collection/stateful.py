"""Adapters that give all kinds of metrics one interface for the reduction."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dengine.errors import NotComputableError
from dengine.launch.world import World, world
from dengine.metrics.builtin.distributed import DistributedMetric
from dengine.metrics.collection.merging import MergingAdapter
from dengine.metrics.core.computed import Computed, Form, checked, from_flat, laid_out
from dengine.metrics.core.kinds import AnyMetric, is_mergeable
from dengine.metrics.core.metric import Metric
from dengine.metrics.core.transform import is_torchmetrics
from dengine.metrics.core.updates import Seen
from dengine.metrics.reduction.reduce import State

__all__ = ["Adapter", "adapter_of", "knows_what_it_saw"]


class Adapter(Protocol):
    """Gives the states of a metric, and makes a metric from the reduced states."""

    def states(self) -> list[State]: ...

    def reduced(self, values: Sequence[torch.Tensor], forms: Sequence[Form]) -> Any: ...


class UndeclaredAdapter(Adapter, Protocol):
    """Of a metric whose states are made only for the other ranks."""

    def own(self) -> Any:
        """The metric with what this rank alone has seen."""


class LoneAdapter:
    """The adapter of an undeclared metric in a world of one, where no state has to travel."""

    def __init__(self, adapter: UndeclaredAdapter) -> None:
        self._adapter = adapter

    def states(self) -> list[State]:
        return []

    def reduced(self, values: Sequence[torch.Tensor], forms: Sequence[Form]) -> Any:
        return self._adapter.own()


def adapter_of(metric: AnyMetric, label: str, here: World, *, seen: Seen | None) -> Adapter:
    """The adapter of `metric`, which messages call `label`.

    Args:
        here: the ranks over which it is reduced.
        seen: the count of updates, for a metric that does not count them itself; None if nobody counted.
    """
    if isinstance(metric, Metric) and metric.states and not isinstance(metric, DistributedMetric):
        return DeclaredAdapter(metric, label, shares_samples=here.mesh is not None)
    adapter = _undeclared(metric, label, seen)
    return LoneAdapter(adapter) if here.size == 1 else adapter


def _undeclared(metric: AnyMetric, label: str, seen: Seen | None) -> UndeclaredAdapter:
    if isinstance(metric, DistributedMetric):
        seen = Seen(metric.num_updates, int(metric.has_samples))
        return ValueAdapter(metric, label, metric.reduce_op, seen)
    if is_torchmetrics(metric):
        from dengine.metrics.adapters.torchmetrics import TorchmetricsAdapter

        return TorchmetricsAdapter(metric, label)
    if is_mergeable(metric):
        return MergingAdapter(metric, label, is_seen=seen is None or seen.num_updates > 0)
    return ValueAdapter(metric, label, "mean", _seen_by(metric, seen))


def knows_what_it_saw(metric: AnyMetric) -> bool:
    """Whether the states of `metric` say how much it saw. For other metrics, the updates must be counted outside."""
    has_states = isinstance(metric, Metric) and bool(metric.states)
    return has_states or isinstance(metric, DistributedMetric) or is_torchmetrics(metric)


def _seen_by(metric: AnyMetric, seen: Seen | None) -> Seen:
    """The count of a metric without declared states. If nobody counted, one update of unknown size."""
    num_updates = metric.num_updates if isinstance(metric, Metric) else 0
    if seen is None:
        return Seen(num_updates if isinstance(metric, Metric) else 1, 0)
    return Seen(max(num_updates, seen.num_updates), seen.num_samples)


class DeclaredAdapter:
    """Adapts a metric with declared states. `shares_samples`: ranks may have the same samples."""

    def __init__(self, metric: Metric, label: str, *, shares_samples: bool) -> None:
        self._metric = metric
        self._label = label
        self._shares_samples = shares_samples

    def states(self) -> list[State]:
        self._metric.flush()
        is_seen = self._metric.num_updates > 0
        states = []
        for name, spec in self._metric.states.items():
            op = "sum" if spec.reduce == "samples" and not self._shares_samples else spec.reduce
            states.append(
                State(self._label, name, op, _tensor(getattr(self._metric, name), self._label, name), is_seen)
            )
        return states

    def reduced(self, values: Sequence[torch.Tensor], forms: Sequence[Form]) -> Metric:
        return self._metric.with_states(dict(zip(self._metric.states, values, strict=True)))


class ValueAdapter:
    """Adapts a metric that is computed per rank: its values are reduced, as a mean weighted by samples, or by an op.

    `compute` is not called on a metric that was not updated: it may divide by its count.
    """

    def __init__(self, metric: AnyMetric, label: str, op: str, seen: Seen) -> None:
        self._metric = metric
        self._label = label
        self._op = op
        self._seen = seen
        self._failure: str | None = None

    def states(self) -> list[State]:
        if not isinstance(self._metric, DistributedMetric):
            _warn_once(self._metric, self._label)
        value, weight = self._value_and_weight()
        is_seen = value is not None
        neutral = {"mean": 0.0, "sum": 0.0, "max": -torch.inf, "min": torch.inf}[self._op]
        flat, form = laid_out(value if is_seen else neutral)
        op: Any = "sum" if self._op == "mean" else self._op
        return [
            State(self._label, "value", op, flat * weight if self._op == "mean" else flat, is_seen, form),
            State(self._label, "weight", "sum", torch.tensor(weight, dtype=torch.float64), is_seen),
        ]

    def reduced(self, values: Sequence[torch.Tensor], forms: Sequence[Form]) -> Computed:
        value, weight = values
        if weight == 0:
            return self._computed(None)
        return Computed(from_flat(value / weight if self._op == "mean" else value, forms[0]))

    def own(self) -> Computed:
        return self._computed(self._value())

    def _value_and_weight(self) -> tuple[Any, float]:
        value = self._value()
        if value is None:
            return None, 0.0
        metric = self._metric
        weight = metric.weight if isinstance(metric, DistributedMetric) else float(self._seen.num_updates)
        # The mean over an empty batch is often nan, which would be nan times 0 as well.
        return (value, weight) if weight else (None, 0.0)

    def _value(self) -> Any:
        """The value; None if the metric was not updated, or only with empty batches."""
        if not self._seen.num_updates:
            return None
        try:
            return checked(self._metric.compute(), self._label)
        except NotComputableError as error:
            self._failure = error.reason
        except ZeroDivisionError as error:
            if self._seen.num_samples:
                raise
            self._failure = f"no sample was seen, and compute() raised {error!r}"
        return None

    def _computed(self, value: object) -> Computed:
        return Computed(value) if self._failure is None else Computed(value, self._failure)


def _tensor(value: object, label: str, name: str) -> torch.Tensor:
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
