"""Recognise metrics of any library, and find the metrics inside others."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from dengine.errors import NotComputableError
from dengine.metrics.core.metric import Metric
from dengine.metrics.core.transform import is_torchmetrics

__all__ = [
    "AnyMetric",
    "MetricLike",
    "evaluated",
    "is_mergeable",
    "is_metric",
    "is_tracker",
    "shows_live",
    "stateful_of",
    "updated_through",
    "updaters",
    "value_of",
]


class MetricLike(Protocol):
    """Anything with the three methods of a metric."""

    def reset(self) -> Any: ...

    def update(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute(self) -> Any: ...


AnyMetric: TypeAlias = Metric | MetricLike


def is_metric(value: object) -> bool:
    """Whether it has the three methods of a metric.

    Not by `isinstance` with the Protocol: from Python 3.12 on that does not see methods of a delegate.
    """
    methods = ("reset", "update", "compute")
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in methods)


def is_mergeable(metric: object) -> bool:
    """Whether `metric` is reduced by its own `merge_state(others)`, as torcheval's are."""
    is_known = isinstance(metric, Metric) or is_torchmetrics(metric)
    return not is_known and callable(getattr(metric, "merge_state", None))


def is_tracker(metric: object) -> bool:
    """Whether `metric` is torchmetrics' list of copies, one for each epoch."""
    package = sys.modules.get("torchmetrics")
    return package is not None and isinstance(metric, package.wrappers.MetricTracker)


def shows_live(metric: object) -> bool:
    """Whether the value of `metric` is shown while the epoch is under way."""
    return isinstance(metric, Metric) and metric.shows_live


def stateful_of(metric: AnyMetric) -> tuple[AnyMetric, ...]:
    """The metrics with the states from which `metric` is computed."""
    return metric.stateful_metrics() if isinstance(metric, Metric) else (metric,)


def updated_through(stateful: AnyMetric) -> AnyMetric:
    """The metric whose `reset` and `update` are called for `stateful`: itself, or a user's metric around it."""
    return (stateful.updated_by or stateful) if isinstance(stateful, Metric) else stateful


def evaluated(metric: AnyMetric, reduced: Mapping[int, MetricLike]) -> object:
    """The value of `metric`, given the reduced copies of the stateful metrics that it reads, by their `id`."""
    return metric.evaluate(reduced) if isinstance(metric, Metric) else reduced[id(metric)].compute()


def value_of(name: str, metric: AnyMetric, reduced: Mapping[int, MetricLike]) -> object:
    """`evaluated`, with the name of the metric in the error.

    Raises: NotComputableError: nothing was seen. ValueError: what the metric has seen makes no sense.
    """
    try:
        return evaluated(metric, reduced)
    except NotComputableError as error:
        message = f"Metric {name!r} cannot be computed: {error.reason}."
        raise NotComputableError(message, reason=error.reason) from None
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError(f"Metric {name!r} cannot be computed: {error}") from error


def updaters(metric: AnyMetric, updater: AnyMetric | None = None) -> Iterator[tuple[AnyMetric, AnyMetric]]:
    """`metric` and each metric inside it, each with the metric whose `update` updates it: itself, or one around it."""
    own = metric if updater is None else updater
    yield metric, own
    if is_torchmetrics(metric):
        yield from ((each, own) for each in metric.modules() if each is not metric and is_torchmetrics(each))
    elif isinstance(metric, Metric):
        for part in metric.metrics_within():
            yield from updaters(part, updater if metric.updates_inner_separately else own)
